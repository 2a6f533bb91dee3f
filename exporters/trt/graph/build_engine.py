#!/usr/bin/env python3
"""Build a TensorRT engine from the ONNX graph beside this file: `python3 build_engine.py`.

Needs only Python and TensorRT's bindings (JetPack's `python3-libnvinfer`, or `pip install tensorrt`). What it reads is
in `build.json`; the engine appears at once, when it is whole, as `model.engine`, with its stamp `model.engine.json`:
the card and the version that it runs on, its shapes, sizes, and which INT4 and INT8 weights stayed so. The same code
builds with TensorRT-RTX (`--bindings tensorrt_rtx`), which can compile for another GPU (`--sm 80`) on a machine that
has none; such an engine was compiled, not run. TensorRT's measured kernel times are kept in `model.timing` for the
next build.
"""

from __future__ import annotations

import argparse
import ctypes
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
# Of the stamp: what changes when its fields do.
STAMP_VERSION = 1


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
    """Parse, compile, write `out` and its stamp `out.json`; returns the stamp and the seconds. Raises Refused."""
    plan = json.loads((folder / "build.json").read_text(encoding="utf-8"))
    trt = load(bindings, plan)
    need, free = COPIES * (folder / plan["data"]).stat().st_size, available_bytes()
    if free is not None and free < need and not force:
        raise Refused(
            f"the build needs about {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; close other programs, add "
            "swap, or pass --force"
        )
    started = time.monotonic()
    log = Log(trt)
    # TensorRT-RTX compiles ahead without measuring: it has no timing cache
    timing = out.with_suffix(".timing") if bindings == "tensorrt" else None
    engine = compiled(trt, log, folder, plan, profiles, sm, timing)
    if engine is None:
        raise Refused(f"{bindings} {trt.__version__} could not build it: {log.last_error}")
    data = memoryview(engine)
    stamp = {
        "stamp": STAMP_VERSION,
        "library": bindings,
        "version": trt.__version__,
        **card_of(sm),
        "onnx": {name: sha256_of(folder / name) for name in (plan["onnx"], plan["data"])},
        "profiles": profiles,
        "shapes": {name: plan["profiles"][name] for name in profiles},
        **{key: plan[key] for key in ("capacity", "batch", "caches", "caches_in_place")},
        "engine_bytes": data.nbytes,
        "onnx_data_bytes": (folder / plan["data"]).stat().st_size,
        "sha256": hashlib.sha256(data).hexdigest(),
        "timing_cache": None if timing is None else {"file": timing.name, "sha256": sha256_of(timing)},
        **layer_report(
            inspected(trt, log, data) if sm is None else log.layers,
            plan["quantized_layers"],
            plan["int8_layers"],
            len(profiles),
        ),
    }
    write_atomically(out, data)
    write_atomically(out.with_name(f"{out.name}.json"), memoryview((json.dumps(stamp, indent=2) + "\n").encode()))
    return {**stamp, "seconds": round(time.monotonic() - started, 1)}


