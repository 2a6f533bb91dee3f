"""Documents as rows of token ids. Nothing is shuffled; what does not fill a row is counted.

Shapes: N rows, T tokens in a row
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compress.chat import Rendered
from compress.errors import ConfigError
from compress.long_text import ids_of, token_ids
from compress.texts import CALIBRATION, Purpose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """Rows cut from a stream of tokens, in order.

    num_total: tokens of the stream that were read; num_unused: those in no row. The rest are in the rows, in which a
    begin-of-text token may stand besides.
    """

    ids_NT: Tensor
    num_total: int
    num_unused: int


def load_tokenizer(model: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder `model`.

    Never asks the network; runs the folder's code only if told to.
    """
    from transformers import AutoTokenizer

    if not model.is_dir():
        raise ConfigError(f"model folder {model} does not exist; pass the folder of a Hugging Face model")
    try:
        found = AutoTokenizer.from_pretrained(str(model), local_files_only=True, trust_remote_code=trust_remote_code)
        found("")  # a setting of another type fails only in use
        return found
    except Exception as error:  # tokenizers raises bare Exception; the rest ranges from KeyError to OSError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"the tokenizer in {model} cannot be loaded ({reason}); "
            "put the model's tokenizer.json and tokenizer_config.json into that folder"
        ) from error


def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    seq_len: int,
    vocab_size: int,
    purpose: Purpose = CALIBRATION,
) -> PackedTokens:
    """`documents` tokenized, joined and cut into at most `num_samples` rows of `seq_len` tokens, in order.

    A document keeps the special tokens that the tokenizer puts around a text (Llama: BOS before it). If it
    puts none, its end-of-text token goes between two documents, if it has one. Empty documents add nothing.
    Where the tokenizer begins a text with BOS, so does every row, as the model was trained to see it: a row
    from within a document gets one of its own. Reading stops as soon as the rows are full, in the middle of a
    long document too; what was read beyond them is counted as unused.

    ConfigError when not even one row fills, or when an id is not below the model's `vocab_size`.
    """
    if num_samples < 1 or seq_len < 1:
        raise ConfigError(
            f"{purpose.name} needs at least 1 sample of 1 token, not {num_samples} samples of {seq_len}; "
            "pass --samples 128 --seq-len 512"
        )
    front = begin_id(tokenizer)
    ids = take(joined_ids(documents, tokenizer), num_samples * seq_len)
    rows, num_used = _rows(ids, num_samples, seq_len, None if seq_len == 1 else front)
    if not rows:
        shorter = f" or --seq-len {1 << (len(ids).bit_length() - 1)}" if ids else ""
        raise ConfigError(
            f"{purpose.name} text gives {len(ids)} tokens, one sample needs {seq_len}; pass more text{shorter}"
        )
    ids_NT = torch.tensor(rows, dtype=torch.int64)
    check_ids(ids_NT, vocab_size)
    return PackedTokens(ids_NT=ids_NT, num_total=len(ids), num_unused=len(ids) - num_used)


def joined_ids(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The documents' tokens one after the other, as `pack` describes, in pieces."""
    marks_documents = bool(token_ids(tokenizer, "", special=True))
    end_of_text = tokenizer.eos_token_id
    separator = [] if marks_documents or end_of_text is None else [end_of_text]
    is_first = True
    for document in documents:
        if not document:
            continue
        rendered = isinstance(document, Rendered)
        if not is_first and not rendered:
            yield separator
        yield from ids_of(tokenizer, document, special=marks_documents and not rendered)
        is_first = False


def take(pieces: Iterable[list[int]], least: int) -> list[int]:
    """The pieces joined until they hold at least `least` ids; no piece behind that is asked for."""
    ids: list[int] = []
    for piece in pieces:
        ids += piece
        if len(ids) >= least:
            break
    return ids


def _rows(ids: list[int], num_samples: int, seq_len: int, front: int | None) -> tuple[list[list[int]], int]:
    """Full rows in order, each beginning with `front` if there is one, and how many of the ids they took."""
    rows: list[list[int]] = []
    start = 0
    while len(rows) < num_samples:
        added = [] if front is None or ids[start : start + 1] == [front] else [front]
        stop = start + seq_len - len(added)
        if stop > len(ids):
            break
        rows.append(added + ids[start:stop])
        start = stop
    return rows, start


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """ConfigError when an id is not below `vocab_size`."""
    largest = int(ids.max())
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer gives id {largest}, the model's vocabulary has {vocab_size} entries; "
            "use the tokenizer that belongs to the model"
        )


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    """The text of ids in any shape, in order, without special tokens."""
    return str(tokenizer.decode(ids.reshape(-1).tolist(), skip_special_tokens=True))


def begin_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The begin-of-text token, where the tokenizer puts one before a text by itself."""
    own = tokenizer.bos_token_id
    return int(own) if own is not None and token_ids(tokenizer, "a", special=True)[:1] == [own] else None


def ids_sha256(ids_NT: Tensor) -> str:
    """Of the text "N T" (the shape), a line feed, and the ids row by row as little-endian int64."""
    digest = hashlib.sha256("{} {}\n".format(*ids_NT.shape).encode("ascii"))
    digest.update(np.ascontiguousarray(ids_NT.numpy(), dtype="<i8").tobytes())
    return digest.hexdigest()
