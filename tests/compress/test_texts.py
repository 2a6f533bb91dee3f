"""Reading documents from files and data sets, and refusing in one sentence what cannot be read."""

import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress import texts
from compress.errors import ConfigError


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\r\ntwo\n", ["one\ntwo\n"]),
        ("a.jsonl", '{"text": "one\\u2028two"}\n\n{"text": "", "other": "x"}\n', ["one\u2028two", ""]),
        ("a.json", '{"id": 1, "content": "one"}\n{"id": 2, "content": "two"}', ["one", "two"]),
    ],
    ids=["text is one document", "jsonl", "the only column of strings"],
)
def test_documents(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8"))
    assert list(texts.documents(str(tmp_path / name))) == expected


@pytest.mark.parametrize(("suffix", "packer"), [(".gz", gzip), (".xz", lzma)])
def test_packed_documents(tmp_path: Path, suffix: str, packer: Any) -> None:
    """Read as the file inside them; one that is cut off or damaged is refused."""
    rows = tmp_path / f"a.jsonl{suffix}"
    rows.write_bytes(packer.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert list(texts.documents(str(rows))) == ["one", "two"]
    text = tmp_path / f"A.TXT{suffix.upper()}"
    text.write_bytes(packer.compress(b"one\r\ntwo\n"))
    assert list(texts.documents(str(text))) == ["one\ntwo\n"]
    whole = rows.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"plain", whole[:-8] + bytes(8)):
        rows.write_bytes(damaged)
        with pytest.raises(ConfigError, match="cannot be unpacked"):
            list(texts.documents(str(rows)))


def test_parquet_documents(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": [1, 2], "text": ["one", "two"], "title": ["x", "y"]})
    assert list(texts.documents(str(path))) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text in its 0 characters"),
        ("a.txt", b" \n\t\n", "holds no text in its 4 characters"),
        ("a.txt", b"abc\xff", "not UTF-8 text: byte 0xff at offset 3"),
        ("a.txt", b"ab\0c", "zero byte at character 2"),
        ("a.pdf", b"text", r"ends in \.pdf, and the kinds that can be read are \.txt"),
        ("a", b"text", "ends in nothing"),
        ("a.gz", b"text", "ends in nothing"),
        ("a.jsonl", b"\n", "has no rows"),
        ("a.jsonl", b"[1]\n", "line 1, holds a JSON list and not an object"),
        ("a.jsonl", b"{'text'}\n", "line 1, is not a JSON object on one line"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1, is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2, cannot be used: column `text` is missing"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "column `text` is of type int and not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair"),
        ("a.jsonl", b'{"a": "x", "b": "y"}\n', "no column `text` of strings .* which of its columns a, b is meant"),
        ("a.jsonl", b'{"a": 1}\n', "which of its columns a is meant"),
        ("a.jsonl", b'{"text": ["a"]}\n', "line 1, cannot be used: column `text` is of type list and not a string"),
        ("a.jsonl", b"[" * 100_000, "line 1, is not a JSON object on one line"),
        ("a.jsonl", b'{"text": 1' + b"0" * 5000 + b"}", "line 1, is not a JSON object on one line"),
        ("a.parquet", b"PAR0", "is not a Parquet file that can be read"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(texts.documents(str(tmp_path / name)))


def test_parquet_whose_text_is_not_utf8(tmp_path: Path) -> None:
    """Arrow hands out strings unchecked: the decoding error comes with the row, not with the file."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    text = arrow.Array.from_buffers(
        arrow.string(), 1, [None, arrow.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00"), arrow.py_buffer(b"a\xa0")]
    )
    parquet.write_table(arrow.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="is not a Parquet file that can be read .*utf-8"):
        list(texts.documents(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("purpose", [texts.CALIBRATION, texts.EVALUATION], ids=lambda p: p.name)
def test_errors_name_the_flag_that_was_passed(tmp_path: Path, purpose: texts.Purpose) -> None:
    """What is wrong with evaluation data is never blamed on --calib, nor the other way round."""
    other = {"calibration": "--data", "evaluation": "--calib"}[purpose.name]
    cases = {"a.txt": b"", "b.jsonl": b"\n", "c.jsonl": b"{}", "d.pdf": b"x", "e.parquet": b"PAR1", "f.txt": b"\xff"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for spec in [str(tmp_path / name) for name in (*cases, "nowhere.txt")] + ["hf:", "hf:a/b"]:
        with pytest.raises(ConfigError) as caught:
            list(texts.documents(spec, purpose=purpose))
        assert purpose.name in str(caught.value) and other not in str(caught.value), spec


def test_only_a_line_feed_ends_a_row(tmp_path: Path) -> None:
    """JSON strings may hold every one of these unescaped; Python's splitlines ends a line at each."""
    ends = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    rows = [f"one{end}two" for end in ends if end >= " "] + ["one\rtwo"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\r\n".join(json.dumps({"text": row}, ensure_ascii=False).encode() for row in rows))
    assert list(texts.documents(str(path))) == rows


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens there: said at once, and not after twenty tries with five seconds between two."""
    pytest.importorskip("datasets")
    code = (
        "from compress import texts\nimport time\nstart = time.monotonic()\n"
        "try:\n    list(texts.documents('hf:some/set', purpose=texts.EVALUATION))\n"
        "except texts.ConfigError as error:\n    print(time.monotonic() - start, error)\n"
    )
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    seconds, said = seen.stdout.split(" ", 1)
    assert float(seconds) < 30, "libraries alone take some seconds to import"
    assert "evaluation set hf:some/set could not be read" in said and "--data" in said


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.txt does not exist; pass --calib FILE\.txt"):
        texts.documents(str(tmp_path / "nowhere.txt"))
    with pytest.raises(ConfigError, match="is a folder"):
        texts.documents(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match="is not a file"):
        texts.documents(str(tmp_path / "pipe.txt"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", None]}, "row 2, cannot be used: column `text` is of type NoneType"),
        ({"a": ["x"], "b": ["y"]}, "which of its columns a, b is meant"),
    ],
    ids=["null", "columns"],
)
def test_unusable_parquet_is_refused(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(ConfigError, match=message):
        list(texts.documents(str(path)))


def test_missing_libraries_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for module in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)  # None makes the import fail
    for spec in (str(tmp_path / "a.parquet"), "hf:some/set"):
        with pytest.raises(ConfigError, match=r"which is not installed; .*compress-toolkit\[datasets\]"):
            list(texts.documents(spec))


def test_hub_documents_from_a_local_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{"text": "one", "title": "x"}, {"text": "two", "title": "y"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert list(texts.documents(f"hf:{tmp_path}")) == ["one", "two"]
    assert list(texts.documents(f"hf:{tmp_path}:train:title")) == ["x", "y"]
    with pytest.raises(ConfigError, match="column `body` is missing"):
        list(texts.documents(f"hf:{tmp_path}:train:body"))


@pytest.mark.parametrize("spec", ["hf:", "hf:a:b:c:d"], ids=["no name", "too many parts"])
def test_malformed_hub_name_is_refused(spec: str) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match=r"is not hf:DATASET"):
        list(texts.documents(spec))


def test_hashes_follow_content(tmp_path: Path) -> None:
    assert texts.text_sha256(["ab"]) != texts.text_sha256(["a", "b"])
    # sha256 of "abc" as published in FIPS 180-4's examples
    assert texts.text_sha256(["abc"]).startswith("ba7816bf8f01cfea")
    (tmp_path / "a.txt").write_bytes(b"abc")
    assert texts.source_sha256(str(tmp_path / "a.txt")) == texts.text_sha256(["abc"])
    assert texts.source_sha256("hf:some/set") is texts.source_sha256(str(tmp_path)) is None
