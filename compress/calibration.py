"""Calibration text as rows of token ids: read from a file or a data set, or sampled from the model itself.

Nothing is dropped silently: what was read and not used is counted. Nothing is shuffled, so only sampling has
a seed.
"""

# Shapes: N samples (rows), T seq_len, S tokens

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibration_data import default_calibration
from compress.chat import render
from compress.errors import ConfigError
from compress.passages import Passages, passages
from compress.positions import refuse_longer
from compress.sampling import may_sample_from, sample_from_folder
from compress.tell import SILENT, Tell
from compress.texts import CALIBRATION, Purpose, Tally, documents, source_sha256
from compress.tokens import PackedTokens, check_ids, ids_sha256, joined_ids, pack, take, text_of
from compress.tokens import load_tokenizer as load_tokenizer  # with `load`, all that a caller needs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Token ids to calibrate on, and where they came from. Only what was read is counted and hashed: reading stops when
    the rows are full."""

    ids_NT: Tensor
    """int64 [num_samples, seq_len], on the CPU; fewer rows than were asked for when the text is short."""
    source: str
    """What the user asked for: file:notes.txt, bundled:self_sampled, self, hf:wikitext:train:text."""
    sha256: str
    """Of the shape and the ids as little-endian int64, see `ids_sha256`."""
    text_sha256: str
    """Of the documents that were read, see `text_sha256`; of the ids when there was no text (`self`)."""
    source_sha256: str | None
    """Of the bytes of the file, whatever part of it was used; None where there is no file."""
    passages: Passages
    """By which text that was calibrated on is known again, see `compress.passages`."""
    num_documents: int
    num_tokens_total: int
    """Tokens read. Those that are not among the unused are in `ids_NT`, beside begin-of-text tokens put before rows."""
    num_tokens_unused: int

    def record(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "text_sha256": self.text_sha256,
            "source_sha256": self.source_sha256,
            "passages": self.passages.to_json(),
            "num_samples": self.ids_NT.shape[0],
            "seq_len": self.ids_NT.shape[1],
            "num_documents": self.num_documents,
            "num_tokens_unused": self.num_tokens_unused,
        }


def load(
    spec: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    model: Path,
    is_reference: bool,
    vocab_size: int,
    device: str = "cpu",
    purpose: Purpose = CALIBRATION,
    trust_remote_code: bool = False,
    tell: Tell = SILENT,
) -> CalibrationSet:
    """The calibration set that `spec` names, at most `num_samples` rows of `seq_len` tokens.

    spec is what `documents` takes, or `self` for text sampled from the model in the folder `model`: only that
    uses `seed` and `device`, and tells how far it is. None means the bundled text for the bundled reference model and
    what was made from it (`is_reference`), and `self` for any other that is small enough (`may_sample_from`). Fewer
    rows than asked for is no error; the caller says so. ConfigError for rows longer than the model's positions.
    """
    spec = chosen_text(spec, seq_len=seq_len, model=model, is_reference=is_reference, device=device)
    if spec == "self":
        ids_NT = sample_from_folder(
            model,
            tokenizer,
            num_samples=num_samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            chat=True,
            trust_remote_code=trust_remote_code,
            tell=tell,
        )
        check_ids(ids_NT, vocab_size)
        packed = PackedTokens(ids_NT=ids_NT, num_total=ids_NT.numel(), num_unused=0)
        return _calibration_set(
            "self", packed, tokenizer, text_hash=ids_sha256(ids_NT), source_hash=None, num_documents=num_samples
        )
    path = spec or str(default_calibration())
    source = "bundled:self_sampled" if spec is None else spec if spec.startswith("hf:") else f"file:{spec}"
    tally = Tally(documents(path, purpose=purpose, render=partial(render, tokenizer)))
    packed = pack(
        tally, tokenizer, num_samples=num_samples, seq_len=seq_len, vocab_size=vocab_size, purpose=purpose
    )  # fmt: skip
    return _calibration_set(
        source,
        packed,
        tokenizer,
        text_hash=tally.sha256(),
        source_hash=source_sha256(path),
        num_documents=tally.count,
    )


def chosen_text(spec: str | None, *, seq_len: int, model: Path, is_reference: bool, device: str = "cpu") -> str | None:
    """What `load` reads when `spec` is asked for: None is the bundled text. Headers and config.json only are read.

    ConfigError for rows longer than the model's positions, and for no text where the model is too large to be sampled
    from without being asked to.
    """
    refuse_longer(model, seq_len, "--seq-len")
    if spec is not None or is_reference:
        return spec
    refusal = may_sample_from(model, device)
    if refusal:
        raise ConfigError(f"no --calib: {refusal}; {CALIBRATION.ways_out}")
    return "self"


def _calibration_set(
    source: str,
    packed: PackedTokens,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_hash: str,
    source_hash: str | None,
    num_documents: int,
) -> CalibrationSet:
    return CalibrationSet(
        ids_NT=packed.ids_NT,
        source=source,
        sha256=ids_sha256(packed.ids_NT),
        text_sha256=text_hash,
        source_sha256=source_hash,
        passages=passages(text_of(tokenizer, packed.ids_NT)),
        num_documents=num_documents,
        num_tokens_total=packed.num_total,
        num_tokens_unused=packed.num_unused,
    )


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """The tokens at the beginning of a text, not cut into rows: int64 [S]. The other fields as in `CalibrationSet`."""

    ids_S: Tensor
    source: str
    text_sha256: str
    source_sha256: str | None


def read_stream(
    spec: str, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, vocab_size: int, purpose: Purpose
) -> TokenStream:
    """The first `max_tokens` tokens of the documents that `spec` names, joined as `joined_ids` does it."""
    tally = Tally(documents(spec, purpose=purpose, render=partial(render, tokenizer)))
    ids = take(joined_ids(tally, tokenizer), max_tokens)[:max_tokens]
    if not ids:
        raise ConfigError(f"{purpose.name} text {spec} gives no tokens; {purpose.ways_out}")
    ids_S = torch.tensor(ids, dtype=torch.int64)
    check_ids(ids_S, vocab_size)
    return TokenStream(
        ids_S=ids_S,
        source=spec if spec.startswith("hf:") else f"file:{spec}",
        text_sha256=tally.sha256(),
        source_sha256=source_sha256(spec),
    )
