"""The documents that a file or data set holds, one at a time."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from compress.errors import ConfigError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PACKED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open}  # both read bytes unless told
DEFAULT_DATASET = "hf:mit-han-lab/pile-val-backup:validation:text"  # the calibration set of the AWQ paper
WAYS_OUT = "pass --calib FILE.txt (or .jsonl, .parquet), --calib hf:DATASET:SPLIT:COLUMN or --calib self"
NEEDS_EXTRA = 'install it with: pip install "compress-toolkit[datasets]"'


def documents(spec: str) -> Iterator[str]:
    """The texts that `spec` names, one at a time, in order.

    spec is a text file (UTF-8; the whole file is one document), a .jsonl or .json file of one object a line, either of
    them packed (.gz, .xz) or not, a .parquet file, or hf:DATASET[@CONFIG][:SPLIT[:COLUMN]] read as a stream (SPLIT is
    train unless given).
    The column is `text`, or else the only one that holds strings. ConfigError for whatever cannot be read.
    """
    if spec.startswith("hf:"):
        return _hub_documents(spec)
    path = Path(spec)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"calibration file {spec} {what}; {WAYS_OUT}")
    suffix = text_suffix(path)
    if suffix in TEXT_SUFFIXES:
        return iter([_read_text(path)])
    if suffix in JSON_SUFFIXES:
        return _json_documents(path)
    if suffix == ".parquet":
        return _parquet_documents(path)
    raise ConfigError(
        f"calibration file {path} ends in {suffix or 'nothing'}, and the kinds that can be read are "
        f"{', '.join((*TEXT_SUFFIXES, *JSON_SUFFIXES))}, each also as {' or '.join(PACKED)}, and .parquet; rename or "
        "convert the file"
    )


def text_suffix(path: Path) -> str:
    """The ending that says what a file holds, in lower case: that before .gz or .xz, if it is packed."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def _lines(path: Path) -> Iterator[bytes]:
    """A file's lines, unpacked if it is packed."""
    suffix = path.suffix.lower()
    try:
        with PACKED[suffix](path) if suffix in PACKED else open(path, "rb") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(
            f"calibration file {path} cannot be unpacked ({error}); it is cut off or damaged, fetch it again"
        ) from error


def _read_text(path: Path) -> str:
    text = _decode(b"".join(_lines(path)), str(path)).replace("\r\n", "\n").replace("\r", "\n")
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
    for number, raw in enumerate(_lines(path), start=1):
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
