"""Format `tensorrt`: an engine of our `onnx-trt` graph, where a library here builds for the target's card.

The graph is written and proven as format `onnx-trt` does it, in a scratch folder; `build_engine.py`, the script that
goes along to devices, builds the engine in a process of its own, so that a compiler that dies takes nothing with it.
The folder then holds the engine, its stamp and the tokenizer. Where nothing here builds for the card, the folder is
that of `onnx-trt`, and says so. No engine is run here. Equal inputs mostly give equal engines, but not always:
TensorRT-RTX 1.7 at times orders tensors otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError, ConfigError
from exporters.engine import timings
from exporters.engine.choose import RTX_SUPPORTED, Builder, OnDevice, choose, compiles_for, sm_here
from exporters.engine.readme import usage
from exporters.reader import Job, Written
from exporters.trt import write as onnx_trt
from exporters.trt.graph.build_engine import COPIES, available_bytes
from exporters.trt.graph.engine import PLAN, SCRIPT
from exporters.trt.graph.write import DATA, GRAPH
from exporters.trt.layout import LAYOUT as LAYOUT

ENGINE = "model.engine"
STAMP = "model.engine.json"
# A larger engine holds weights twice, or is so small a model that its kernels count.
MOST_OVER_WEIGHTS = 1.05
PROFILES = {"two": ["prefill", "decode"], "one": ["any"]}
FUSED = ("int4_fused", "int8_fused", "int8_by_int8")
NOT_RUN = (
    "the engine was built and not run: nothing here has shown that its answers are right, or how quick it is; on its "
    "device: compress generate OUT PROMPT"
)


def write(job: Job) -> Written:
    """See `exporters.reader`. Options: opset, as `onnx-trt`; builder, a library; profiles, `two` or `one`."""
    chosen = choose(job.target, job.options.get("builder"), here=sm_here(), known=compiles_for)
    if isinstance(chosen, OnDevice):
        written = onnx_trt.write(job)
        return replace(written, record={**written.record, "engine": None}, notes=[chosen.reason, *written.notes])
    with tempfile.TemporaryDirectory(prefix="graph-", dir=job.staged.parent) as scratch:
        folder = Path(scratch)
        written = onnx_trt.write(replace(job, staged=folder))
        names = PROFILES[job.options.get("profiles", "two")]
        job.say(f"building the engine with {chosen.library} for SM {job.target.sm}: profiles {', '.join(names)}")
        kept = timings.kept_file(str(job.target.sm)) if chosen.sm is None else None
        if kept is not None:
            timings.lend(folder, kept)
        stamp = build(folder, chosen, names)
        unkept = None if kept is None else timings.keep(folder, kept)
        refuse_unfused(stamp, chosen)
        left = {GRAPH, DATA, PLAN, SCRIPT}
        for path in sorted(folder.iterdir()):
            if path.name not in left:
                shutil.move(path, job.staged / path.name)
    fused = {key: stamp[key] for key in FUSED}
    verified = {**written.record["verified"], **fused}
    return Written(
        record={**written.record, "engine": recorded(stamp), "verified": verified},
        parts={"engine": int(stamp["engine_bytes"])},
        notes=[*notes_of(stamp), *filter(None, [unkept])],
        hashes={ENGINE: stamp["sha256"]},
        usage=usage(stamp),
    )


def build(folder: Path, builder: Builder, profiles: list[str]) -> dict[str, Any]:
    """Run the folder's script; returns the stamp that it wrote. ArtifactError, with its reason, without an engine."""
    need, free = COPIES * (folder / DATA).stat().st_size, available_bytes()
    if free is not None and free < need:
        raise ConfigError(
            f"building the engine takes about {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; close other "
            "programs, add swap, or export with --format onnx-trt and build on a larger machine"
        )
    command = [sys.executable, SCRIPT, "-o", ENGINE, "--profiles", ",".join(profiles), "--bindings", builder.bindings]
    command += ["--force"] if builder.sm is None else ["--force", "--sm", str(builder.sm)]
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environ, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = next((x.removeprefix("build_engine: ") for x in lines if x.startswith("build_engine: ")), None)
        ended = f"the compiler ended with code {done.returncode}: {lines[-1][:300] if lines else 'it said nothing'}"
        raise ArtifactError(
            f"{builder.library} built no engine ({said or ended}); --format onnx-trt makes the folder to build from "
            "with another version"
        )
    stamp: dict[str, Any] = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    return stamp


def refuse_unfused(stamp: Mapping[str, Any], builder: Builder) -> None:
    """ArtifactError unless every quantized linear is computed from its integers: unfused, it is slower than float16."""
    version = f"{builder.library} {stamp['version']}"
    for kind in ("int4", "int8"):
        unfused = stamp[f"{kind}_unfused"]
        if unfused is None:
            raise ArtifactError(
                f"{version} does not describe the engine's layers in a form that is understood, so it cannot be told "
                "whether quantized linears stayed so; use --format onnx-trt and build with another version"
            )
        if unfused:
            raise ArtifactError(
                f"{version} dequantizes {len(unfused)} of {len(unfused) + stamp[f'{kind}_fused']} {kind.upper()} "
                f"linears into float16 before their product ({unfused[0]} first), which is slower than float16; use "
                "--format onnx-trt and build with another version"
            )


def recorded(stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The stamp as the manifest has it: of the shapes, those of the ids; `model.engine.json` has them all."""
    short = {k: v for k, v in stamp.items() if k not in ("shapes", "caches", "int4_unfused", "int8_unfused")}
    return {**short, "profiles": {name: stamp["shapes"][name]["input_ids"] for name in stamp["profiles"]}}


def notes_of(stamp: Mapping[str, Any]) -> list[str]:
    """What the user must know of the engine."""
    notes = [NOT_RUN]
    over = stamp["engine_bytes"] / stamp["onnx_data_bytes"]
    if over > MOST_OVER_WEIGHTS:
        why = "--profiles one holds the weights once" if len(stamp["profiles"]) > 1 else "its kernels are in it"
        notes.append(
            f"the engine is {over:.2f} times its weights ({stamp['engine_bytes'] / 1e6:.1f} MB of "
            f"{stamp['onnx_data_bytes'] / 1e6:.1f}), and the predicted memory counts them once: {why}"
        )
    if stamp["library"] == "tensorrt_rtx":
        if stamp["sm"] not in RTX_SUPPORTED:
            notes.append(
                f"TensorRT-RTX compiles for SM {stamp['sm']}, but its support matrix lists "
                f"{', '.join(RTX_SUPPORTED)}: whether the engine runs there is not known; TensorRT on the device "
                "builds its own from --format onnx-trt"
            )
        notes.append(f"it loads with tensorrt_rtx {stamp['version']} on SM {stamp['sm']}, and with nothing else")
    return notes
