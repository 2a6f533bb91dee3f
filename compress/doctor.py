"""What this machine can do, found by asking it: each lack comes with the command that mends it.

A check imports or queries the real thing; nothing is inferred from a version table. Library code: `cli/doctor.py`
prints.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "absent", "broken"]

# Below these a full-size run gets into trouble: the artifact lies on the disk twice, and a block with its statistics
# in memory.
LITTLE_DISK = 20e9
LITTLE_MEMORY = 8e9


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding. needed_for: the commands or formats that want it. mend: a command, or "" where nothing is wrong."""

    name: str
    state: State
    found: str
    needed_for: str
    mend: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def checks(workspace: Path = Path("artifacts")) -> Iterator[Check]:
    """Every check, one at a time: some take a second."""
    yield _python()
    yield _memory()
    yield _disk(workspace)
    yield from _torch()
    yield _package("transformers", "everything")
    yield _package("triton", "awq on a GPU", extra="gpu", wanted=sys.platform == "linux")
    yield _onnxruntime()
    yield _package("onnxruntime_genai", "export --format onnx", extra="onnx")
    yield _package("tensorrt", "export --format tensorrt on the target itself", extra="tensorrt")
    yield _package("tensorrt_rtx", "engines compiled for a GPU that is not there", extra="tensorrt-rtx")
    yield _package("datasets", "hf: calibration and evaluation texts", extra="datasets")
    yield _package("lm_eval", "evaluate --lm-eval", extra="eval")
    yield _package("matplotlib", "plots of reports", extra="report")


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    good = (3, 10) <= sys.version_info[:2] <= (3, 13)
    mend = "" if good else "python3.11 -m venv .venv"
    return Check(name="python", state="ok" if good else "broken", found=found, needed_for="everything", mend=mend)


def _memory() -> Check:
    total, free = memory_bytes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if total is None or free is None:
        return Check(name="memory", state="ok", found=f"unknown; {cores} cores", needed_for="everything")
    found = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free, {cores} cores"
    small = free < LITTLE_MEMORY
    mend = "close other programs: an 8B model takes about 8 GB while it is quantized" if small else ""
    return Check(name="memory", state="broken" if small else "ok", found=found, needed_for="large models", mend=mend)


def memory_bytes() -> tuple[int | None, int | None]:
    """Memory in all and available, from /proc/meminfo; None where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None, None
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return values.get("MemTotal"), values.get("MemAvailable")


def _disk(workspace: Path) -> Check:
    folder = next(p for p in (workspace.absolute(), *workspace.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    small = free < LITTLE_DISK
    mend = f"make {folder} writable, or pass -o" if not writable else "free some space, or pass -o" if small else ""
    found = f"{free / 1e9:.1f} GB free at {folder}{'' if writable else ', which cannot be written'}"
    return Check(name="disk", state="broken" if mend else "ok", found=found, needed_for="artifacts", mend=mend)


def _torch() -> Iterator[Check]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as e:
        yield Check(name="torch", state="broken", found=str(e), needed_for="everything", mend="pip install torch")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Check(name="torch", state="ok", found=f"{torch.__version__}, {build}", needed_for="everything")
    if not torch.cuda.is_available():
        has_card = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        mend = "pip install --upgrade --force-reinstall torch   # a CUDA build that fits the driver" if has_card else ""
        found = f"a driver is here, but torch ({build}) cannot use it" if has_card else "no NVIDIA driver here"
        yield Check(
            name="GPU",
            state="broken" if has_card else "absent",
            found=found,
            needed_for="speed; generate, bench",
            mend=mend,
        )
        return
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found = f"{p.name}, SM {p.major}.{p.minor}, {p.total_memory / 1e9:.1f} GB"
        yield Check(name=f"GPU {index}", state="ok", found=found, needed_for="speed; generate, bench")
    yield _attempt("NVRTC", "generate and bench on a GPU", _compile_kernel, "pip install --force-reinstall torch")


def _compile_kernel() -> str:
    from compress.runtime.kernels import weight_only

    weight_only.compile_one(0)
    return "compiles the decode kernels"


def _onnxruntime() -> Check:
    mend = 'pip install "compress-toolkit[onnx]"'
    try:
        ort = importlib.import_module("onnxruntime")
        providers = ", ".join(p.removesuffix("ExecutionProvider") for p in ort.get_available_providers())
    except ImportError:
        found, needed = "not installed", "export --format onnx, evaluate of exports"
        return Check(name="onnxruntime", state="absent", found=found, needed_for=needed, mend=mend)
    found = f"{ort.__version__}: {providers}"
    return Check(name="onnxruntime", state="ok", found=found, needed_for="export --format onnx, evaluate of exports")


def _package(module: str, needed_for: str, *, extra: str = "", wanted: bool = True) -> Check:
    """A package that can be imported, not only one whose metadata is there."""
    mend = f'pip install "compress-toolkit[{extra}]"' if extra else f"pip install {module}"
    name = module.replace("_", "-")
    if not wanted:
        return Check(name=name, state="absent", found="not made for this system", needed_for=needed_for)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, state="absent", found="not installed", needed_for=needed_for, mend=mend)

    def load() -> str:
        importlib.import_module(module)
        return version

    return _attempt(name, needed_for, load, mend.replace("install", "install --force-reinstall", 1))


def _attempt(name: str, needed_for: str, attempt: Callable[[], str], mend: str) -> Check:
    try:
        return Check(name=name, state="ok", found=attempt(), needed_for=needed_for)
    except Exception as e:  # whatever a broken installation raises is the finding
        reason = " ".join(str(e).split())[:120] or type(e).__name__
        return Check(name=name, state="broken", found=reason, needed_for=needed_for, mend=mend)
