"""Distillation on a GPU: losses and steps are those of the CPU, compiled or not, and a stopped run goes on."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import calibration_data
from compress.distill.data import Mix
from compress.distill.request import DistillRequest
from compress.distill.run import distill
from compress.distill.train import Stopped
from compress.losses import at_once, in_blocks
from compress.losses.at_once import Weights
from compress.losses.heads import DenseTeacher, Head
from compress.losses.in_blocks import Objective
from compress.workspace import resolve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: distillation was not run on a GPU"),
]
TEXT = str(calibration_data.default_calibration())
# Compiling is most of this file's time: runs have one shape and one goal, so that what is compiled is compiled once.


def head_and_teacher(tokens: int, vocabulary: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((tokens, width), (vocabulary, width), (tokens, width))
    hidden, weight, theirs = (torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
    return hidden, weight / width**0.5, hidden + 0.3 * theirs


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
@pytest.mark.parametrize("way", ["at once, compiled", "at once", "blocks, compiled", "blocks"])
def test_sixteen_bit_losses_are_those_of_float64(kind: str, way: str) -> None:
    """Values to a hundredth, gradients to two of their norm: what products of bfloat16 inputs leave.

    Of compiled blocks, gradients are those that a run can ask for: a cached teacher's, whose divergence is forward KL.
    """
    hidden, weight, theirs = head_and_teacher(300, 5000, 128)
    labels, count = torch.arange(300) * 7 % 5000, torch.full((300,), 1 / 300)
    o = Objective(kind=kind)
    differentiable = kind == "forward-kl" or way != "blocks, compiled"
    found = []
    for exact in (True, False):
        device, dtype = ("cpu", torch.float64) if exact else ("cuda", torch.bfloat16)
        h = hidden.to(device, dtype).requires_grad_()
        w = weight.to(device, torch.float64 if exact else torch.float32).requires_grad_()
        teacher = DenseTeacher(hidden_PH=theirs.to(device, dtype), head=Head(weight_VH=weight.to(device, dtype)))
        with torch.autocast("cuda", torch.bfloat16, enabled=not exact), torch.set_grad_enabled(differentiable):
            if "at once" in way and not exact:
                each = count.to(device)
                counts = Weights(divergence_P=each, cross_entropy_P=each)
                total, *_ = at_once.total(
                    h, Head(weight_VH=w), teacher, labels.to(device), o, counts, budget=5000 * 128, fuse="comp" in way
                )
            else:
                fuse = "comp" in way and not exact
                parts = in_blocks.losses(h, Head(weight_VH=w), teacher, labels.to(device), o, fuse=fuse)
                total = parts[0].mean() + parts[1].mean()
        gradients = torch.autograd.grad(total, [h, w]) if differentiable else ()
        found.append([x.double().cpu() for x in (total.detach(), *gradients)])
    assert abs(float(found[0][0] - found[1][0])) < 0.01 * float(found[0][0])
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        assert float((a - b).norm()) < 0.02 * float(a.norm())


def request(teacher: Path, out: Path, **more: Any) -> DistillRequest:
    options: dict[str, Any] = {"tokens": 8 * 16 * 64, "seq_len": 64, "batch": 16, "micro_batch": 8, "rate": 1e-3}
    options.update(checkpoint_steps=2, **more)
    student = options.pop("student", teacher)
    return DistillRequest(
        teacher=resolve(str(teacher)), student=resolve(str(student)), data=Mix.of([TEXT], None), out=out, **options
    )


def curve(asked: DistillRequest) -> list[float]:
    return [float(r["loss"]) for r in distill(asked).record["curve"]]


@pytest.fixture
def pair(build_model: Any) -> tuple[Path, Path]:
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    return build_model(**sizes, num_hidden_layers=3), build_model(**sizes, num_hidden_layers=2, name="student")


def test_steps_are_those_of_the_cpu(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """The same losses at every step, in float32 nearly, in bfloat16 and compiled roughly."""
    more = {"student": pair[1], "ce": 0.2}
    here = curve(request(pair[0], tmp_path / "here", **more))
    plain = curve(request(pair[0], tmp_path / "there", **more, device="cuda"))
    coarse = curve(request(pair[0], tmp_path / "fast", **more, device="cuda", dtype="bfloat16", compile=True))
    assert here[-1] < here[0]
    assert plain == pytest.approx(here, rel=2e-3)
    assert coarse == pytest.approx(here, rel=3e-2)


def test_an_update_waits_for_its_numbers_alone(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A GPU has work while the host looks at an update: nothing else in it makes the host wait."""
    more: dict[str, Any] = {"student": pair[1], "ce": 0.2, "device": "cuda", "dtype": "bfloat16", "compile": True}
    asked = replace(request(pair[0], tmp_path / "out", **more), checkpoint_steps=0)

    def heard(record: dict[str, float], ready: object) -> None:
        torch.cuda.set_sync_debug_mode("error" if record["step"] in (4, 5, 6) else "default")

    try:
        assert len(distill(asked, heard=heard).record["curve"]) == 8
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_stopped_run_goes_on(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    more: dict[str, Any] = {"student": pair[1], "device": "cuda", "dtype": "bfloat16", "watch": TEXT}
    more.update(watch_tokens=1024, compile=True, ce=0.2)
    asked = request(pair[0], tmp_path / "out", **more)

    def heard(record: dict[str, float], ready: object) -> None:
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="at step 5 of 8"):
        distill(asked, heard=heard)
    assert curve(asked) == pytest.approx(curve(request(pair[0], tmp_path / "whole", **more)), rel=1e-2)


def test_codes_are_trained(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Compiled, in bfloat16: nearer to the original than before, in the same tensors."""
    import compress
    from compress.checkpoint import Checkpoint
    from compress.tell import SILENT

    start = tmp_path / "start"
    compress.quantize_awq(
        pair[0], start, group_size=32, effort="fast", calib=TEXT, samples=8, seq_len=64, device="cpu", tell=SILENT
    )
    asked = request(
        pair[0], tmp_path / "out", student=start, scheme="w4a16", rate=1e-2, tokens=32 * 16 * 64, epochs=4,
        device="cuda", dtype="bfloat16", compile=True, watch=TEXT, watch_tokens=4096, patience=99, ce=0.2,
    )  # fmt: skip
    looks = distill(asked).record["watch"]["looks"]
    assert looks[-1]["divergence"] < 0.97 * looks[0]["divergence"]
    before, after = Checkpoint.open(start), Checkpoint.open(tmp_path / "out")
    assert {n: (i.dtype, i.shape) for n, i in before.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in after.tensors.items()
    }
