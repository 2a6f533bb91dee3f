"""Which library builds an engine for which card, here.

TensorRT builds for the card of this machine only. TensorRT-RTX builds for absent cards too, by compute capability, of
those that it knows. Where neither can, the export is the folder that its device builds from.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from compress.errors import ConfigError
from exporters.sizing.targets import Target
from exporters.trt.graph.build_engine import this_gpu

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# Compute capabilities in the support matrix of TensorRT-RTX 1.0 to 1.5; it compiles for others that it knows, such as
# 8.0, without NVIDIA's word that the result runs there.
RTX_SUPPORTED = ("7.5", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True, kw_only=True)
class Builder:
    """bindings: the module to import. sm: compute capability to compile for (80), None for this machine's own card."""

    library: str
    bindings: str
    sm: int | None


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """Nothing here builds for the card; reason says why, and what would."""

    reason: str


def choose(
    target: Target,
    asked: str | None,
    *,
    here: str | None,
    known: Callable[[str], tuple[str, ...] | None],
) -> Builder | OnDevice:
    """What builds for `target`. asked: a library, or None for whichever can.

    here: compute capability of this machine's GPU, None without. known(library): the absent cards that an installed
    library compiles for, None where it is not installed. ConfigError when what is asked for cannot be.
    """
    assert target.sm is not None  # a machine without a GPU does not list the format
    if asked is not None and known(asked) is None:
        raise ConfigError(
            f'--builder {asked}: it is not installed for this Python; pip install "compress-toolkit[{asked}]"'
        )
    ours = here == target.sm
    rtx = known("tensorrt-rtx")
    if asked != "tensorrt-rtx" and ours and known("tensorrt") is not None:
        return Builder(library="tensorrt", bindings=MODULES["tensorrt"], sm=None)
    if asked != "tensorrt" and rtx is not None and target.sm in rtx:
        return Builder(library="tensorrt-rtx", bindings=MODULES["tensorrt-rtx"], sm=int(target.sm.replace(".", "")))
    if asked == "tensorrt":
        raise ConfigError(
            f"--builder tensorrt builds for the GPU of this machine ({_said(here)}), and {target.name} is SM "
            f"{target.sm}; leave --builder out to get the folder that builds on the device"
        )
    if asked == "tensorrt-rtx":
        raise ConfigError(
            f"--builder tensorrt-rtx compiles for SM {', '.join(rtx or ())}, and {target.name} is SM {target.sm}; "
            "leave --builder out to get the folder that builds on the device"
        )
    if ours:
        raise ConfigError(
            f"{target.name}'s GPU is here, and TensorRT is not installed for this Python; pip install "
            '"compress-toolkit[tensorrt]" (on a Jetson JetPack brings it: apt install python3-libnvinfer)'
        )
    absent = '; pip install "compress-toolkit[tensorrt-rtx]" brings a compiler for absent cards of some kinds'
    return OnDevice(
        reason=f"no engine was built: {target.name} is SM {target.sm}, the GPU of this machine is {_said(here)}, and "
        f"{'TensorRT-RTX is not installed' if rtx is None else 'TensorRT-RTX compiles for ' + ', '.join(rtx) + ' only'}"
        f"{absent if rtx is None else ''}. On the device: python3 build_engine.py"
    )


def _said(here: str | None) -> str:
    return "none" if here is None else f"SM {here}"


def sm_here() -> str | None:
    """Compute capability of this machine's first GPU, "8.0"."""
    found = this_gpu()
    return None if found is None else found["sm"]


def compiles_for(library: str) -> tuple[str, ...] | None:
    """The absent cards that an installed library compiles for; None where it is not installed."""
    if importlib.util.find_spec(MODULES[library]) is None:
        return None
    if library == "tensorrt":
        return ()
    names = (n for n in dir(importlib.import_module(MODULES[library]).ComputeCapability) if n.startswith("SM"))
    return tuple(f"{n[2:-1]}.{n[-1]}" for n in sorted(names, key=lambda n: int(n[2:])))
