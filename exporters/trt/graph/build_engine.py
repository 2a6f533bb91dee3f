#!/usr/bin/env python3
"""Build a TensorRT engine from the ONNX graph beside this file: `python3 build_engine.py`.

Needs only Python and TensorRT's bindings (JetPack's `python3-libnvinfer`, or `pip install tensorrt`). What it reads is
in `build.json`; the engine appears at once, when it is whole, as `model.engine`, with `model.engine.json` beside it:
versions, sizes, and which INT4 and INT8 weights stayed so. The same code builds with TensorRT-RTX (`--bindings
tensorrt_rtx`), which can compile for another GPU (`--sm 80`) on a machine that has none; such an engine was compiled,
not run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

# Builders hold the weights several times: as parsed, as laid out anew, as serialized.
COPIES = 3


class Refused(Exception):
    """A build that cannot work, in one sentence."""


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Build model.engine from model.onnx for this device.")
    parser.add_argument("-o", "--out", type=Path, default=here / "model.engine")
    parser.add_argument("--profiles", default="prefill,decode", help="profiles of build.json to build, in this order")
    parser.add_argument("--bindings", default="tensorrt", choices=("tensorrt", "tensorrt_rtx"))
    parser.add_argument("--sm", type=int, help="compute capability to compile for, such as 80 (tensorrt_rtx only)")
    parser.add_argument("--force", action="store_true", help="build even if memory looks too small")
    args = parser.parse_args()
    try:
        report = build(
            here, args.out, profiles=args.profiles.split(","), bindings=args.bindings, sm=args.sm, force=args.force
        )
    except Refused as e:
        sys.exit(f"build_engine: {e}")
    print(json.dumps(report, indent=2))


def build(
    folder: Path,
    out: Path,
    *,
    profiles: list[str],
    bindings: str = "tensorrt",
    sm: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Parse, compile, write `out` and `out.json`; returns what the latter holds. Raises Refused."""
    plan = json.loads((folder / "build.json").read_text(encoding="utf-8"))
    trt = load(bindings, plan)
    need, free = COPIES * (folder / plan["data"]).stat().st_size, available_bytes()
    if free is not None and free < need and not force:
        raise Refused(
            f"the build needs about {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; close other programs, add "
            "swap, or pass --force"
        )
    log = Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(strongly_typed(trt))
    parser = trt.OnnxParser(network, log.logger)
    started = time.monotonic()
    if not parser.parse_from_file(str(folder / plan["onnx"])):
        first = parser.get_error(0)
        raise Refused(f"{bindings} {trt.__version__} refuses node {first.node_name()}: {first.desc()}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if sm is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    for name in profiles:
        profile = builder.create_optimization_profile()
        for tensor, shapes in plan["profiles"][name].items():
            profile.set_shape(tensor, shapes["min"], shapes["opt"], shapes["max"])
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Refused(f"{bindings} {trt.__version__} could not build it: {log.last_error}")
    data = memoryview(engine)
    report = {
        "built_with": f"{bindings} {trt.__version__}",
        "compute_capability": "this device's" if sm is None else f"{sm // 10}.{sm % 10}, compiled without running",
        "profiles": profiles,
        "engine_bytes": data.nbytes,
        "onnx_data_bytes": (folder / plan["data"]).stat().st_size,
        "sha256": hashlib.sha256(data).hexdigest(),
        "seconds": round(time.monotonic() - started, 1),
        **layer_report(log.layers, plan["quantized_layers"], plan["int8_layers"]),
    }
    write_atomically(out, data)
    write_atomically(out.with_name(f"{out.name}.json"), memoryview((json.dumps(report, indent=2) + "\n").encode()))
    return report


def load(bindings: str, plan: dict[str, Any]) -> Any:
    """TensorRT's module, if it is new enough for the graph's dialect."""
    try:
        trt = importlib.import_module(bindings)
    except ImportError as e:
        raise Refused(f"{bindings} is not installed for {sys.executable} ({e})") from e
    if bindings == "tensorrt":
        found = tuple(int(n) for n in trt.__version__.split(".")[:2])
        if found < tuple(plan["minimum_tensorrt"]):
            wanted = ".".join(str(n) for n in plan["minimum_tensorrt"])
            raise Refused(
                f"TensorRT {trt.__version__} is older than {wanted}, which opset {plan['opset']} needs; export again "
                "with --opset 21"
            )
    return trt


def strongly_typed(trt: Any) -> int:
    """The flag that keeps every tensor's type as the graph says; TensorRT 11 knows no other way."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def available_bytes() -> int | None:
    """Memory that is free or can be freed, from /proc/meminfo; None where there is none."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


class Log:
    """TensorRT's messages: errors to stderr, and the lines that describe the finished engine's layers."""

    def __init__(self, trt: Any) -> None:
        self.layers: list[str] = []
        self.last_error = "it gave no reason"
        outer = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    outer.last_error = text
                    print(text, file=sys.stderr)
                outer.layers += re.findall(r"^Name: .*?, LayerType: .*$", text, re.MULTILINE)

        self.logger = Logger()


def layer_report(layers: list[str], int4: list[str], int8: list[str]) -> dict[str, Any]:
    """Which of the graph's quantized linears are computed from their integers in the engine, by its own description.

    A layer's line lists its inputs and constants with their types and the ONNX nodes that went into it. A linear is
    fused when a layer with a constant of its type holds its product, and unfused when its weight is first dequantized
    by a layer of its own. `int8_by_int8`: how many INT8 linears also get their inputs as INT8. All are None when the
    builder did not describe its layers in a form that is understood.
    """
    if not layers:
        return dict.fromkeys(("layers", "int4_fused", "int4_unfused", "int8_fused", "int8_unfused", "int8_by_int8"))
    fused: dict[str, set[str]] = {"Int4": set(), "Int8": set()}
    by_int8: set[str] = set()
    for line in layers:
        before, _, rest = line.partition("Constants: [")
        constants = rest.partition("Outputs: [")[0]
        nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", line)
        for kind, names in fused.items():
            if re.search(rf"Datatype: {kind}\b", constants):
                names.update(nodes)
                by_int8.update(nodes if kind == "Int8" and re.search(r"Datatype: Int8\b", before) else ())
    unfused4, unfused8 = ([n for n in all_ if n not in fused[k]] for all_, k in ((int4, "Int4"), (int8, "Int8")))
    return {
        "layers": len(layers),
        "int4_fused": len(int4) - len(unfused4),
        "int4_unfused": unfused4,
        "int8_fused": len(int8) - len(unfused8),
        "int8_unfused": unfused8,
        "int8_by_int8": len(by_int8.intersection(int8)),
    }


def write_atomically(path: Path, data: memoryview) -> None:
    tmp = path.with_name(f".{path.name}.tmp")
    with open(tmp, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


if __name__ == "__main__":
    main()
