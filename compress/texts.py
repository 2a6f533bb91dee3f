"""The documents that a file or data set holds, one at a time."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import ConfigError, explained
from compress.files import file_sha256
from compress.rows import Render, json_row, text_column, text_of

TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PACKED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open}  # both read bytes unless told
NEEDS_EXTRA = 'install it with: pip install "compress-toolkit[datasets]"'
HUB_SECONDS = 5.0
"""How long the hub may take to answer at all. Nothing is asked a second time."""


@dataclass(frozen=True)
class Purpose:
    """What a text is read for: how errors call it, and what they offer instead."""

    name: str
    ways_out: str


CALIBRATION = Purpose(
    "calibration", "pass --calib FILE.txt (or .jsonl, .parquet), --calib hf:DATASET:SPLIT:COLUMN or --calib self"
)
WATCHED = Purpose("watched", "pass --watch FILE.txt (or .jsonl, .parquet) or --watch hf:DATASET:SPLIT:COLUMN")
EVALUATION = Purpose(
    "evaluation", "pass --data FILE.txt (or .jsonl, .parquet), --data hf:DATASET:SPLIT:COLUMN or --data self"
)


def documents(spec: str, *, purpose: Purpose = CALIBRATION, render: Render | None = None) -> Iterator[str]:
    """The texts that `spec` names, one at a time, in order.

    spec is a text file (UTF-8; the whole file is one document), a .jsonl or .json file of one object a line, either of
    them packed (.gz, .xz) or not, a .parquet file, or hf:DATASET[@CONFIG][:SPLIT[:COLUMN]] read as a stream (SPLIT is
    train unless given). Only a line feed ends a line. What of a row is the text says `text_column`; chats are written
    out by `render`. ConfigError for whatever cannot be read.
    """
    if spec.startswith("hf:"):
        return _hub_documents(spec, purpose, render)
    path = Path(spec)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
        raise ConfigError(f"{purpose.name} file {spec} {what}; {purpose.ways_out}")
    suffix = text_suffix(path)
    if suffix in TEXT_SUFFIXES:
        return iter([_read_text(path, purpose)])
    if suffix in JSON_SUFFIXES:
        return _json_documents(path, purpose, render)
    if suffix == ".parquet":
        return _parquet_documents(path, purpose, render)
    raise ConfigError(
        f"{purpose.name} file {path} ends in {suffix or 'nothing'}, and the kinds that can be read are "
        f"{', '.join((*TEXT_SUFFIXES, *JSON_SUFFIXES))}, each also as {' or '.join(PACKED)}, and .parquet; rename or "
        "convert the file"
    )


def source_sha256(spec: str) -> str | None:
    """Of the bytes of the file that `spec` names; None for what is no file."""
    return None if spec.startswith("hf:") or not Path(spec).is_file() else file_sha256(Path(spec))


def _read_text(path: Path, purpose: Purpose) -> str:
    text = (
        _decode(b"".join(_lines(path, purpose)), f"{purpose.name} file {path}")
        .replace("\r\n", "\n")
        .replace("\r", "\n")
    )
    if "\0" in text:
        raise ConfigError(
            f"{purpose.name} file {path} has a zero byte at character {text.index(chr(0))}, so it is not text; "
            f"{purpose.ways_out}"
        )
    if not text.strip():
        raise ConfigError(f"{purpose.name} file {path} holds no text in its {len(text)} characters; {purpose.ways_out}")
    return text


def text_suffix(path: Path) -> str:
    """The ending that says what a file holds, in lower case: that before .gz or .xz, if it is packed."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def _lines(path: Path, purpose: Purpose) -> Iterator[bytes]:
    """A file's lines, unpacked if it is packed. Of bytes: nothing but a line feed ends one."""
    suffix = path.suffix.lower()
    try:
        with PACKED[suffix](path) if suffix in PACKED else open(path, "rb") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(
            f"{purpose.name} file {path} cannot be unpacked ({error}); it is cut off or damaged, fetch it again"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{purpose.name} file {path} cannot be read ({error.strerror or error}); {purpose.ways_out}"
        ) from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start}; convert it to UTF-8 "
            "or pass another file"
        ) from error


def _json_documents(path: Path, purpose: Purpose, render: Render | None) -> Iterator[str]:
    column = None
    for number, raw in enumerate(_lines(path, purpose), start=1):
        where = f"{purpose.name} file {path}, line {number},"
        line = _decode(raw, where).strip(" \t\r\n")
        if not line:
            continue
        row = json_row(line, where)
        column = column or text_column(row, f"{purpose.name} file {path}", purpose.name)
        yield text_of(row, column, where, render)
    if column is None:
        raise ConfigError(f"{purpose.name} file {path} has no rows; {purpose.ways_out}")


def _parquet_documents(path: Path, purpose: Purpose, render: Render | None) -> Iterator[str]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"reading {path} needs pyarrow, which is not installed; {NEEDS_EXTRA}") from error
    file_named = f"{purpose.name} file {path}"
    # Arrow leaves text undecoded until a value is asked for, so what a damaged file raises is not Arrow's alone.
    with explained(f"{file_named} is not a Parquet file that can be read", purpose.ways_out, ConfigError):
        with parquet.ParquetFile(path) as file:
            column = text_column(_typical_row(file.schema_arrow, arrow), file_named, purpose.name)
            if not file.metadata.num_rows:
                raise ConfigError(f"{file_named} has no rows; {purpose.ways_out}")
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for row in batch.to_pylist():
                    number += 1
                    yield text_of(row, column, f"{file_named}, row {number},", render)


def _typical_row(schema: Any, arrow: Any) -> dict[str, Any]:
    """A row of the schema's types, with values of no account."""
    types = arrow.types

    def value(kind: Any) -> Any:
        if types.is_string(kind) or types.is_large_string(kind):
            return ""
        return [] if types.is_list(kind) or types.is_large_list(kind) else {} if types.is_struct(kind) else None

    return {field.name: value(field.type) for field in schema}


def _hub_documents(spec: str, purpose: Purpose, render: Render | None) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"reading {spec} needs datasets, which is not installed; {NEEDS_EXTRA}") from error
    name, split, column, *rest = [*spec.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise ConfigError(f"{purpose.name} set {spec} is not hf:DATASET[@CONFIG][:SPLIT[:COLUMN]]; {purpose.ways_out}")
    name, _, config = name.partition("@")
    number = 0
    try:
        if not Path(name).exists():
            _ask_hub(name)
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in stream:
            column = column or text_column(row, spec, purpose.name)
            number += 1
            yield text_of(row, column, f"{purpose.name} set {spec}, row {number},", render)
    except ConfigError:
        raise
    except Exception as error:  # the hub's, the network's and the decoders' errors have no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{purpose.name} set {spec} could not be read ({reason[:200]}); {purpose.ways_out}"
        ) from error


def _ask_hub(name: str) -> None:
    """One question, answered at once or not at all: `datasets` would ask twenty times, five seconds apart."""
    from datasets import config
    from huggingface_hub import HfApi

    config.STREAMING_OPEN_MAX_RETRIES = config.STREAMING_READ_MAX_RETRIES = 1
    HfApi().dataset_info(name, timeout=HUB_SECONDS)


# ---- hashes ------------------------------------------------------------------------------------------


def text_sha256(documents: Iterable[str]) -> str:
    """Of the documents in UTF-8 with one line feed between two; for a single text, of that text."""
    tally = Tally(documents)
    for _ in tally:
        pass
    return tally.sha256()


class Tally:
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
