"""Whatever happens to a file of an artifact is noticed, and what happens beside them is not taken for damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compress.artifact import MANIFEST, Manifest, names_in, write_manifest
from compress.checkpoint import Checkpoint
from compress.contents import check_files, compare_files, is_read
from compress.errors import ArtifactError

FILES = (
    "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "serve/kserve.yaml",
)  # fmt: skip


def make(folder: Path, seed: int) -> Path:
    """A folder of two shards, a tokenizer, a licence and a file deeper down."""
    generator = torch.Generator().manual_seed(seed)
    (folder / "serve").mkdir(parents=True)
    weight_map = {}
    for number in (1, 2):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({f"w{number}": torch.randn(8, 8, generator=generator)}, folder / name)
        weight_map[f"w{number}"] = name
    index = {"metadata": {"seed": seed}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "serve/kserve.yaml"):
        (folder / name).write_text(json.dumps({"name": name, "seed": seed}))
    record = {"stage": "awq", "parent": {"path": "../m", "sha256": ""}, "options": {"seed": seed}}
    write_manifest(folder, Manifest(lineage=[record], reports=[]))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make(tmp_path / "a", 0)
    assert sorted(names_in(made)) == sorted(FILES)
    return made


def refused(folder: Path) -> str:
    with pytest.raises(ArtifactError) as error:
        check_files(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_folder_is_read_once_and_gives_its_content_hash(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checked = check_files(folder)
    assert checked.note is None and set(checked.hashes) == set(FILES)
    assert checked.content_sha256(checkpoint) == checkpoint.content_sha256()
    small = check_files(folder, below=200)
    assert 0 < len(small.hashes) < len(FILES)
    # what was read before is not read again: a hash that is known is believed
    wrong = {**small.hashes, "config.json": "00"}
    with pytest.raises(ArtifactError, match="config.json is not what was published"):
        check_files(folder, known=wrong)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([*FILES, MANIFEST]), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_noticed(folder: Path, name: str, where: float, bit: int) -> None:
    path = folder / name
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[int(where * len(whole))] ^= 1 << bit
    path.write_bytes(damaged)
    assert name in refused(folder)
    path.write_bytes(whole)
    check_files(folder)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_other_damage_to_any_file_is_noticed(folder: Path, name: str, tmp_path: Path) -> None:
    path, other = folder / name, make(tmp_path / "b", 1)
    whole = path.read_bytes()
    ways: list[Callable[[], object]] = [
        lambda: path.write_bytes(whole[:-1]),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(whole + b"\0"),
        lambda: path.write_bytes(whole[1:] + whole[:1]),
        lambda: shutil.copy(other / name, path),
        lambda: (path.unlink(), path.mkdir()),
        lambda: (path.unlink(), path.symlink_to("nowhere")),
        *([lambda: path.unlink()] if name != MANIFEST else []),
    ]
    for way in ways:
        way()
        refused(folder)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole)
        check_files(folder)


def test_any_two_files_that_change_places_are_noticed(folder: Path) -> None:
    for a in FILES:
        for b in FILES:
            if a < b:
                one, two = (folder / a).read_bytes(), (folder / b).read_bytes()
                (folder / a).write_bytes(two)
                (folder / b).write_bytes(one)
                assert refused(folder)
                (folder / a).write_bytes(one)
                (folder / b).write_bytes(two)


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "tokenizer.model", "model.onnx"])
def test_an_added_file_that_would_be_read_is_noticed(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    assert f"{name} was added since" in refused(folder) and is_read(name)


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", "notes/config.json", "LICENSE.more"])
def test_an_added_file_that_nobody_reads_is_no_damage(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    check_files(folder)
    assert compare_files(folder).added == [name]


def test_an_older_manifest_loads_with_a_note_and_no_manifest_without(folder: Path) -> None:
    value = json.loads((folder / MANIFEST).read_text())
    del value["lineage"][0]["files"], value["sha256"]
    (folder / MANIFEST).write_text(json.dumps(value))
    checkpoint = Checkpoint.open(folder)
    checked = check_files(folder)
    assert checked.note is not None and "of an older version" in checked.note
    assert checked.content_sha256(checkpoint) == checkpoint.content_sha256()
    (folder / MANIFEST).unlink()
    checked = check_files(folder)
    assert checked.note is None and checked.content_sha256(checkpoint) == checkpoint.content_sha256()
