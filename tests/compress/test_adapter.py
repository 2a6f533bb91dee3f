"""LoRA adapters merged into their models: against float64 by hand, against peft where it is, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.adapter import merged, read_adapter
from compress.artifact import read_manifest
from compress.cli.main import main
from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.tell import SILENT, Heard
from compress.workspace import resolve

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": "base"}
MODULES = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 128)}


def save_adapter(folder: Path, modules: dict[str, tuple[int, int]], rank: int = 4, **config: Any) -> dict[str, Tensor]:
    """As peft saves one; its matrices by name."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (rows, columns) in modules.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_merged_and_what_is_not(dtype: str, build_model: Any, tmp_path: Path) -> None:
    source = resolve(str(build_model(dtype=dtype)))
    halves = save_adapter(tmp_path / "lora", MODULES, alpha_pattern={"down_proj": 2}, use_rslora=True)
    heard = Heard()
    made = merged(source, tmp_path / "lora", tmp_path / "artifacts", trust_remote_code=False, tell=heard)
    assert made.path == tmp_path / "artifacts" / "model-lora" and "2 matrices" in heard.said[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (source.path, made.path))
    assert list(before) == list(after)
    for name, value in before.items():
        module = name.removesuffix(".weight")
        if module in MODULES:
            a, b = (halves[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB")
            scale = {"q_proj": 8, "down_proj": 2}[module.rpartition(".")[2]] / 2  # over the root of the rank
            wanted = (value.double() + scale * b @ a).to(value.dtype)
            step = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
            torch.testing.assert_close(after[name], wanted, rtol=step, atol=step / 10)
            assert float((after[name].float() - value.float()).abs().max()) > 0.01
        else:
            assert torch.equal(value, after[name])
    assert (made.path / "tokenizer.json").read_bytes() == (source.path / "tokenizer.json").read_bytes()
    manifest = read_manifest(made.path)
    assert manifest is not None and manifest.record["stage"] == "merge"
    assert manifest.record["adapter"] == {"path": "../../lora", "modules": sorted(MODULES)}
    merged(source, tmp_path / "lora", tmp_path / "artifacts", trust_remote_code=False, tell=heard)
    assert "is used as it is" in heard.said[-1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_as_peft_merges_it(dtype: str, build_model: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    from transformers import AutoModelForCausalLM

    folder = build_model(dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], rank_pattern={"up_proj": 2},
        alpha_pattern={"layers.1.self_attn.v_proj": 3}, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    adapted.save_pretrained(tmp_path / "lora")
    made = merged(resolve(str(folder)), tmp_path / "lora", tmp_path / "artifacts", trust_remote_code=False)
    theirs = adapted.merge_and_unload().state_dict()
    ours = load_file(made.path / "model.safetensors")
    assert ours.keys() <= theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7)


def test_the_command_line_quantizes_what_was_merged(
    build_model: Any, tmp_path: Path, calib_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And judges it against the merged model, not the base."""
    monkeypatch.chdir(tmp_path)
    build_model()
    save_adapter(tmp_path / "lora", MODULES)
    args = ["--calib", str(calib_text), "--samples", "2", "--seq-len", "64", "--effort", "fast", "--group-size", "32"]
    done = CliRunner().invoke(main, ["awq", "model", "--adapter", "lora", *args])
    assert done.exit_code == 0, done.output
    manifest = read_manifest(Path("artifacts/model-lora-awq-w4g32"))
    assert manifest is not None and [record["stage"] for record in manifest.lineage] == ["awq", "merge"]
    assert manifest.root["path"] == "../model-lora" == manifest.record["parent"]["path"]
    refused = CliRunner().invoke(main, ["awq", "lora", *args])
    assert refused.exit_code == 1 and "with --adapter lora" in refused.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not merged, only LORA is"),
        ({"use_dora": True}, "use_dora=true is not merged"),
        ({"bias": "all"}, 'bias="all" is not merged'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa"}, "changed the base model when training began"),
    ],
)
def test_more_than_lora_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_adapter(tmp_path / "lora", MODULES, **change)
    with pytest.raises(UnsupportedError) as refused:
        read_adapter(tmp_path / "lora")
    assert said in str(refused.value) and "merge_and_unload" in str(refused.value)


def test_adapters_of_other_models(build_model: Any, tmp_path: Path) -> None:
    source = resolve(str(build_model(tie_word_embeddings=True)))
    wrong: list[tuple[dict[str, tuple[int, int]], str]] = [
        ({"model.layers.7.self_attn.q_proj": (64, 64)}, "model.layers.7.self_attn.q_proj is no linear of"),
        ({"model.layers.0.self_attn.q_proj": (32, 64)}, "q_proj is (32, 64) there and (64, 64) in"),
        ({"lm_head": (4096, 64)}, "lm_head shares model.embed_tokens.weight with another part"),
    ]
    for number, (modules, said) in enumerate(wrong):
        save_adapter(tmp_path / f"lora{number}", modules)
        with pytest.raises((ConfigError, UnsupportedError)) as refused:
            merged(source, tmp_path / f"lora{number}", tmp_path / "artifacts", trust_remote_code=False, tell=SILENT)
        assert said in str(refused.value)
    assert not (tmp_path / "artifacts").exists()


def test_damaged_adapters(tmp_path: Path) -> None:
    tensors = save_adapter(tmp_path / "lora", MODULES)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    name = next(iter(tensors))
    for changed, said in (
        ({**tensors, name: torch.full_like(tensors[name], torch.nan)}, "holds NaN or infinite values"),
        ({k: v for k, v in tensors.items() if k != name}, "has no lora_A and lora_B of one rank"),
        ({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, "is not a LoRA matrix of a linear"),
    ):
        save_file(changed, path)
        with pytest.raises((ArtifactError, UnsupportedError), match=said):
            read_adapter(tmp_path / "lora")
    path.unlink()
    with pytest.raises(ArtifactError, match="adapter_model.safetensors is not there"):
        read_adapter(tmp_path / "lora")


def test_a_revision_is_the_hubs(build_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the local cache, as the hub's library lays it out; and refused for a folder."""
    import shutil

    from huggingface_hub import constants

    home = tmp_path / "hub" / "models--org--name"
    for commit, width in (("a" * 40, 64), ("b" * 40, 32)):
        shutil.copytree(build_model(name=commit, intermediate_size=width), home / "snapshots" / commit)
    (home / "refs").mkdir()
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (home / "refs" / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert resolve("org/name").path.name == "a" * 40
    found = resolve("org/name", revision="v2")
    assert found.path.name == "b" * 40 and found.said == "org/name at v2 from the hub"
    with pytest.raises(ArtifactError, match="did not give it at revision v3"):
        resolve("org/name", revision="v3")
    with pytest.raises(ConfigError, match="--revision v2 is about a model of the hub"):
        resolve(str(found.path), revision="v2")
