"""Damaged folders: each is named in one sentence, and nothing is unpickled."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint import INDEX, Checkpoint
from compress.errors import ArtifactError
from compress.files import file_sha256
from compress.shards import link_shards, merge_shards, save_atomically, save_in_parts, tensor_sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with an index."""
    path = tmp_path / "sharded"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"a": torch.arange(6.0).reshape(2, 3)}, path / "one.safetensors")
    save_file({"b": torch.ones(4, dtype=torch.float16)}, path / "two.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (path / INDEX).write_text(json.dumps(index))
    return path


def reindex(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_reads_shards_and_rows(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.names() == ["a", "b"]
    assert torch.equal(checkpoint.tensor("a"), torch.arange(6.0).reshape(2, 3))
    assert torch.equal(checkpoint.rows("a", torch.tensor([1])), torch.tensor([[3.0, 4.0, 5.0]]))
    assert checkpoint.info("b").num_bytes == 8
    assert checkpoint.content_sha256() == Checkpoint.open(folder).content_sha256()


def test_content_hash_sees_one_bit(folder: Path) -> None:
    before = Checkpoint.open(folder).content_sha256()
    data = bytearray((folder / "two.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "two.safetensors").write_bytes(data)
    assert Checkpoint.open(folder).content_sha256() != before


@pytest.mark.parametrize("keep", [0, 4, 30, -3], ids=["empty", "no length", "half a header", "tail missing"])
def test_truncated_shard(folder: Path, keep: int) -> None:
    data = (folder / "one.safetensors").read_bytes()
    (folder / "one.safetensors").write_bytes(data[:keep])
    with pytest.raises(ArtifactError, match="one.safetensors: truncated or corrupt"):
        Checkpoint.open(folder)


def test_garbage_shard(folder: Path) -> None:
    (folder / "one.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!")
    with pytest.raises(ArtifactError, match="truncated or corrupt"):
        Checkpoint.open(folder)


def test_missing_shard(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    with pytest.raises(ArtifactError, match="two.safetensors: no such file, though the index names it"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", 3])
def test_index_that_points_outside(folder: Path, file: Any) -> None:
    reindex(folder, {"a": file})
    with pytest.raises(ArtifactError, match="not a file of this folder"):
        Checkpoint.open(folder)


def test_index_that_lies(folder: Path) -> None:
    reindex(folder, {"a": "two.safetensors", "b": "two.safetensors"})
    with pytest.raises(ArtifactError, match="tensor a is not in two.safetensors"):
        Checkpoint.open(folder)


def test_missing_tensor_config_and_weights(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="tensor c is missing"):
        Checkpoint.open(folder).tensor("c")
    (folder / "config.json").write_text("{broken")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match="config.json: no such file"):
        Checkpoint.open(folder)
    with pytest.raises(ArtifactError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ArtifactError, match="pytorch_model.bin, a pickle that could run code"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("limit", [10**9, 30], ids=["one shard", "several"])
def test_merge_keeps_every_byte(tmp_path: Path, limit: int) -> None:
    tensors = {
        f"t{i}": torch.randn(3, i + 1).to(d) for i, d in enumerate((torch.float32, torch.float16, torch.bfloat16))
    }
    parts = []
    for name, value in tensors.items():
        parts.append(tmp_path / f"{name}.safetensors")
        save_atomically(parts[-1], {name: value})
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    weight_map = merge_shards(parts, out, max_shard_bytes=limit)
    assert set(weight_map) == set(tensors)
    for file in set(weight_map.values()):
        for name, value in load_file(out / file).items():
            assert value.dtype == tensors[name].dtype and torch.equal(value, tensors[name])
    assert Checkpoint.open(out).names() == sorted(tensors)


def test_parts_and_slices_are_the_whole(tmp_path: Path) -> None:
    """A tensor saved in parts is the file that safetensors reads, its hashes are of what is there, and any rows come
    back; so do several tensors at once."""
    value = torch.randn(37, 5).to(torch.bfloat16)
    path = tmp_path / "model.safetensors"
    file_hash, content_hash = save_in_parts(path, "w", torch.bfloat16, (37, 5), value.split(10))
    assert torch.equal(load_file(path)["w"], value)
    assert file_hash == file_sha256(path) and content_hash == tensor_sha256(value)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.slice("w", 3, 20), value[3:20])
    assert torch.equal(checkpoint.rows("w", torch.tensor([0, 5, 36])), value[[0, 5, 36]])
    assert torch.equal(checkpoint.read_pinned(["w"])["w"], value)


def test_linked_shards_hold_every_tensor(tmp_path: Path) -> None:
    parts = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_atomically(parts[0], {"x": torch.ones(3), "y": torch.zeros(2, 2)})
    save_atomically(parts[1], {"z": torch.arange(5)})
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert link_shards(parts, out)["z"] == "model-00002-of-00002.safetensors"
    for part in parts:  # what was linked stays when the working folder goes
        part.unlink()
    checkpoint = Checkpoint.open(out)
    assert checkpoint.names() == ["x", "y", "z"] and torch.equal(checkpoint.tensor("z"), torch.arange(5))
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == 12 + 16 + 40
