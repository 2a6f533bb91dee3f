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

from compress.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """Rows cut from a stream of tokens, in order: num_total == ids_NT.numel() + num_unused."""

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
        return AutoTokenizer.from_pretrained(str(model), local_files_only=True, trust_remote_code=trust_remote_code)
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
) -> PackedTokens:
    """`documents` tokenized, joined and cut into at most `num_samples` rows of `seq_len` tokens, in order.

    A document keeps the special tokens that the tokenizer puts around a text (Llama: BOS before it). If it
    puts none, its end-of-text token goes between two documents, if it has one. Empty documents add nothing.
    Reading stops as soon as the rows are full; what the last document has beyond them is counted as unused.

    ConfigError when not even one row fills, or when an id is not below the model's `vocab_size`.
    """
    chunks = _joined_ids(documents, tokenizer)
    return cut(chunks, num_samples=num_samples, seq_len=seq_len, vocab_size=vocab_size)


def pack_lines(
    text: str, tokenizer: PreTrainedTokenizerBase, *, num_samples: int, seq_len: int, vocab_size: int
) -> PackedTokens:
    """As `pack`, of one plain text that is tokenized line by line, without any special token.

    Other quantizers are measured on text cut in this way, so results on the same file compare; and a long
    text is never tokenized further than needed. Each line gets a line feed, the last one too.
    """
    lines = (token_ids(tokenizer, line + "\n", special=False) for line in text.split("\n"))
    return cut(lines, num_samples=num_samples, seq_len=seq_len, vocab_size=vocab_size)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    # verbose=False: no warning that a document is longer than the context, it will be cut into rows
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def _joined_ids(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    marks_documents = bool(token_ids(tokenizer, "", special=True))
    end_of_text = tokenizer.eos_token_id
    separator = [] if marks_documents or end_of_text is None else [end_of_text]
    is_first = True
    for document in documents:
        if not document:
            continue
        yield ([] if is_first else separator) + token_ids(tokenizer, document, special=marks_documents)
        is_first = False


def cut(chunks: Iterable[list[int]], *, num_samples: int, seq_len: int, vocab_size: int) -> PackedTokens:
    if num_samples < 1 or seq_len < 1:
        raise ConfigError(
            f"calibration needs at least 1 sample of 1 token, not {num_samples} samples of {seq_len}; "
            "pass --samples 128 --seq-len 512"
        )
    ids: list[int] = []
    for chunk in chunks:
        ids += chunk
        if len(ids) >= num_samples * seq_len:
            break
    num_rows = min(num_samples, len(ids) // seq_len)
    if num_rows == 0:
        shorter = f" or --seq-len {1 << (len(ids).bit_length() - 1)}" if ids else ""
        raise ConfigError(
            f"calibration text gives {len(ids)} tokens, one sample needs {seq_len}; pass more text{shorter}"
        )
    used = torch.tensor(ids[: num_rows * seq_len], dtype=torch.int64)
    largest = int(used.max())
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer gives id {largest}, the model's vocabulary has {vocab_size} entries; "
            "use the tokenizer that belongs to the model"
        )
    return PackedTokens(ids_NT=used.view(num_rows, seq_len), num_total=len(ids), num_unused=len(ids) - used.numel())


def ids_sha256(ids_NT: Tensor) -> str:
    """Of the text "N T" (the shape), a line feed, and the ids row by row as little-endian int64."""
    digest = hashlib.sha256("{} {}\n".format(*ids_NT.shape).encode("ascii"))
    digest.update(np.ascontiguousarray(ids_NT.numpy(), dtype="<i8").tobytes())
    return digest.hexdigest()
