"""An engine built for this machine's card and run on it: its logits are the model's, with and without a CUDA graph.

Not run yet. On an A100, H100 or H200, or a Jetson Orin: pip install ".[tensorrt]", then
`pytest tests/gpu/test_tensorrt_on_gpu.py -s`, which must end with "passed" and print the replays of each prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import ConfigError
from compress.runtime.engine_stamp import STAMP
from compress.runtime.resident import TorchDecoder
from compress.runtime.tensorrt_decoder import TensorrtDecoder
from compress.workspace import resolve
from exporters.export import ExportRequest, export
from exporters.sizing.targets import TARGETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: no TensorRT engine was run"),
]
STEPS = 64


@pytest.fixture(scope="module", params=["two", "one"])
def engine(request: pytest.FixtureRequest, reference_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt", reason="TENSORRT ABSENT: pip install '.[tensorrt]'")
    sm = "{}.{}".format(*torch.cuda.get_device_capability())
    target = next((t for t in TARGETS.values() if t.sm == sm), None)
    if target is None:
        pytest.skip(f"no target is SM {sm}")
    out = tmp_path_factory.mktemp("engine") / "out"
    options = {"builder": "tensorrt", "profiles": request.param}
    source = resolve(str(reference_model))
    return export(
        ExportRequest(source=source, target=target, format="tensorrt", context=256, out=out, options=options)
    ).out


def prompt(length: int) -> torch.Tensor:
    return (torch.arange(length) * 37 % 4000)[None]


def test_logits_are_the_model_s(engine: Path, reference_model: Path) -> None:
    decoder = TensorrtDecoder.open(engine, capacity=256, graphs=False)
    wanted = TorchDecoder.open(reference_model, capacity=256)
    for length in (3, 70, 150):
        found, want = decoder.prefill(prompt(length)).float().cpu(), wanted.prefill(prompt(length))
        assert float((found - want).norm() / want.norm()) < 5e-3, length
        for step in range(8):
            ids = torch.tensor([7 * step + 3])
            found, want = decoder.step(ids).float().cpu(), wanted.step(ids)
            assert float((found - want).norm() / want.norm()) < 5e-3, (length, step)


def test_a_graph_gives_the_same_ids(engine: Path) -> None:
    with_graph = TensorrtDecoder.open(engine, capacity=256)
    without = TensorrtDecoder.open(engine, capacity=256, graphs=False)
    for number, length in enumerate((3, 70, 150), start=1):
        with_graph.prefill(prompt(length))
        without.prefill(prompt(length))
        found: list[Any] = [[d.advance().tolist() for _ in range(STEPS)] for d in (with_graph, without)]
        assert found[0] == found[1], length
        assert with_graph.graph is not None and with_graph.graph.replays == number * STEPS
        print(f"prompt of {length}: {with_graph.graph.replays} replays of {with_graph.graph.launches} launches")
    assert without.graph is None


def test_an_engine_of_another_card_is_refused(engine: Path) -> None:
    stamp = json.loads((engine / STAMP).read_text())
    (engine / STAMP).write_text(json.dumps({**stamp, "sm": "7.5"}))
    try:
        with pytest.raises(ConfigError, match="is an engine for SM 7.5, and the GPU here is SM"):
            TensorrtDecoder.open(engine, capacity=8)
    finally:
        (engine / STAMP).write_text(json.dumps(stamp))
