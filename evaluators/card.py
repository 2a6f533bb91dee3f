"""What a card says of itself while a benchmark runs: clock, memory in use, utilisation.

From NVML where there is a driver and its Python binding (nvidia-ml-py). A Jetson's GPU is no NVML device: there
NVIDIA's `tegrastats` is read, and NVML is never called. Elsewhere nothing is said.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

INTERVAL_SECONDS = 0.2
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Clock:
    """One moment. None where nothing is said. used_bytes: of the whole card, or of a Jetson's one memory."""

    mhz: int | None
    used_bytes: int | None
    utilisation: int | None


SILENT = Clock(mhz=None, used_bytes=None, utilisation=None)


class Source(Protocol):
    """Something that knows the card's state."""

    def read(self) -> Clock: ...

    def close(self) -> None: ...


def is_jetson(root: Path = Path("/")) -> bool:
    """Whether this is a Tegra system on a module: L4T's release file, or the device tree's model."""
    model = root / "proc/device-tree/model"
    try:
        text = model.read_bytes().decode("utf-8", "replace") if model.exists() else ""
    except OSError:
        text = ""
    return (root / "etc/nv_tegra_release").exists() or "NVIDIA" in text


def parse_tegrastats(line: str) -> Clock:
    """One line of tegrastats: `RAM used/totalMB`, `GR3D_FREQ load%@MHz` (`@[MHz,MHz]` of an Orin's two halves).

    Without root some releases leave the clock out. Source: NVIDIA, Jetson Linux Developer Guide, "Tegrastats Utility".
    """
    ram = re.search(r"\bRAM (\d+)/\d+MB", line)
    gpu = re.search(r"\bGR3D_FREQ (\d+)%(?:@\[?(\d+))?", line)
    return Clock(
        mhz=int(gpu[2]) if gpu and gpu[2] else None,
        used_bytes=int(ram[1]) * MIB if ram else None,
        utilisation=int(gpu[1]) if gpu else None,
    )


class Tegrastats:
    """The last line of a running tegrastats."""

    def __init__(self, command: list[str]) -> None:
        self._last = SILENT
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace"
        )
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last = parse_tegrastats(line)

    def read(self) -> Clock:
        return self._last

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=10)
        self._thread.join(timeout=10)


class Nvml:
    """The card that torch uses, whatever CUDA_VISIBLE_DEVICES renames. Raises what the binding raises without one."""

    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def read(self) -> Clock:
        n = self._nvml
        return Clock(
            mhz=int(n.nvmlDeviceGetClockInfo(self._handle, n.NVML_CLOCK_SM)),
            used_bytes=int(n.nvmlDeviceGetMemoryInfo(self._handle).used),
            utilisation=int(n.nvmlDeviceGetUtilizationRates(self._handle).gpu),
        )

    def close(self) -> None:
        self._nvml.nvmlShutdown()


class Nothing:
    """No card, or none that can be asked; why is empty where there is none."""

    def __init__(self, why: str = "") -> None:
        self.why = why

    def read(self) -> Clock:
        return SILENT

    def close(self) -> None:
        pass


def source() -> Source:
    """What this machine has."""
    return source_of(has_gpu=torch.cuda.is_available(), jetson=is_jetson())


def source_of(*, has_gpu: bool, jetson: bool) -> Source:
    """Who can be asked on such a machine."""
    if not has_gpu:
        return Nothing()
    if jetson:
        path = shutil.which("tegrastats")
        if path is None:
            return Nothing("tegrastats is not on PATH, so clock, memory and utilisation of the GPU are not known")
        return Tegrastats([path, "--interval", str(int(1000 * INTERVAL_SECONDS))])
    try:
        return Nvml()
    except Exception as e:  # no binding, no driver: each raises its own
        said = " ".join(str(e).split())[:120]
        return Nothing(
            f"NVML cannot be asked ({said}), so clock and utilisation are not known; pip install nvidia-ml-py"
        )


@dataclass(kw_only=True)
class Watched:
    """What was seen: a sample every `INTERVAL_SECONDS`, and the state whenever `now` is called. why: of silence."""

    now: Callable[[], Clock]
    samples: list[Clock] = field(default_factory=list)
    why: str = ""

    def utilisation(self) -> float | None:
        """Mean of the samples, per cent."""
        found = [s.utilisation for s in self.samples if s.utilisation is not None]
        return sum(found) / len(found) if found else None

    def most_used_bytes(self) -> int | None:
        return max((s.used_bytes for s in self.samples if s.used_bytes is not None), default=None)


@contextmanager
def watching(make: Callable[[], Source] = source, interval: float = INTERVAL_SECONDS) -> Iterator[Watched]:
    """Sample the card in a thread while the body runs."""
    card = make()
    watched = Watched(now=card.read, why=getattr(card, "why", ""))
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(interval):
            watched.samples.append(card.read())

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        stop.set()
        thread.join(timeout=10)
        card.close()
