"""Targets are data: complete, with a source for every figure that is stated."""

from dataclasses import fields

import pytest

from exporters.export import FORMATS
from exporters.sizing.targets import TARGETS, Target

NEED_NO_SOURCE = {"name", "title", "unified", "sources"}


def test_the_promised_targets_are_there() -> None:
    promised = "a100-40g a100 h100 h200 orin orin-32g orin-nx-16g orin-nx-8g orin-nano thor cpu lambda"
    assert list(TARGETS) == promised.split()


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_every_stated_figure_has_a_source(target: Target) -> None:
    stated = {f.name for f in fields(target) if getattr(target, f.name) is not None} - NEED_NO_SOURCE
    assert stated == set(target.sources), "a figure without a source, or a source without a figure"
    assert all(len(text) > 15 for text in target.sources.values())


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_figures_make_sense(target: Target) -> None:
    assert 0.4 < target.usable < 1 and target.usable_bytes < target.memory_bytes
    assert set(target.formats) <= set(FORMATS)
    for low, high in [*(target.decode_share or {}).values(), *([target.prefill_share] if target.prefill_share else [])]:
        assert 0 < low < high < 1
    assert target.has_gpu == bool(target.fp16_tflops) and (target.has_gpu or target.formats[0] == "onnx")
    shown = target.to_json()
    assert shown["usable_bytes"] == target.usable_bytes and shown["sources"] == dict(target.sources)


def test_default_formats() -> None:
    first = {name: target.formats[0] for name, target in TARGETS.items()}
    assert {first[n] for n in ("a100-40g", "a100", "h100", "h200")} == {"hf"}
    assert {first[n] for n in TARGETS if n.startswith("orin") or n == "thor"} == {"edge"}
    # Edge-LLM's wheels have no sm90 payload
    assert "edge" not in TARGETS["h100"].formats and "edge" in TARGETS["a100"].formats


def test_published_int8_figures_of_orin_follow_from_the_formula() -> None:
    """NVIDIA's data sheets give 170 sparse INT8 TOPS for the GPU of AGX Orin 64GB and 40 for the Nano: twice dense."""
    assert TARGETS["orin"].int8_tops == pytest.approx(170 / 2, rel=0.01)
    assert TARGETS["orin-nano"].int8_tops == pytest.approx(40 / 2, rel=0.03)