def compiled(
    trt: Any, log: Log, folder: Path, plan: dict[str, Any], profiles: list[str], sm: int | None, timing: Path | None
) -> Any:
    """The serialized engine, or None when the builder failed. timing: kept kernel times, read and written anew."""
    builder = trt.Builder(log.logger)
    network = builder.create_network(strongly_typed(trt))
    parser = trt.OnnxParser(network, log.logger)
    # the path goes into the engine's bytes: relative, so that equal folders give equal engines
    if not parser.parse_from_file(os.path.relpath(folder / plan["onnx"])):
        first = parser.get_error(0)
        raise Refused(f"{trt.__name__} {trt.__version__} refuses node {first.node_name()}: {first.desc()}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX: what a CUDA graph needs
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if sm is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    for name in profiles:
        profile = builder.create_optimization_profile()
        for tensor, shapes in plan["profiles"][name].items():
            profile.set_shape(tensor, shapes["min"], shapes["opt"], shapes["max"])
        config.add_optimization_profile(profile)
    if timing is not None:
        # TensorRT itself refuses times of another card or version, and measures again
        kept = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
        config.set_timing_cache(kept or config.create_timing_cache(b""), False)
    engine = builder.build_serialized_network(network, config)
    if engine is not None and timing is not None:
        write_atomically(timing, memoryview(config.get_timing_cache().serialize()))
    return engine


def card_of(sm: int | None) -> dict[str, Any]:
    """The card that the engine is for, and the machine's own (name, newest CUDA of its driver) if that is the one."""
    if sm is not None:
        return {"sm": f"{sm // 10}.{sm % 10}", "built_on": None}
    found = this_gpu()
    if found is None:
        raise Refused("the CUDA driver sees no GPU here, and an engine is built on the card that it is for")
    return {"sm": found["sm"], "built_on": {"gpu": found["gpu"], "cuda": found["cuda"]}}


def this_gpu() -> dict[str, str] | None:
    """Name, compute capability and driver's CUDA version of the first GPU, from the driver itself; None without."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor, version = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(256)
    codes = [
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # COMPUTE_CAPABILITY_MAJOR, MINOR of cuda.h
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
        cuda.cuDriverGetVersion(ctypes.byref(version)),
    ]
    if any(codes):
        return None
    return {
        "gpu": name.value.decode(),
        "sm": f"{major.value}.{minor.value}",
        "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
    }


def sha256_of(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def inspected(trt: Any, log: Log, data: memoryview) -> list[str]:
    """The engine's layers as TensorRT's inspector describes them, one text each. Loading it needs its card."""
    engine = trt.Runtime(log.logger).deserialize_cuda_engine(data)
    if engine is None:
        raise Refused(f"{trt.__name__} {trt.__version__} does not load what it built: {log.last_error}")
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return [json.dumps(layer) for layer in json.loads(text)["Layers"]]


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


def layer_report(layers: list[str], int4: list[str], int8: list[str], num_profiles: int = 1) -> dict[str, Any]:
    """Which of the graph's quantized linears are computed from their integers in the engine, by its own description.

    A layer's text (a line of the builder's log, or the inspector's JSON) lists its inputs and constants with their
    types and the ONNX nodes that went into it. A linear is fused when layers with a constant of its type hold its
    product, one in each profile, and unfused when its weight is first dequantized by a layer of its own.
    `int8_by_int8`: how many INT8 linears also get their inputs as INT8. All are None when the builder did not describe
    its layers in a form that is understood.
    """
    if not layers:
        return dict.fromkeys(("layers", "int4_fused", "int4_unfused", "int8_fused", "int8_unfused", "int8_by_int8"))
    found: dict[str, list[str]] = {"int4": [], "int8": [], "int8 by int8": []}
    for text in layers:
        inputs, constants = inputs_and_constants(text)
        nodes = sorted(set(re.findall(r"\[ONNX Layer: ([^\]]*)\]", text)))
        for kind in ("int4", "int8"):
            found[kind] += nodes if holds(constants, kind) else []
        found["int8 by int8"] += nodes if holds(constants, "int8") and holds(inputs, "int8") else []

    def in_each(names: list[str], kind: str) -> list[str]:
        return [n for n in names if found[kind].count(n) >= num_profiles]

    fused4, fused8 = in_each(int4, "int4"), in_each(int8, "int8")
    return {
        "layers": len(layers),
        "int4_fused": len(fused4),
        "int4_unfused": [n for n in int4 if n not in fused4],
        "int8_fused": len(fused8),
        "int8_unfused": [n for n in int8 if n not in fused8],
        "int8_by_int8": len(in_each(int8, "int8 by int8")),
    }


def inputs_and_constants(text: str) -> tuple[str, str]:
    """The parts of a layer's description that list its inputs, and its constants."""
    if text.startswith("{"):
        layer = json.loads(text)
        return json.dumps(layer.get("Inputs")), json.dumps([layer.get("Constants"), layer.get("Weights")])
    before, _, rest = text.partition("Constants: [")
    return before, rest.partition("Outputs: [")[0]


def holds(part: str, kind: str) -> bool:
    """Whether a tensor of type `kind` is listed: `Datatype: Int4` or `"Format/Datatype": "Row major INT4"`, say."""
    return re.search(rf'type"?: ?"?[^",}}]*\b{kind}\b', part, re.IGNORECASE) is not None


def write_atomically(path: Path, data: memoryview) -> None:
    tmp = path.with_name(f".{path.name}.tmp")
    with open(tmp, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


if __name__ == "__main__":
    main()
