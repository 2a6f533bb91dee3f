"""Which files are a folder's weights: what transformers loads where that is beyond doubt, refused where it is not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, CompressError, UnsupportedError
from compress.model import StreamedModel
from compress.weights import INDEX, SINGLE

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def split(tensors: dict[str, Tensor]) -> dict[str, str]:
    """An index's weight_map for `tensors` in two shards."""
    names = sorted(tensors)
    return {name: A if i < len(names) // 2 else B for i, name in enumerate(names)}


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    where = split(tensors)
    for file in (A, B):
        save({k: v for k, v in tensors.items() if where[k] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


@pytest.fixture
def folder(build_model: Any) -> Path:
    return Path(build_model(tie_word_embeddings=True))


@torch.no_grad()
def logits(folder: Path, ids: Tensor) -> Tensor:
    """What the streamed model computes."""
    model = StreamedModel.open(folder)
    hidden = model.embed(ids)
    for i in range(model.num_blocks):
        model.load_block(i)
        hidden = model.run_block(i, hidden)
        model.release_block(i)
    return model.head(hidden)


@torch.no_grad()
def assert_as_transformers(folder: Path) -> None:
    ids = torch.randint(0, 4096, (2, 12), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(folder, ids), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_a_tied_matrix_stored_as_the_output_only(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save(tensors, folder / SINGLE)
    assert_as_transformers(folder)


def test_two_matrices_that_the_config_ties(folder: Path) -> None:
    """transformers does not tie what is stored twice and differs."""
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save(tensors, folder / SINGLE)
    assert_as_transformers(folder)


@pytest.mark.parametrize("differs", [False, True])
def test_a_tensor_in_two_shards(folder: Path, differs: bool) -> None:
    tensors = load_file(folder / SINGLE)
    where = write_shards(folder, tensors)
    (folder / SINGLE).unlink()
    name = min(where)
    second = load_file(folder / B)
    save({**second, name: tensors[name] + differs}, folder / B)
    if differs:
        with pytest.raises(ArtifactError, match=f"tensor {name} is in {A} and, differing, in {B}"):
            Checkpoint.open(folder)
    else:
        assert Checkpoint.open(folder).info(name).file == A
        assert_as_transformers(folder)


def test_a_tensor_that_the_index_forgot(folder: Path) -> None:
    where = write_shards(folder, load_file(folder / SINGLE))
    (folder / SINGLE).unlink()
    where.pop("model.norm.weight")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_as_transformers(folder)


def test_the_index_of_shards_that_are_gone(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": split(load_file(folder / SINGLE))}))
    assert_as_transformers(folder)


def test_an_index_of_the_one_file(folder: Path) -> None:
    names = load_file(folder / SINGLE)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, SINGLE)}))
    assert_as_transformers(folder)


@pytest.mark.parametrize("metadata", [{"metadata": 1}, {}], ids=["number", "none"])
def test_an_index_without_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """transformers writes into it while it loads."""
    (folder / INDEX).write_text(json.dumps({**metadata, "weight_map": split(load_file(folder / SINGLE))}))
    (folder / SINGLE).unlink()
    with pytest.raises(ArtifactError, match="has no metadata that is a JSON object"):
        Checkpoint.open(folder)


def test_two_sets_of_weights(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    write_shards(folder, tensors)
    assert_as_transformers(folder)  # equal, byte for byte
    name = "model.layers.1.mlp.down_proj.weight"
    write_shards(folder, {**tensors, name: torch.zeros_like(tensors[name])})
    with pytest.raises(ArtifactError, match=f"two sets of weights.*they differ in {name}"):
        Checkpoint.open(folder)
    write_shards(folder, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ArtifactError, match=f"two sets of weights.*they differ in {name}"):
        Checkpoint.open(folder)
    (folder / B).unlink()
    with pytest.raises(ArtifactError, match=f"two sets of weights.*of those {B} is missing"):
        Checkpoint.open(folder)


def test_a_file_that_the_config_names(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    with pytest.raises(UnsupportedError, match="weights are in 'other.safetensors'"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"adapter_config.json": '{"base_model_name_or_path": "org/base"}'},
            "is a LoRA adapter.*pass org/base with --adapter",
        ),
        ({"adapter_config.json": "{}", SINGLE: "", "config.json": "{}"}, "and beside it a LoRA adapter"),
        ({"m.Q4_K_M.gguf": ""}, "holds m.Q4_K_M.gguf, llama.cpp's own format"),
        ({"m.gguf": "", "config.json": "{}"}, "holds m.gguf, llama.cpp's own format"),
        ({"model_index.json": "{}"}, "is a diffusers pipeline"),
        ({"pytorch_model.bin": "", "config.json": "{}"}, "pytorch_model.bin, a pickle that could run code"),
        ({"params.json": "{}", "consolidated.00.pth": ""}, "publisher's own layout"),
        ({"model.onnx": "", "config.json": "{}"}, "holds model.onnx, a graph for a device"),
        ({"config.json": "{}"}, f"no safetensors weights; expected {SINGLE}"),
        ({}, "config.json: no such file"),
    ],
    ids=[
        "adapter",
        "adapter beside",
        "gguf",
        "gguf with config",
        "diffusers",
        "pickle",
        "own",
        "onnx",
        "bare",
        "empty",
    ],
)
def test_a_folder_of_another_kind_is_named(tmp_path: Path, files: dict[str, str], says: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CompressError, match=says):
        Checkpoint.open(tmp_path)
