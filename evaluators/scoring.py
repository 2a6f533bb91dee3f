"""What two models say of the tokens that came, with a part of the vocabulary in memory at a time.

Softmax needs a sum over the whole vocabulary before any probability is known, so the sums are carried along: of
exponentials relative to the largest logit so far, rescaled when a larger one comes, in float64.

Shapes: P positions of a batch, V vocabulary, v ids of a part of it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import ArtifactError
from compress.runtime.runner import Reading, Span
from compress.runtime.streamed import POSITIONS, slices


class RunningSoftmax:
    """One model's predictions at P positions, fed with logits of consecutive ids."""

    def __init__(self, target_P: Tensor) -> None:
        self.target_P = target_P
        self.sum_P = torch.zeros(len(target_P), dtype=torch.float64)
        """Of the exponentials relative to the largest logit."""
        self.top_P = torch.zeros_like(target_P)
        self._target_logit_P = torch.full((len(target_P),), torch.nan, dtype=torch.float64)
        self._max_P = torch.full((len(target_P),), -torch.inf)

    def add(self, logits_Pv: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Returns `exp(logits - largest so far)` and by what sums relative to the earlier largest are to be scaled."""
        if self.target_P.device != logits_Pv.device:
            self._move(logits_Pv.device)
        top_P, place_P = logits_Pv.max(-1)
        self.top_P = torch.where(top_P > self._max_P, place_P + first, self.top_P)
        largest_P = torch.maximum(self._max_P, top_P)
        scale_P = (self._max_P - largest_P).double().exp()
        exponential_Pv = (logits_Pv - largest_P[:, None]).exp_()
        self.sum_P = self.sum_P * scale_P + exponential_Pv.sum(-1, dtype=torch.float64)
        self._max_P = largest_P
        inside_P = (self.target_P >= first) & (self.target_P < first + logits_Pv.shape[-1])
        column_P = (self.target_P - first).clamp(0, logits_Pv.shape[-1] - 1)
        found_P = logits_Pv.gather(-1, column_P[:, None])[:, 0].double()
        self._target_logit_P = torch.where(inside_P, found_P, self._target_logit_P)
        return exponential_Pv, scale_P

    def _move(self, device: torch.device) -> None:
        self.target_P, self.sum_P, self.top_P = (t.to(device) for t in (self.target_P, self.sum_P, self.top_P))
        self._target_logit_P, self._max_P = self._target_logit_P.to(device), self._max_P.to(device)

    def log_sum_P(self) -> Tensor:
        """Logarithm of the sum of the exponentials of all logits added, float64."""
        return self._max_P.double() + self.sum_P.log()

    def nll_P(self) -> Tensor:
        """Negative log-likelihood of the targets in nats, float64."""
        return self.log_sum_P() - self._target_logit_P

    def is_top_P(self) -> Tensor:
        """Whether the target has the largest logit."""
        return torch.eq(self.target_P.to(self.sum_P.device), self.top_P)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two models at P positions, on the CPU: nll in nats, KL(reference || candidate), whether both think the same token
    the likeliest, mean squared difference of the logits; and whether each thinks the target the likeliest."""

    nll_reference_P: Tensor
    nll_candidate_P: Tensor
    kl_P: Tensor
    same_top_P: Tensor
    mse_P: Tensor
    right_reference_P: Tensor
    right_candidate_P: Tensor


@torch.no_grad()
def compare_at(
    reference: Reading,
    candidate: Reading,
    spans: Sequence[Span],
    target_P: Tensor,
    named: Callable[[int], str] = lambda sequence: f"window {sequence}",
) -> Compared:
    """Score the predictions after each position of `spans` against the tokens that came, `target_P`.

    ArtifactError when the vocabularies differ, or naming the model and place where a score is not finite; `named` says
    what a sequence is called.
    """
    size = reference.vocab_size
    if candidate.vocab_size != size:
        raise ArtifactError(
            f"the candidate's vocabulary has {candidate.vocab_size} entries and the reference's {size}; they cannot be "
            "compared token by token, pass the candidate's own original"
        )
    ours, theirs = RunningSoftmax(target_P), RunningSoftmax(target_P)
    square_P = weighted_P = torch.zeros(len(target_P), dtype=torch.float64)
    for ids in slices(size, min(reference.ids_at_once, candidate.ids_at_once)):
        r_Pv = reference.at(spans, ids)
        c_Pv = candidate.at(spans, ids).to(r_Pv.device)
        exponential_Pv, scale_P = ours.add(r_Pv, ids.start)
        theirs.add(c_Pv, ids.start)
        difference_Pv = r_Pv - c_Pv
        square_P = square_P.to(r_Pv.device) + difference_Pv.square().sum(-1, dtype=torch.float64)
        weighted_P = weighted_P.to(r_Pv.device) * scale_P
        weighted_P = weighted_P + exponential_Pv.mul_(difference_Pv).sum(-1, dtype=torch.float64)
    # sum_v p_r (ln p_r - ln p_c), with ln p = logit - log_sum: first the mean under p_r of the logits' differences
    kl_P = weighted_P / ours.sum_P - (ours.log_sum_P() - theirs.log_sum_P())
    nll_r_P, nll_c_P = ours.nll_P().cpu(), theirs.nll_P().cpu()
    for value_P, what in ((nll_r_P, "reference"), (nll_c_P, "candidate"), (kl_P.cpu(), "candidate")):
        if not bool(torch.isfinite(value_P).all()):
            sequence, position = _places(spans)[int((~torch.isfinite(value_P)).nonzero()[0])]
            raise ArtifactError(
                f"the {what}'s logits after token {position} of {named(sequence)} are not finite; the model is "
                "damaged, or overflows in this dtype"
            )
    return Compared(
        nll_reference_P=nll_r_P,
        nll_candidate_P=nll_c_P,
        kl_P=kl_P.cpu(),
        same_top_P=torch.eq(ours.top_P, theirs.top_P).cpu(),
        mse_P=(square_P / size).cpu(),
        right_reference_P=ours.is_top_P().cpu(),
        right_candidate_P=theirs.is_top_P().cpu(),
    )


@torch.no_grad()
def score_at(reading: Reading, spans: Sequence[Span], target_P: Tensor) -> tuple[Tensor, Tensor]:
    """One model at P positions: nll of the targets (nats, float64), and whether each is the likeliest token; CPU."""
    running = RunningSoftmax(target_P)
    for ids in slices(reading.vocab_size, reading.ids_at_once):
        running.add(reading.at(spans, ids), ids.start)
    return running.nll_P().cpu(), running.is_top_P().cpu()


def batches(wanted: Iterable[tuple[Span, Tensor]], most: int = POSITIONS) -> Iterator[tuple[list[Span], Tensor]]:
    """Spans and their targets, joined or cut so that each batch has at most `most` positions, in order."""
    spans: list[Span] = []
    targets: list[Tensor] = []
    held = 0
    for span, target in wanted:
        for start in range(span.start, span.stop, most):
            stop = min(start + most, span.stop)
            if spans and held + stop - start > most:
                yield spans, torch.cat(targets)
                spans, targets, held = [], [], 0
            spans.append(Span(span.sequence, start, stop))
            targets.append(target[start - span.start : stop - span.start])
            held += stop - start
    if spans:
        yield spans, torch.cat(targets)


def score_all(
    reading: Reading, wanted: Sequence[tuple[Span, Tensor]], on_batch: Callable[[], None] = lambda: None
) -> list[tuple[Tensor, Tensor]]:
    """`score_at` of every span, in batches; one pair a span, in order."""
    parts = []
    for spans, target_P in batches(wanted):
        parts.append(score_at(reading, spans, target_P))
        on_batch()
    if not parts:
        return []
    sizes = [len(target) for _, target in wanted]
    nll, top = (torch.cat(column).split(sizes) for column in zip(*parts, strict=True))
    return list(zip(nll, top, strict=True))


def _places(spans: Sequence[Span]) -> list[tuple[int, int]]:
    return [(span.sequence, position) for span in spans for position in range(span.start, span.stop)]
