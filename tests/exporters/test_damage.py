"""What an export refuses: files that are not those that were published, and folders whose config their tensors deny."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.artifact import MANIFEST, Manifest, names_in, write_manifest
from compress.errors import ArtifactError, CompressError
from compress.files import file_sha256
from compress.workspace import resolve
from exporters.export import ExportOutcome, ExportRequest, export
from exporters.sizing.targets import TARGETS

LAYER = "model.layers.1.mlp.down_proj"


def run(artifact: Path, out: Path) -> ExportOutcome:
    request = ExportRequest(source=resolve(str(artifact)), target=TARGETS["a100"], format="hf", out=out, context=128)
    return export(request)


@pytest.fixture
def folder(awq_folder: Callable[..., Path]) -> Path:
    """A quantized folder of somebody else's: it has no manifest."""
    return awq_folder()


@pytest.fixture
def artifact(folder: Path) -> Path:
    record = {"stage": "awq", "parent": {"path": "../original", "sha256": "00"}, "options": {}}
    write_manifest(folder, Manifest(lineage=[record], reports=[]))
    return folder


def test_any_damaged_file_of_an_artifact_is_named_before_any_work(artifact: Path, tmp_path: Path) -> None:
    for name in [*names_in(artifact), MANIFEST]:
        path = artifact / name
        whole = path.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[position] ^= 4
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError) as error:
                run(artifact, tmp_path / "out")
            assert name in str(error.value) and "\n" not in str(error.value)
            assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
        path.write_bytes(whole)
    assert run(artifact, tmp_path / "out").record["written"]["verified"]


def test_a_copy_is_compared_and_a_link_is_what_was_read(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives back other bytes than were written to it, in the weights' copy and in a small file's."""
    from exporters.hf import write as hf

    link = hf._link

    def faulty(source: Path, target: Path) -> None:
        shutil.copyfile(source, target)
        with open(target, "rb+") as f:
            f.seek(-1, os.SEEK_END)
            f.write(b"\x77")

    monkeypatch.setattr(hf, "_link", faulty)
    with pytest.raises(ArtifactError, match="model.safetensors differs from the artifact's"):
        run(artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(hf, "_link", link)
    made = run(artifact, tmp_path / "out")
    assert (made.out / "model.safetensors").samefile(artifact / "model.safetensors")
    assert made.record["files"]["model.safetensors"] == file_sha256(artifact / "model.safetensors")


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


def set_scale(value: float) -> Change:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[f"{LAYER}.scales"][0, 5] = value

    return change


def drop(name: str) -> Change:
    return lambda tensors, config: tensors.pop(name)


def state(**changes: Any) -> Change:
    return lambda tensors, config: config["quantization_config"].update(changes)


def swapped(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    a, b = f"{LAYER}.qweight", "model.layers.1.mlp.up_proj.qweight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


DENIED: dict[str, Change] = {
    "a scale of zero": set_scale(0.0),
    "a negative scale": set_scale(-1e-3),
    "an infinite scale": set_scale(float("inf")),
    "a scale that is no number": set_scale(float("nan")),
    "bits 8": state(bits=8),
    "bits 3": state(bits=3),
    "bits 2": state(bits=2),
    "bits as text": state(bits="4"),
    "group_size 64": state(group_size=64),
    "group_size 256": state(group_size=256),
    "group_size 0": state(group_size=0),
    "group_size -1": state(group_size=-1),
    "quant_method gptq": state(quant_method="gptq"),
    "quant_method compressed-tensors": state(quant_method="compressed-tensors"),
    "quant_method none": state(quant_method=None),
    "version gemv": state(version="gemv"),
    "no quantization_config": lambda tensors, config: config.pop("quantization_config"),
    "a missing norm": drop("model.norm.weight"),
    "a missing embedding": drop("model.embed_tokens.weight"),
    "a missing head": drop("lm_head.weight"),
    "missing codes": drop(f"{LAYER}.qweight"),
    "missing scales": drop(f"{LAYER}.scales"),
    "missing zero points": drop(f"{LAYER}.qzeros"),
    "a missing norm in a block": drop("model.layers.0.input_layernorm.weight"),
    "an infinite norm": lambda tensors, config: tensors["model.norm.weight"].fill_(float("inf")),
    "one block more": lambda tensors, config: config.update(num_hidden_layers=3),
    "one block less": lambda tensors, config: config.update(num_hidden_layers=1),
    "another width": lambda tensors, config: config.update(hidden_size=128),
    "another vocabulary": lambda tensors, config: config.update(vocab_size=4000),
    "codes of another layer": swapped,
    "a layer that is dense as well": lambda tensors, config: tensors.update({f"{LAYER}.weight": torch.zeros(256, 384)}),
}


@pytest.mark.parametrize("name", DENIED)
def test_what_the_tensors_deny_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    """Of a folder without a manifest, whose content nothing else vouches for."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    DENIED[name](tensors, config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError) as error:
        run(folder, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_folder_itself_is_exported(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out")
