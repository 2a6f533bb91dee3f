"""EleutherAI's lm-evaluation-harness over any `Runner`: its task list, its prompts, its aggregates, our models.

The harness is an extra (`pip install "compress-toolkit[eval]"`) and imported here only. Tasks that score given answers
run; tasks that generate text are refused, because a runner reads and does not write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from compress.errors import ConfigError, UnsupportedError
from compress.runtime.runner import Runner, Span, Tokens
from evaluators.scoring import score_all
from evaluators.tasks import encode_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """One task's answers in the order of its documents. chance: mean of 1 / answers to choose from, None for one."""

    name: str
    correct_N: npt.NDArray[np.bool_]
    chance: float | None
    documents: list[int]


def run(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    front: int | None,
    limit: int | None,
    max_length: int,
    include_path: str | None = None,
) -> list[HarnessTask]:
    """Run the tasks. Raises ConfigError for a missing harness or an unknown task, UnsupportedError for generation."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise ConfigError(f'--lm-eval needs {e.name}; pip install "compress-toolkit[eval]"') from e
    manager = TaskManager(include_path=include_path)
    unknown = [n for n in names if n not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"lm_eval has no task {', '.join(unknown)}; lm_eval ls tasks lists them")
    found = simple_evaluate(
        model=_model(runner, tokenizer, front, max_length), tasks=list(names), task_manager=manager, limit=limit,
        log_samples=True, bootstrap_iters=0, verbosity=None,
    )  # fmt: skip
    out = []
    for name, samples in sorted(found["samples"].items()):
        samples = sorted(samples, key=lambda s: int(s["doc_id"]))
        if not samples or "acc" not in samples[0]:
            raise UnsupportedError(f"lm_eval task {name} reports no accuracy by document; choose one that does")
        counts = [len(s["arguments"]) for s in samples]
        chance = float(np.mean([1 / c for c in counts])) if min(counts) > 1 else None
        correct = np.array([bool(s["acc"]) for s in samples])
        out.append(
            HarnessTask(name=name, correct_N=correct, chance=chance, documents=[int(s["doc_id"]) for s in samples])
        )
    return out


def _model(runner: Runner, tokenizer: PreTrainedTokenizerBase, front: int | None, max_length: int) -> Any:
    """The harness's language model over our runner; the class is made here because its base is an optional import."""
    from lm_eval.api.model import LM

    class RunnerModel(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [encode_pair(tokenizer, *r.args) if r.args[0] else _no_context(r.args[1]) for r in requests]
            return self._score([(([] if front is None else [front]) + before, after) for before, after in pairs])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                ids = list(tokenizer(request.args[0], add_special_tokens=False, verbose=False).input_ids)
                first = _prefix()
                parts = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
                before = [first, *[p[-1] for p in parts[:-1]]]
                totals.append(sum(s for s, _ in self._score([([b], p) for b, p in zip(before, parts, strict=True)])))
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            raise UnsupportedError("this lm_eval task generates text, which is not supported; choose one that scores")

        def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            wholes = [(before + after)[-(max_length + 1) :] for before, after in pairs]
            starts = [len(w) - 1 - len(after) for w, (_, after) in zip(wholes, pairs, strict=True)]
            reading = runner.read(
                [Tokens(ids_T=torch.tensor(w[:-1]), first=s) for w, s in zip(wholes, starts, strict=True)]
            )
            wanted = [
                (Span(i, start, start + len(after)), torch.tensor(after))
                for i, (start, (_, after)) in enumerate(zip(starts, pairs, strict=True))
            ]
            scored = score_all(reading, wanted)
            reading.close()
            return [(-float(nll_P.sum()), bool(is_top_P.all())) for nll_P, is_top_P in scored]

    def _prefix() -> int:
        own = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if own is None:
            raise ConfigError("this tokenizer has neither a begin- nor an end-of-text token to start a text with")
        return int(own)

    def _no_context(continuation: str) -> tuple[list[int], list[int]]:
        ids = list(tokenizer(continuation, add_special_tokens=False, verbose=False).input_ids)
        return ([_prefix()] if front is None else []), ids

    return RunnerModel()
