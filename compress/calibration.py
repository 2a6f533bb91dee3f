"""Calibration text as rows of token ids: read from a file or a data set, or sampled from the model itself.

Nothing is dropped silently: what was read and not used is counted. Nothing is shuffled, so only sampling has
a seed.
"""

# Shapes: N samples (rows), T seq_len, B rows sampled together, V vocabulary

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from calibration_data import default_calibration
from compress.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
DEFAULT_DATASET = "hf:mit-han-lab/pile-val-backup:validation:text"  # the calibration set of the AWQ paper
WAYS_OUT = "pass --calib FILE.txt (or .jsonl, .parquet), --calib hf:DATASET:SPLIT:COLUMN or --calib self"
NEEDS_EXTRA = 'install it with: pip install "compress-toolkit[datasets]"'


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


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """Rows cut from a stream of tokens, in order: num_total == ids_NT.numel() + num_unused."""

    ids_NT: Tensor
    num_total: int
    num_unused: int


def documents(spec: str) -> Iterator[str]:
    """The texts that `spec` names, one at a time, in order.

    spec is a text file (UTF-8; the whole file is one document), a .jsonl or .json file of one object a line,
    a .parquet file, or hf:DATASET[@CONFIG][:SPLIT[:COLUMN]] read as a stream (SPLIT is train unless given).
    The column is `text`, or else the only one that holds strings. ConfigError for whatever cannot be read.
    """
    if spec.startswith("hf:"):
        return _hub_documents(spec)
    path = Path(spec)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"calibration file {spec} {what}; {WAYS_OUT}")
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return iter([_read_text(path)])
    if suffix in JSON_SUFFIXES:
        return _json_documents(path)
    if suffix == ".parquet":
        return _parquet_documents(path)
    raise ConfigError(
        f"calibration file {path} ends in {suffix or 'nothing'}, and the kinds that can be read are "
        f"{', '.join((*TEXT_SUFFIXES, *JSON_SUFFIXES, '.parquet'))}; rename or convert the file"
    )


def _read_text(path: Path) -> str:
    text = _decode(path.read_bytes(), str(path)).replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        raise ConfigError(
            f"calibration file {path} has a zero byte at character {text.index(chr(0))}, so it is not text; {WAYS_OUT}"
        )
    if not text.strip():
        raise ConfigError(f"calibration file {path} holds no text in its {len(text)} characters; {WAYS_OUT}")
    return text


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"calibration file {where} is not UTF-8 text: byte {raw[error.start]:#04x} at offset "
            f"{error.start}; convert it to UTF-8 or pass another file"
        ) from error


def _json_documents(path: Path) -> Iterator[str]:
    column = None
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, f"{path}, line {number},").strip()
            if not line:
                continue
            row = _json_row(line, where=f"{path}, line {number},")
            if column is None:
                strings = [name for name in row if isinstance(row[name], str)]
                column = _text_column(strings, list(row), str(path))
            yield _text_of(row, column, where=f"{path}, line {number},")
    if column is None:
        raise ConfigError(f"calibration file {path} has no rows; {WAYS_OUT}")


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f'calibration file {where} is not a JSON object on one line ({error}); write one {{"text": ...}} a line'
        ) from error
    if not isinstance(row, dict):
        raise ConfigError(
            f"calibration file {where} holds a JSON {type(row).__name__} and not an object; "
            'write one {"text": ...} a line'
        )
    return row


def _text_column(string_columns: list[str], columns: list[str], where: str) -> str:
    """The column to read: `text`, or else the only one that holds strings."""
    if "text" in string_columns:
        return "text"
    if len(string_columns) == 1:
        return string_columns[0]
    raise ConfigError(
        f"{where} has no column `text` and {len(string_columns)} columns of strings among its columns "
        f"{', '.join(columns) or '(none)'}; rename the one to calibrate on to `text`"
    )


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        found = "is missing" if column not in row else f"is of type {type(text).__name__} and not a string"
        raise ConfigError(f"{where} cannot be used: column `{column}` {found}; mend or remove that row")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{where} has half a surrogate pair in `{column}`; mend or remove that row")
    return text


