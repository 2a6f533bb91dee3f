"""Weights below the floor of float16 scales: the same function, in any units, keeps its quality."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import numerics
from compress.artifact import read_manifest
from compress.cli.main import main
from compress.model import StreamedModel
from compress.quantize.lift import HEADROOM, lift_of, room_of
from compress.scheme import Scheme

SCHEME = Scheme(group_size=32)
IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(3))
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def gaussian(rows: int = 64, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("scheme", [SCHEME, Scheme(group_size=64, symmetric=True), Scheme(num_bits=8)])
def test_usual_weights_stay_where_they_are(scheme: Scheme) -> None:
    assert lift_of([gaussian(), gaussian() * 30], scheme) == 1.0


def test_a_lift_is_the_power_of_two_that_clears_the_floor() -> None:
    w = gaussian() * 2.0**-13
    lift = lift_of([w, gaussian()], SCHEME)
    assert torch.frexp(torch.tensor(lift))[0] == 0.5
    scale = numerics.wanted_scale(*numerics.range_of(numerics.to_groups(w * lift, SCHEME)), SCHEME)
    assert numerics.MIN_SCALE < float(scale.min())
    assert numerics.MIN_SCALE * HEADROOM / 4 < float(scale.quantile(0.01)) < numerics.MIN_SCALE * HEADROOM * 4
    error = numerics.round_to_nearest(w * lift, SCHEME) / lift - w
    plain = numerics.round_to_nearest(gaussian(), SCHEME) - gaussian()
    assert float(error.norm() / w.norm()) == pytest.approx(float(plain.norm() / gaussian().norm()), rel=0.01)


def test_a_few_dead_groups_and_zeros_ask_for_nothing() -> None:
    w = gaussian()
    w[:3, :32] *= 1e-9
    assert lift_of([w], SCHEME) == 1.0
    assert lift_of([torch.zeros(8, 64)], SCHEME) == 1.0


def test_a_producer_gives_what_it_can_spare() -> None:
    assert room_of(torch.ones(64), SCHEME) == 2.0**14
    room = room_of(gaussian(), SCHEME)
    assert 2 <= room <= 2**8 and lift_of([gaussian() / room], SCHEME) <= HEADROOM
    assert room_of(gaussian() * 2.0**-13, SCHEME) == 1.0


@pytest.fixture
def run_awq(tmp_path: Path, calib_text: Path) -> Callable[..., Any]:
    def run(model: Path, out: str, *options: str) -> Any:
        command = ["awq", str(model), "--calib", str(calib_text), "--samples", "8", "--seq-len", "64"]
        arguments = [*command, "--group-size", "32", "--device", "cpu", "-o", str(tmp_path / out), "--json", *options]
        return CliRunner().invoke(main, arguments)

    return run


def rescaled(model: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    out.mkdir()
    for file in model.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    weights = {name: change(name, w).contiguous() for name, w in load_file(model / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = StreamedModel.open(folder)
    hidden = model.embed(IDS)
    for i in range(model.num_blocks):
        model.load_block(i)
        hidden = model.run_block(i, hidden)
        model.release_block(i)
    return model.head(hidden)


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_the_same_function_in_other_units(effort: str, build_model: Any, run_awq: Any, tmp_path: Path) -> None:
    """norms x 2**13, the linears behind them x 2**-13: equal in float32, so as good in INT4."""
    model = build_model("Llama")

    def change(name: str, w: Tensor) -> Tensor:
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            return w * 2.0**13
        return w * 2.0**-13 if name.split(".")[-2] in READERS else w

    tiny = rescaled(model, tmp_path / "tiny", change)
    original = logits(model)
    assert torch.equal(logits(tiny), original)
    changes, errors = [], []
    for folder, out in ((model, "plain"), (tiny, "lifted")):
        done = run_awq(folder, out, "--effort", effort)
        assert done.exit_code == 0, done.output
        changes.append(float((logits(tmp_path / out) - original).norm() / original.norm()))
        manifest = read_manifest(tmp_path / out)
        assert manifest is not None
        errors.append(sum(layer["error"] for layer in manifest.record["layers"]))
    assert errors[1] < 1.05 * errors[0]
    assert changes[1] < 1.5 * changes[0]  # other roundings of two random blocks: 1.3 was seen
    lifts = {group["lift"] for group in manifest.record["groups"] if group["fold"].endswith("layernorm")}
    assert lifts and min(lifts) > 2**6


def test_what_cannot_be_lifted_is_refused_by_name(build_model: Any, run_awq: Any, tmp_path: Path) -> None:
    """down_proj x 2**-20 with nothing upstream that could spare so much: destroyed, unless asked."""
    model = rescaled(
        build_model("Llama"),
        tmp_path / "tiny",
        lambda name, w: w * 2.0**-20 if name == "model.layers.1.mlp.down_proj.weight" else w,
    )
    done = run_awq(model, "out", "--effort", "fast")
    assert done.exit_code == 1 and not (tmp_path / "out").exists()
    assert "model.layers.1.mlp.down_proj" in done.output and "--allow-damage" in done.output
    asked = run_awq(model, "out", "--effort", "fast", "--allow-damage")
    assert asked.exit_code == 0, asked.output
    found = json.loads(asked.stdout)["record"]
    worst = max(found["layers"], key=lambda layer: layer["error"])
    assert worst["layer"] == "model.layers.1.mlp.down_proj" and worst["error"] > 0.5
    assert found["damaged"] == [worst["layer"]]
