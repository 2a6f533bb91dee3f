"""A finished block is believed only as this run wrote it; anything else is done again, and nothing is removed."""

from pathlib import Path

import pytest

from compress.files import file_sha256
from compress.journal import SharedStore, read_record, write_record

RUN = "ab" * 32


def kept(folder: Path, name: str, run: str = RUN) -> tuple[Path, Path]:
    tensors, record = folder / f"{name}.safetensors", folder / f"{name}.json"
    tensors.write_bytes(f"the weights of {name}".encode() * 9)
    write_record(
        record, run, {"index": name, "sha256": file_sha256(tensors), "meant": {"a": "00"}, "report": {"x": 0.1}}
    )
    return record, tensors


def test_what_was_kept_is_read(tmp_path: Path) -> None:
    record, tensors = kept(tmp_path, "b")
    found = read_record(record, RUN, tensors)
    assert found is not None and found["index"] == "b" and found["report"] == {"x": 0.1}
    assert read_record(record, RUN) == found


def test_any_flipped_bit_of_a_record_or_its_tensors_is_noticed(tmp_path: Path) -> None:
    record, tensors = kept(tmp_path, "b")
    noticed = 0
    for path in (record, tensors):
        whole = path.read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            found = read_record(record, RUN, tensors)
            if found is None:
                noticed += 1
            else:  # white space between two words of JSON: what is read is what was written
                assert path == record and found["report"] == {"x": 0.1} and found["meant"] == {"a": "00"}
            assert path.exists()
        path.write_bytes(whole)
    assert noticed > 300 and read_record(record, RUN, tensors) is not None


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"run": NaN}', b"[" * 50_000, b"\xff\xfe"])
def test_a_record_that_is_none_is_no_record(tmp_path: Path, content: bytes) -> None:
    record, tensors = kept(tmp_path, "b")
    record.write_bytes(content)
    assert read_record(record, RUN, tensors) is None and record.read_bytes() == content


def test_another_runs_block_and_another_blocks_tensors_are_not_taken(tmp_path: Path) -> None:
    record, tensors = kept(tmp_path, "b")
    _, others = kept(tmp_path, "c")
    assert read_record(record, "cd" * 32, tensors) is None
    assert read_record(record, RUN, others) is None
    tensors.unlink()
    assert read_record(record, RUN, tensors) is None and record.exists()


def test_a_process_without_a_journal_finds_and_keeps_nothing() -> None:
    assert SharedStore(None).load(0) is None
