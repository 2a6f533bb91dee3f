"""Kernel times go into a build's folder and come back, also over those of an earlier build."""

from __future__ import annotations

from pathlib import Path

from exporters.engine.timings import TIMING, keep, kept_file, lend


def test_times_come_back(tmp_path: Path) -> None:
    kept = kept_file("8.7", {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert kept.name == "tensorrt-sm8.7.timing"
    folder = tmp_path / "build"
    folder.mkdir()
    lend(folder, kept)
    assert not (folder / TIMING).exists(), "nothing was kept yet"
    for content in (b"first", b"second"):
        (folder / TIMING).write_bytes(content)
        assert keep(folder, kept) is None and kept.read_bytes() == content
    (folder / TIMING).unlink()
    lend(folder, kept)
    assert (folder / TIMING).read_bytes() == b"second"


def test_a_cache_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / TIMING).write_bytes(b"times")
    said = keep(tmp_path, kept_file("8.0", {"XDG_CACHE_HOME": str(tmp_path / "file")}))
    assert said is not None and "were not kept" in said