def _parquet_documents(path: Path) -> Iterator[str]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"reading {path} needs pyarrow, which is not installed; {NEEDS_EXTRA}") from error
    try:
        file = parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise ConfigError(f"calibration file {path} is not a Parquet file ({error}); {WAYS_OUT}") from error
    with file:
        schema = file.schema_arrow
        is_text = (arrow.types.is_string, arrow.types.is_large_string)
        strings = [field.name for field in schema if any(test(field.type) for test in is_text)]
        column = _text_column(strings, list(schema.names), str(path))
        if not file.metadata.num_rows:
            raise ConfigError(f"calibration file {path} has no rows; {WAYS_OUT}")
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for row in batch.to_pylist():
                number += 1
                yield _text_of(row, column, where=f"{path}, row {number},")


def _hub_documents(spec: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"reading {spec} needs datasets, which is not installed; {NEEDS_EXTRA}") from error
    name, split, column, *rest = [*spec.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise ConfigError(f"calibration set {spec} is not hf:DATASET[@CONFIG][:SPLIT[:COLUMN]]; {WAYS_OUT}")
    name, _, config = name.partition("@")
    number = 0
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in stream:
            if not column:
                strings = [key for key in row if isinstance(row[key], str)]
                column = _text_column(strings, list(row), spec)
            number += 1
            yield _text_of(row, column, where=f"{spec}, row {number},")
    except ConfigError:
        raise
    except Exception as error:  # the hub's, the network's and the decoders' errors have no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        which = f"{spec}, the default," if spec == DEFAULT_DATASET else spec
        raise ConfigError(f"calibration set {which} could not be read ({reason}); {WAYS_OUT}") from error


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
    return _cut(chunks, num_samples=num_samples, seq_len=seq_len, vocab_size=vocab_size)


def pack_lines(
    text: str, tokenizer: PreTrainedTokenizerBase, *, num_samples: int, seq_len: int, vocab_size: int
) -> PackedTokens:
    """As `pack`, of one plain text that is tokenized line by line, without any special token.

    Other quantizers are measured on text cut in this way, so results on the same file compare; and a long
    text is never tokenized further than needed. Each line gets a line feed, the last one too.
    """
    lines = (_ids(tokenizer, line + "\n", special=False) for line in text.split("\n"))
    return _cut(lines, num_samples=num_samples, seq_len=seq_len, vocab_size=vocab_size)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    # verbose=False: no warning that a document is longer than the context, it will be cut into rows
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def _joined_ids(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    marks_documents = bool(_ids(tokenizer, "", special=True))
    end_of_text = tokenizer.eos_token_id
    separator = [] if marks_documents or end_of_text is None else [end_of_text]
    is_first = True
    for document in documents:
        if not document:
            continue
        yield ([] if is_first else separator) + _ids(tokenizer, document, special=marks_documents)
        is_first = False


def _cut(chunks: Iterable[list[int]], *, num_samples: int, seq_len: int, vocab_size: int) -> PackedTokens:
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


def text_sha256(documents: Iterable[str]) -> str:
    """Of the documents in UTF-8 with one line feed between two; for a single text, of that text."""
    tally = _Tally(documents)
    for _ in tally:
        pass
    return tally.sha256()


class _Tally:
    """Passes documents on, and hashes and counts those that were taken."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents
        self._digest = hashlib.sha256()
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._documents:
            self._digest.update(b"\n" * bool(self.count) + document.encode("utf-8"))
            self.count += 1
            yield document

    def sha256(self) -> str:
        return self._digest.hexdigest()


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
        packed = _cut([ids_NT.flatten().tolist()], **sizes)
        return _calibration_set("self", packed, text_hash=ids_sha256(ids_NT), num_documents=num_samples)
    if spec is None and is_reference:
        source, tally = "bundled:self_sampled", _Tally(documents(str(default_calibration())))
    elif spec is None:
        source, tally = DEFAULT_DATASET, _Tally(documents(DEFAULT_DATASET))
    else:
        source = spec if spec.startswith("hf:") else f"file:{spec}"
        tally = _Tally(documents(spec))
    if source.startswith("file:") and Path(source).suffix.lower() in TEXT_SUFFIXES:
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


def load_model_float32(model: Path, device: str = "cpu") -> PreTrainedModel:
    """The causal language model in the folder `model`, float32, on `device`.

    It holds the whole model in memory (4 bytes a parameter), unlike the rest of this toolkit.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(model), dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--calib self cannot load the model in {model} ({reason}); pass a text file with --calib FILE.txt"
        ) from error
    return loaded.to(device).eval()


@torch.inference_mode()
def sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    batch_size: int = 32,
) -> Tensor:
    """int64 [num_samples, seq_len] drawn from `model` at temperature 1 with nothing cut off, on the CPU.

    Each row begins as the tokenizer begins a text, or else with its end-of-text or BOS token; after an
    end-of-text token the row goes on with a new text. Ids are used as drawn, never decoded and encoded again.
    Ids behind the tokenizer's last are never drawn: many models pad their vocabulary.

    A row depends on (seed, row number) and on rounding: same machine, same libraries, same result. It draws
    by inverting the cumulative distribution with a uniform number from PCG64, in float64.
    """
    start = _start_ids(tokenizer)
    num_ids = len(tokenizer)
    rows = []
    for first in range(0, num_samples, batch_size):
        numbers = range(first, min(first + batch_size, num_samples))
        streams = [np.random.Generator(np.random.PCG64([seed, row])) for row in numbers]
        uniform_BT = torch.from_numpy(np.stack([stream.random(seq_len) for stream in streams]))
        rows.append(_sample_batch(model, start, tokenizer.eos_token_id, num_ids, uniform_BT))
    return torch.cat(rows)


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before the first token of a text: at least one id."""
    own = _ids(tokenizer, "", special=True)
    if own and tokenizer.bos_token_id in own:
        return own[: own.index(tokenizer.bos_token_id) + 1]
    # end-of-text before BOS: a tokenizer that adds no BOS has models that saw texts apart by end-of-text only
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return [token]
    raise ConfigError(
        "--calib self needs a token to start from, and the tokenizer has neither end-of-text nor BOS; "
        "pass a text file with --calib FILE.txt"
    )


def _sample_batch(
    model: PreTrainedModel, start: list[int], end_of_text: int | None, num_ids: int, uniform_BT: Tensor
) -> Tensor:
    num_rows, seq_len = uniform_BT.shape
    ids_BT = torch.empty(num_rows, seq_len, dtype=torch.int64)
    forced = [list(start) for _ in range(num_rows)]  # tokens that a row takes before it draws again
    restart = [] if end_of_text is None or start == [end_of_text] else start
    drawn_B = [0] * num_rows
    cache = None
    for position in range(seq_len):
        for row in range(num_rows):
            token = forced[row].pop(0) if forced[row] else drawn_B[row]
            if not forced[row] and token == end_of_text:
                forced[row] = list(restart)
            ids_BT[row, position] = token
        if position + 1 == seq_len:
            break
        ids_B1 = ids_BT[:, position : position + 1].to(model.device)
        output = model(input_ids=ids_B1, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probability_BV = output.logits[:, -1, :num_ids].double().softmax(-1)
        drawn_B = _invert(probability_BV, uniform_BT[:, position].to(model.device)).tolist()
    return ids_BT


def _invert(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The id at which each row's cumulative probability first exceeds its uniform number: int64 [B]."""
    cumulative_BV = probability_BV.cumsum(-1)
    # scaled to the sum: rounding may leave that a little below 1, and the target must not lie behind it
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    id_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    return id_B1[:, 0].clamp(max=probability_BV.shape[-1] - 1)
