"""Our CUDA kernels compiled by g++ and run on a CPU, in place of those of `nvrtc.compiled`; see `cuda_on_cpu.h`."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.runtime.kernels import nvrtc

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
# Functions of the kernels that hold instructions of a GPU: those in the header take their place.
INSTRUCTIONS = ("and_or", "sub2", "fma2", "mul2", "to_float", "to_half", "multiply", "stream_in", "fresh",
                "from_others")  # fmt: skip


@dataclass
class Emulator:
    """`compiled` as `nvrtc.compiled`; launches: how often each kernel was launched."""

    folder: Path
    launches: Counter[str] = field(default_factory=Counter)
    _kernels: dict[Any, Kernel] = field(default_factory=dict)

    def compiled(self, source: Path, defines: tuple[tuple[str, int], ...], name: str, device: int | None) -> Kernel:
        key = (source, defines, name)
        if key not in self._kernels:
            library = self.folder / f"{len(self._kernels)}.so"
            code = library.with_suffix(".cpp")
            code.write_text(on_cpu(source.read_text(), name))
            # without -Bsymbolic a kernel's name may be bound to another library's function
            options = ["-O1", "-std=c++17", "-w", "-fno-strict-aliasing", "-shared", "-fPIC", "-fno-gnu-unique"]
            options += [
                "-fvisibility=hidden",
                "-Wl,-Bsymbolic",
                f"-I{HEADER.parent}",
                *(f"-D{k}={v}" for k, v in defines),
            ]
            subprocess.run(["g++", *options, "-o", str(library), str(code)], check=True)
            self._kernels[key] = Kernel(ctypes.CDLL(str(library)).launch_it, name, self)
        return self._kernels[key]


@dataclass(frozen=True)
class Kernel:
    """See `nvrtc.Kernel`."""

    function: Any
    name: str
    emulator: Emulator

    def launch(
        self, blocks: int, threads: int, args: Sequence[torch.Tensor | int | None], *, blocks_y: int = 1
    ) -> None:
        self.emulator.launches[self.name] += 1
        values: list[Any] = [
            ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr())
            for a in args
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values))
        self.function(blocks, blocks_y, threads, pointers)


def on_cpu(text: str, name: str) -> str:
    for function in INSTRUCTIONS:
        text = re.sub(rf"__device__ __forceinline__ \w+ {function}\([^{{]*\{{.*?\n\}}\n", "", text, flags=re.DOTALL)
    entry = f"launch_it(int x, int y, int threads, void** args) {{ launch({name}, x, y, threads, args); }}"
    return f'#include "{HEADER.name}"\n{text}\nextern "C" __attribute__((visibility("default"))) void {entry}\n'


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counter[str]]:
    """Kernels run on the CPU; how often each was launched."""
    if shutil.which("g++") is None:
        pytest.skip("G++ ABSENT: no decode kernel was run on the CPU")
    emulator = Emulator(Path(tmp_path_factory.mktemp("kernels")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "compiled", emulator.compiled)
        yield emulator.launches
