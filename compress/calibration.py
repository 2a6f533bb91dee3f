"""Calibration text as rows of token ids: read from a file or a data set, or sampled from the model itself.

Nothing is dropped silently: what was read and not used is counted. Nothing is shuffled, so only sampling has
a seed.
"""

# Shapes: N samples (rows), T seq_len, B rows sampled together, V vocabulary

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from calibration_data import default_calibration
from compress.sampling import load_model_float32, sample_from_model
from compress.texts import DEFAULT_DATASET, TEXT_SUFFIXES, Tally, documents, text_suffix
from compress.tokens import PackedTokens, cut, ids_sha256, pack, pack_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Token ids to calibrate on, and where they came from.

    num_tokens_total == ids_NT.numel() + num_tokens_unused: tokens read, tokens used, tokens after the last
    full row. Reading stops when the rows are full, so text behind that point is in neither number.
    """

    ids_NT: Tensor
    """int64 [num_samples, seq_len], on the CPU; fewer rows than were asked for when the text is short."""
    source: str
    """What the user asked for: file:notes.txt, bundled:self_sampled, self, hf:wikitext:train:text."""
    sha256: str
    """Of the shape and the ids as little-endian int64, see `ids_sha256`."""
    text_sha256: str
    """Of the documents that were read, see `text_sha256`; of the ids when there was no text (`self`)."""
    num_documents: int
    num_tokens_total: int
    num_tokens_unused: int


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
) -> CalibrationSet:
    """The calibration set that `spec` names, at most `num_samples` rows of `seq_len` tokens.

    spec is what `documents` takes, or `self` for text sampled from the model in the folder `model`: only that
    uses `seed` and `device`. None means the bundled text for the bundled reference model (`is_reference`), and the data
    set of the AWQ paper for any other. Fewer rows than asked for is no error; the caller says so.
    """
    sizes = {"num_samples": num_samples, "seq_len": seq_len, "vocab_size": vocab_size}
    if spec == "self":
        ids_NT = sample_from_model(
            load_model_float32(model, device), tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed
        )
        packed = cut([ids_NT.flatten().tolist()], **sizes)
        return _calibration_set("self", packed, text_hash=ids_sha256(ids_NT), num_documents=num_samples)
    if spec is None and is_reference:
        source, tally = "bundled:self_sampled", Tally(documents(str(default_calibration())))
    elif spec is None:
        source, tally = DEFAULT_DATASET, Tally(documents(DEFAULT_DATASET))
    else:
        source = spec if spec.startswith("hf:") else f"file:{spec}"
        tally = Tally(documents(spec))
    if source.startswith("file:") and text_suffix(Path(source)) in TEXT_SUFFIXES:
        packed = pack_lines("".join(tally), tokenizer, **sizes)
    else:
        packed = pack(tally, tokenizer, **sizes)
    return _calibration_set(source, packed, text_hash=tally.sha256(), num_documents=tally.count)


def _calibration_set(source: str, packed: PackedTokens, *, text_hash: str, num_documents: int) -> CalibrationSet:
    return CalibrationSet(
        ids_NT=packed.ids_NT,
        source=source,
        sha256=ids_sha256(packed.ids_NT),
        text_sha256=text_hash,
        num_documents=num_documents,
        num_tokens_total=packed.num_total,
        num_tokens_unused=packed.num_unused,
    )
