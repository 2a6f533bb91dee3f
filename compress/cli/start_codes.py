"""The quantized artifact from which `compress distill --scheme` starts, made first where only the original is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError

if TYPE_CHECKING:
    from compress.tell import Tell
    from compress.workspace import Source

# What each scheme is made by.
COMMANDS = {"w4a16": "awq", "w8a16": "int8 --scheme w8a16", "w8a8": "int8"}


def is_quantized(folder: Path) -> bool:
    from compress.checkpoint import Checkpoint

    return "quantization_config" in Checkpoint.open(folder).config


def check_scheme(scheme: str) -> None:
    """ConfigError for one whose codes are not trained."""
    if scheme not in COMMANDS:
        raise ConfigError(f"--scheme {scheme} is not one of {', '.join(COMMANDS)}; choose one of these")


def start_of(source: Source, scheme: str, tell: Tell, *, data: tuple[str, ...], **rest: Any) -> Source:
    """`source` itself where it is quantized; else what `compress awq` or `compress int8` (`balanced`) makes of it.

    That is calibrated on the first text of `data`, and lies in the workspace, where a second call finds it finished.

    rest: the command's options; device, dtype, seq_len, seed, resume and trust_remote_code are used.
    """
    from compress.artifact import read_manifest
    from compress.devices import pick_device, pick_dtype
    from compress.quantize.awq_stage import AwqRequest, quantize_awq
    from compress.quantize.group_size import asked_scheme
    from compress.quantize.int8_stage import Int8Request, quantize_int8
    from compress.workspace import WORKSPACE

    check_scheme(scheme)
    if is_quantized(source.path):
        return source
    out = WORKSPACE / f"{source.name}-{scheme}-start"
    made = replace(source, path=out, name=f"{source.name}-{scheme}", said=f"{out}, made of {source.said}")
    if read_manifest(out) is not None:
        _check_parent(out, source)
        return made
    device = pick_device(rest["device"])
    common: dict[str, Any] = {
        "source": source,
        "out": out,
        "calib": data[0] if data else None,
        "device": device,
        "dtype": pick_dtype(rest["dtype"], device),
        "effort": "balanced",
        **{name: rest[name] for name in ("seq_len", "seed", "resume", "trust_remote_code")},
    }
    tell.say(f"{source.path} is not quantized: `compress {COMMANDS[scheme]}` makes {out} first")
    if scheme == "w4a16":
        codes, _ = asked_scheme(source.path, 4, None, False, (), trust_remote_code=rest["trust_remote_code"])
        quantize_awq(AwqRequest(scheme=codes, **common), tell)
    else:
        quantize_int8(Int8Request(scheme=scheme, **common), tell)
    return made


def _check_parent(folder: Path, source: Source) -> None:
    """ConfigError for an artifact that was made of another model, or of one that changed."""
    from compress.artifact import read_manifest
    from compress.distill.manifest import content

    manifest = read_manifest(folder)
    if manifest is None or manifest.record["parent"]["sha256"] != content(source):
        raise ConfigError(
            f"{folder} was made of another model than {source.path}, or of what it was before; remove it, or pass "
            "--student the quantized artifact to train"
        )
