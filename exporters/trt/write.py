"""Format `onnx-trt`: our own ONNX graph for TensorRT, with what its device needs to build an engine from it.

The folder holds `model.onnx` and `model.onnx.data`, the tokenizer, `build.json` (input shapes of prefill and decode),
`build_engine.py` for the device, and a README with the contract of inputs and outputs. Two dialects: opset 24 for
TensorRT from 10.15 on, opset 21 for older ones. An unquantized folder gives a float16 graph.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compress.artifact import carried_files
from compress.errors import ConfigError
from compress.files import json_bytes, write_bytes_atomically
from compress.model import StreamedModel
from compress.plan import LayerPlan
from compress.runtime.ort import open_session
from exporters import reference
from exporters.reader import Job, Written
from exporters.readme import FOLDER, Usage
from exporters.trt.graph import architecture, engine, run
from exporters.trt.graph.build_engine import available_bytes
from exporters.trt.graph.decoder import DIALECTS
from exporters.trt.graph.lint import lint, products
from exporters.trt.graph.write import DATA, GRAPH, write_graph
from exporters.trt.layout import LAYOUT as LAYOUT

OPSET = 24
LARGE = 1_000_000_000
# ONNX Runtime's memory over the weights' file: 2.0 (float16, 2.7 GB) and 1.8 (INT4, 1.1 GB) were measured.
CHECK_COPIES = 2.2

# What float16 may cost. Its unit roundoff u is 2**-11 = 4.9e-4. Roundings are independent and mostly smaller than the
# sum they enter, so their error grows like the square root of their number: the logits were 3 to 4e-4 off with 6 layers
# and 4 to 6e-4 with 24 (random weights, 2048 wide). 4 u sqrt(layers) is 4.8e-3 and 9.6e-3 there: room for models with
# larger activations, yet far below what INT4 itself changes. That the graph is the right one is shown by the tests, in
# float32, to 1e-5; here a wrong weight or a lost layer is caught.
UNIT_ROUNDOFF = 2.0**-11
SAFETY = 4.0
# Two roundings of the same inputs that are independent of each other differ by 1.4 times what one of them changes.
OF_NOISE = 1.5


def tolerance(num_layers: int) -> float:
    """Largest relative error of the logits that float16 arithmetic explains."""
    return float(f"{SAFETY * UNIT_ROUNDOFF * num_layers**0.5:.2g}")


def write(job: Job) -> Written:
    """See `exporters.reader`. Options: opset, 24 or 21. `job.context` is the caches' capacity."""
    opset = int(job.options.get("opset", OPSET))
    if opset not in DIALECTS:
        raise ConfigError(f"--opset {opset}: onnx-trt writes 24 (TensorRT from 10.15 on) and 21 (older)")
    arch = architecture.read(StreamedModel.open(job.artifact))
    shortest = reference.PREFILL + reference.DECODE
    if not shortest <= job.context <= arch.max_positions:
        raise ConfigError(
            f"--context {job.context}: choose {shortest} (what the check of the export runs) to {arch.max_positions} "
            "(what the model was trained for)"
        )
    job.say(f"writing the graph (opset {opset})")
    parts = write_graph(job.artifact, job.staged, opset=opset, capacity=job.context, on_bytes=_tenths(job))
    _refuse_small_memory((job.staged / DATA).stat().st_size)
    job.say("checking the graph against its dialect and the artifact")
    counts = lint(job.staged / GRAPH, job.artifact, opset)
    for file in carried_files(job.artifact):
        write_bytes_atomically(job.staged / file.name, file.read_bytes())
    quantized = products(job.staged / GRAPH)
    plan = engine.plan(arch, context=job.context, batch=job.batch, opset=opset, quantized=quantized)
    write_bytes_atomically(job.staged / engine.PLAN, json_bytes(plan))
    write_bytes_atomically(job.staged / engine.SCRIPT, engine.script())
    job.say("running it on ONNX Runtime's CPU provider: 16 tokens, then 32 one by one")
    verified = verify(job.artifact, job.staged, len(arch.layers))
    return Written(
        record={
            "opset": opset,
            "capacity": job.context,
            "batch": job.batch,
            "precision": precision(job.source.plan),
            "versions": run.versions(),
            "lint": counts,
            "verified": verified,
        },
        parts=parts,
        notes=["no TensorRT engine was built or run: build_engine.py does that on the device"],
        usage=Usage(
            what=f"An ONNX graph of {arch.model_type} (opset {opset}) for TensorRT, its weights and tokenizer.",
            verb="build its engine on the device",
            command=("python3", f"{FOLDER}/{engine.SCRIPT}"),
            needs=(f"TensorRT from {'.'.join(map(str, plan['minimum_tensorrt']))} on, with its Python package",),
            more=engine.readme(plan, arch),
        ),
    )


def precision(plan: LayerPlan) -> str:
    """What the graph's products are computed from, in words."""
    kinds = {
        "float16" if scheme.weight is None else f"int{scheme.weight.num_bits}" + (" x int8" if scheme.input else "")
        for scheme in plan.groups()
    }
    return " and ".join(sorted(kinds)) or "float16"


def _refuse_small_memory(data_bytes: int) -> None:
    """ConfigError when the check of the export would not fit: a killed process says nothing."""
    need, free = int(CHECK_COPIES * data_bytes), available_bytes()
    if free is not None and free < need:
        raise ConfigError(
            f"running the written graph takes about {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; close other "
            "programs or export on a larger machine"
        )


def _tenths(job: Job) -> Callable[[int, int], None]:
    """Says how far a large file is, ten times; a small one is there before it could be read."""
    said = 0

    def on_bytes(done: int, total: int) -> None:
        nonlocal said
        tenth = 10 * done // total
        if total > LARGE and tenth > said:
            said = tenth
            job.say(f"{done / 1e9:.1f} of {total / 1e9:.1f} GB written")

    return on_bytes


def verify(artifact: Path, folder: Path, num_layers: int) -> dict[str, float]:
    """Run the written graph and compare; ArtifactError when it differs from the artifact by more than float16 does.

    Where inputs are rounded, float16 moves many of them over the middle between two codes: `reference.input_noise`.
    """
    wanted = reference.of_artifact(artifact)
    found = run.logits_TV(open_session(folder / GRAPH), wanted.ids_T, wanted.prefill)
    allowed = max(tolerance(num_layers), float(f"{OF_NOISE * reference.input_noise(artifact, wanted):.3g}"))
    return reference.compare(found, wanted, tolerance=allowed, what=str(folder / GRAPH))
