"""CUDA C++ compiled at run time with NVRTC, which torch's CUDA builds bring along, and launched on torch's streams.

No compiler, no headers and no build step are needed where a kernel runs. A launch goes through ctypes: some
microseconds of the host, which a captured CUDA graph does not pay again.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.errors import UnsupportedError


@dataclass(frozen=True)
class Kernel:
    """A compiled function. `launch` takes tensors (their addresses), None (a null pointer) and ints (32 bits)."""

    function: int
    name: str

    def launch(
        self, blocks: int, threads: int, args: Sequence[torch.Tensor | int | None], *, blocks_y: int = 1
    ) -> None:
        """Enqueue on torch's current stream; threads of one dimension, blocks of one or two."""
        values: list[Any] = [
            ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr())
            for a in args
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values))
        config = _Launch(
            grid=(blocks, blocks_y, 1),
            block=(threads, 1, 1),
            stream=torch.cuda.current_stream().cuda_stream,
            attributes=ctypes.pointer(_OVERLAP),
            num_attributes=1 if _overlaps(torch.cuda.current_device()) else 0,
        )
        code = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(self.function), pointers, None)
        _check(code, f"launching {self.name}")


def bits(value: float) -> int:
    """A float32's bits as an int, which is how a launch passes it."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: an id, and a union of 64 bytes at offset 8."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Launch(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: the kernel may start before the one before it has ended;
# every kernel here waits (griddepcontrol.wait) before it touches what that one wrote. Only Hopper and later know it.
_OVERLAP = _Attribute(id=6, value=1)


@functools.cache
def _overlaps(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def compiled(source: Path, defines: tuple[tuple[str, int], ...], name: str, device: int) -> Kernel:
    """Function `name` (extern "C") of a source file, for the GPU `device`; UnsupportedError with the compiler's log."""
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *(f"-D{k}={v}" for k, v in defines)]
    image = _cubin(source, options)
    torch.zeros(1, device=f"cuda:{device}")  # makes the device's context current
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), image), f"loading {source.name}")
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
    assert function.value is not None
    return Kernel(function=function.value, name=name)


def _cubin(source: Path, options: Sequence[str]) -> bytes:
    library = _nvrtc()
    program = ctypes.c_void_p()
    text = source.read_bytes()
    if library.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), 0, None, None):
        raise UnsupportedError(f"{source.name}: NVRTC does not take it; reinstall torch with CUDA")
    flags = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = library.nvrtcCompileProgram(program, len(options), flags)
    size = ctypes.c_size_t()
    if failed:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise UnsupportedError(f"{source.name} does not compile for {options[0]}: {log.value.decode()[:500]}")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, image)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC as torch finds it: already loaded, on the library path, or in the wheel beside torch.

    A CPU build of torch brings none; of an installed wheel any version will do, since it can compile and not run.
    """
    name = "libnvrtc.so." + (str(torch.version.cuda).split(".")[0] if torch.version.cuda else "")
    beside = sorted(Path(torch.__file__).resolve().parents[1].glob(f"nvidia/*/lib/{name}*"))
    for candidate in (name, *map(str, beside), "libnvrtc.so"):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise UnsupportedError(
        f"{name} is not found, which torch {torch.__version__} brings along; reinstall torch with CUDA, or use the CPU"
    )


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise UnsupportedError(f"{what} failed: {(text.value or b'unknown').decode()} (CUDA error {code})")
