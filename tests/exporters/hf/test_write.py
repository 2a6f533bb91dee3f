"""Format `hf` and what goes with it: the ModelOpt folder, the launch files, vLLM's rules."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, UnsupportedError
from compress.files import read_json
from compress.formats import stored
from compress.quantize.awq_stage import AwqRequest, quantize_awq
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme
from compress.workspace import resolve
from exporters.hf import modelopt, serve, vllm_rules
from exporters.hf import write as hf
from exporters.reader import Job, Written
from exporters.sizing.targets import TARGETS


@pytest.fixture
def make(build_model: Any, calib_text: Path, tmp_path: Path) -> Any:
    def artifact(family: str = "Llama", skip: tuple[str, ...] = (), **scheme: Any) -> Path:
        drop = ("head_dim",) if family == "Qwen2" else ()
        request = AwqRequest(
            source=resolve(str(build_model(family, drop=drop))), out=tmp_path / "artifact",
            scheme=Scheme(group_size=32, **scheme), calib=str(calib_text), samples=2, seq_len=64, skip=skip,
        )  # fmt: skip
        return quantize_awq(request).out

    return artifact


def write(artifact: Path, tmp_path: Path, target: str = "a100", **options: Any) -> tuple[Path, Written]:
    staged = tmp_path / "staged"
    staged.mkdir(parents=True)
    job = Job(artifact=artifact, target=TARGETS[target], context=192, batch=3, staged=staged, options=options)
    return staged, hf.write(job)


# ---- ModelOpt ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 8), groups=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_modelopt_layout_against_a_nibble_at_a_time(rows: int, groups: int, seed: int) -> None:
    """The packing, and the value that a reader computes, against loops written from the description."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * rows, groups * 8)
    q = QuantizedWeight(
        codes_OI=torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8),
        scale_OG=torch.rand(2 * rows, groups, generator=generator).half() + 0.01,
        zero_point_OG=torch.full((2 * rows, groups), 8, dtype=torch.uint8),
        scheme=Scheme(group_size=8, symmetric=True),
    )
    parts = modelopt.tensors(q)
    assert parts["weight"].dtype == torch.uint8 and tuple(parts["weight"].shape) == (rows, groups * 8)
    for row in range(shape[0]):
        for column in range(shape[1]):
            byte = int(parts["weight"][row // 2, column])
            nibble = byte >> 4 if row % 2 else byte & 15
            signed = nibble - 16 if nibble > 7 else nibble
            assert signed == int(q.codes_OI[row, column]) - 8
            value = signed * float(parts["weight_scale"][row, column // 8])
            assert value == pytest.approx(float(q.dequantize()[row, column]), rel=1e-6)
    assert torch.equal(modelopt.dequantize(parts), q.dequantize())


def test_modelopt_folder(make: Any, tmp_path: Path) -> None:
    artifact = make(symmetric=True, skip=("layers.1.mlp.down_proj",))
    staged, written = write(artifact, tmp_path)
    assert written.record["modelopt_layers"] == 13
    folder = staged / "modelopt"
    # never beside the AutoAWQ tensors: readers believe it before config.json
    assert not (staged / "hf_quant_config.json").exists()
    assert "quantization_config" not in read_json(folder / "config.json")
    quantization = read_json(folder / "hf_quant_config.json")["quantization"]
    assert quantization["quant_algo"] == "W4A16_AWQ" and quantization["group_size"] == 32
    assert quantization["exclude_modules"] == ["lm_head", "model.layers.1.mlp.down_proj"]
    made = Checkpoint.open(folder)
    q_proj = made.info("model.layers.0.self_attn.q_proj.weight")
    assert (q_proj.dtype, q_proj.shape) == ("U8", (32, 64))
    assert made.info("model.layers.0.self_attn.q_proj.pre_quant_scale").shape == (64,)
    assert made.info("model.layers.1.mlp.down_proj.weight").dtype == "F16"
    assert not [n for n in made.names() if "qweight" in n]
    assert (folder / "tokenizer.json").exists() and not list(folder.glob(".*"))
    assert any("second copy" in note for note in written.notes)


def test_modelopt_is_left_out_with_a_reason(make: Any, tmp_path: Path) -> None:
    staged, written = write(make(), tmp_path)
    assert not (staged / "modelopt").exists()
    assert any("no zero points, and these codes have them" in note for note in written.notes)


def test_modelopt_can_be_declined(make: Any, tmp_path: Path) -> None:
    staged, written = write(make(symmetric=True), tmp_path, modelopt=False)
    assert not (staged / "modelopt").exists() and not any("ModelOpt" in note for note in written.notes)


def test_damage_is_found(make: Any, tmp_path: Path) -> None:
    artifact = make(symmetric=True)
    path = artifact / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match="model.safetensors is not what was published"):
        write(artifact, tmp_path / "signed")
    (artifact / "compress.json").unlink()  # a folder that nobody signed: its numbers must tell
    with pytest.raises(ArtifactError, match="model.norm.weight has NaN"):
        write(artifact, tmp_path / "unsigned")


def test_a_copy_that_differs_is_found(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that returns other bytes than were written, which no test can make, is stood in for by the copy."""

    def link(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:-1] + b"\x55")

    monkeypatch.setattr(hf, "_link", link)
    with pytest.raises(ArtifactError, match="differs from the artifact's"):
        write(make(), tmp_path)


# ---- launch files ------------------------------------------------------------------------------------


def test_launch_files_are_filled_in(make: Any, tmp_path: Path) -> None:
    staged, written = write(make(), tmp_path)
    names = {p.relative_to(staged / "serve").as_posix() for p in (staged / "serve").rglob("*") if p.is_file()}
    assert names == set(written.record["serve"])
    arguments = json.loads((staged / "serve/triton/artifact/1/model.json").read_text())
    assert arguments["max_model_len"] == 192 and arguments["max_num_seqs"] == 3
    assert arguments["gpu_memory_utilization"] == 0.9 and arguments["dtype"] == "float16"
    kserve = yaml.safe_load((staged / "serve/kserve.yaml").read_text())
    model = kserve["spec"]["predictor"]["model"]
    assert kserve["kind"] == "InferenceService" and model["modelFormat"] == {"name": "huggingface"}
    assert model["resources"]["limits"]["nvidia.com/gpu"] == "1"
    deployment, service = yaml.safe_load_all((staged / "serve/kubernetes.yaml").read_text())
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": 8000}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "--max-model-len=192" in container["args"] and "--enable-chunked-prefill" in container["args"]
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    mounts = {m["name"] for m in container["volumeMounts"]}
    assert mounts == {v["name"] for v in deployment["spec"]["template"]["spec"]["volumes"]}
    assert "&id" not in (staged / "serve/kubernetes.yaml").read_text()


def test_orin_gets_its_own_share_and_a_cpu_no_gpu(make: Any, tmp_path: Path) -> None:
    staged, _ = write(make(), tmp_path, target="orin")
    arguments = json.loads((staged / "serve/triton/artifact/1/model.json").read_text())
    assert arguments["gpu_memory_utilization"] == 0.7
    (tmp_path / "staged").rename(tmp_path / "first")
    staged, _ = write(tmp_path / "artifact", tmp_path, target="cpu")
    assert "nvidia.com/gpu" not in (staged / "serve/kubernetes.yaml").read_text()
    assert "gpu_memory_utilization" not in (staged / "serve/triton/artifact/1/model.json").read_text()


@settings(max_examples=60, deadline=None)
@given(name=st.text(min_size=1, max_size=90), context=st.integers(1, 10**6), batch=st.integers(1, 4096))
def test_launch_files_are_valid_for_any_name(name: str, context: int, batch: int) -> None:
    serving = serve.Serving(
        name=name, context=context, batch=batch, share=0.9, dtype="auto", weight_bytes=10**10, gpu=True
    )
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", serving.label)
    for path, text in serve.files(serving).items():
        if path.endswith(".yaml"):
            for document in yaml.safe_load_all(text):
                assert document["metadata"]["name"] == serving.label
        elif path.endswith(".json"):
            # vLLM refuses fewer batched tokens than sequences
            assert json.loads(text)["max_num_batched_tokens"] >= batch
        else:
            assert text.count("{") == text.count("}") and f'name: "{serving.label}"' in text


# ---- vLLM's rules ------------------------------------------------------------------------------------


def test_shapes_that_marlin_does_not_take_are_noted(make: Any, reference_model: Path, tmp_path: Path) -> None:
    notes = vllm_rules.check(stored(Checkpoint.open(make())))
    assert len(notes) == 1 and re.search(r"\d+ of 14 layers have shapes that Marlin does not take", notes[0])
    request = AwqRequest(
        source=resolve(str(reference_model)), out=tmp_path / "r", scheme=Scheme(), samples=1, seq_len=32, smooth=False
    )
    assert vllm_rules.check(stored(Checkpoint.open(quantize_awq(request).out))) == []
    assert vllm_rules.check(stored(Checkpoint.open(reference_model))) == []


def test_a_part_of_a_fused_layer_left_out_is_refused(make: Any, tmp_path: Path) -> None:
    artifact = make(skip=("q_proj",))
    with pytest.raises(
        UnsupportedError, match=r"k_proj is quantized and .*q_proj is not, but vLLM computes them as one"
    ):
        write(artifact, tmp_path)


def test_whole_fused_layers_may_be_left_out(make: Any, tmp_path: Path) -> None:
    write(make("Qwen2", skip=("q_proj", "k_proj", "v_proj")), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_point": None}, "quantization_config has no zero_point"),
        ({"modules_to_not_convert": ["self_attn"]}, "names 'self_attn', so vLLM would not read the quantized layer"),
    ],
)
def test_folders_that_vllm_would_misread(make: Any, tmp_path: Path, change: Any, message: str) -> None:
    artifact = make()
    config = read_json(artifact / "config.json")
    config["quantization_config"].update(change)
    (artifact / "config.json").write_text(json.dumps(config))
    (artifact / "compress.json").unlink()  # which would tell that the config was changed
    with pytest.raises(ArtifactError, match=message):
        write(artifact, tmp_path)


@pytest.mark.parametrize(
    "name", ["8B-Instruct", "3", "---", "", "Ünïcode", "x" * 80, "1" * 80, "a.b_c", "-lead", "trail-", "[red]"]
)
def test_kubernetes_names_start_with_a_letter(name: str) -> None:
    """A Service is called by RFC 1035: a letter, then letters, digits and hyphens, no hyphen at the end."""
    serving = serve.Serving(name=name, context=1, batch=1, share=0.9, dtype="auto", weight_bytes=1, gpu=True)
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", serving.label)
