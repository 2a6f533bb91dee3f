"""INT8 artifacts as vLLM folders: what it can compute where, and launch files that hold the cache as was planned."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from compress.checkpoint import Checkpoint
from compress.errors import UnsupportedError
from compress.formats import stored
from compress.quantize.int8_stage import Int8Request, quantize_int8
from compress.workspace import resolve
from exporters.export import ExportRequest, export
from exporters.hf import vllm_int8
from exporters.sizing.targets import TARGETS


@pytest.fixture
def make(build_model: Any, calib_text: Path, tmp_path: Path) -> Any:
    def artifact(**changes: Any) -> Path:
        options = {"calib": str(calib_text), "samples": 2, "seq_len": 64, "effort": "fast", **changes}
        return quantize_int8(Int8Request(source=resolve(str(build_model())), out=tmp_path / "made", **options)).out

    return artifact


def test_an_artifact_is_exported_with_its_cache(make: Any, tmp_path: Path) -> None:
    artifact = make(kv_cache="int8")
    outcome = export(
        ExportRequest(
            source=resolve(str(artifact)), target=TARGETS["a100"], format="hf", out=tmp_path / "out", context=192
        )
    )
    assert outcome.sizing.plan.kv_bits == 8 and outcome.requantized is None
    assert outcome.record["written"]["kv_cache"] == {"dtype": "int8_per_token_head", "vllm": "> 0.25.1"}
    (model,) = (tmp_path / "out/serve").rglob("model.json")
    assert json.loads(model.read_text())["kv_cache_dtype"] == "int8_per_token_head"
    for name in ("kserve.yaml", "kubernetes.yaml"):
        documents = list(yaml.safe_load_all((tmp_path / "out/serve" / name).read_text()))
        assert "--kv-cache-dtype=int8_per_token_head" in json.dumps(documents), name
    assert "v0.32.0" in (tmp_path / "out/serve/kubernetes.yaml").read_text()
    assert any("newer than 0.25.1" in note for note in outcome.notes)


def test_without_it_nothing_of_the_cache_is_said(make: Any, tmp_path: Path) -> None:
    outcome = export(
        ExportRequest(
            source=resolve(str(make())), target=TARGETS["a100"], format="hf", out=tmp_path / "out", context=192
        )
    )
    assert outcome.record["written"]["kv_cache"] is None and outcome.sizing.plan.kv_bits == 16
    assert not any("kv-cache" in p.read_text() for p in (tmp_path / "out/serve").rglob("*") if p.is_file())


def test_blackwell_has_no_int8_kernels_for_inputs_but_takes_weights(make: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"7\.5 to 9\.0 and the target has 11\.0.*--scheme w8a16"):
        vllm_int8.check(stored(Checkpoint.open(make())), "11.0")


@pytest.mark.parametrize(
    ("sm", "changes"), [("8.0", {"sym_activations": True}), (None, {"static": True}), ("11.0", {"scheme": "w8a16"})]
)
def test_what_it_takes(sm: str | None, changes: dict[str, Any], make: Any) -> None:
    assert vllm_int8.check(stored(Checkpoint.open(make(**changes))), sm) == []


def test_zero_points_of_inputs_are_noted(make: Any) -> None:
    (note,) = vllm_int8.check(stored(Checkpoint.open(make())), "8.0")
    assert "have zero points" in note and "SGLang" in note and "--sym-activations" in note


def test_parts_of_a_fused_layer_must_share_a_scheme(make: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"q_proj is .* and .*k_proj is dense.*one matrix"):
        vllm_int8.check(stored(Checkpoint.open(make(skip=("layers.0.self_attn.k_proj",)))), "8.0")
