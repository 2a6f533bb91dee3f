"""A run's working folder: finished blocks on disk, so that a killed run goes on where it was.

A block is finished once `block-00003.json` exists; it is renamed into place after its tensors are on disk, so a kill at
any moment leaves either a finished block or one that will be done again. The folder is called OUT.partial and becomes
OUT by a rename, so nothing half-made is ever called OUT.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.block import BlockResult
from compress.errors import ArtifactError, ConfigError
from compress.files import IO_THREADS, file_sha256, fsync_dir, json_bytes, read_json, write_bytes_atomically
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme
from compress.shards import save_atomically, tensor_sha256

RUN = "run.json"
Pack = Callable[[QuantizedWeight], dict[str, Tensor]]
Unpack = Callable[[Mapping[str, Tensor], Scheme, str], QuantizedWeight]


class Journal:
    """The store of `blocks.stream` over a working folder. `suffixes` are the format's tensor names."""

    def __init__(self, folder: Path, scheme: Scheme, pack: Pack, unpack: Unpack, suffixes: tuple[str, ...]) -> None:
        self.folder = folder
        self.scheme = scheme
        self.pack = pack
        self.unpack = unpack
        self.suffixes = suffixes

    def start(self, identity: dict[str, Any], *, resume: bool) -> None:
        """Make the folder, or take up the one that an earlier run with the same `identity` left.

        Raises ConfigError when the earlier run was another one; nothing of it is deleted unless `resume` is False.
        """
        if self.folder.exists() and not resume:
            shutil.rmtree(self.folder)
        if (self.folder / RUN).exists():
            found = read_json(self.folder / RUN)
            for key, value in identity.items():
                if found.get(key) != value:
                    raise ConfigError(
                        f"{self.folder} holds an unfinished run with {key}={found.get(key)!r}, not {value!r}; "
                        "finish it with its own options, or pass --no-resume to discard it"
                    )
            return
        if self.folder.exists():
            shutil.rmtree(self.folder)  # killed before it was a run
        self.folder.mkdir(parents=True)
        write_bytes_atomically(self.folder / RUN, json_bytes(identity))
        fsync_dir(self.folder.parent)

    def tensors_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def record_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def save(self, index: int, prefix: str, result: BlockResult) -> None:
        tensors: dict[str, Tensor] = {}
        with ThreadPoolExecutor(IO_THREADS) as pool:
            digests: dict[str, Future[str]] = {}
            for name, q in result.quantized.items():
                q.check(prefix + name)
                parts = {"codes": q.codes_OI, "scales": q.scale_OG, "zero_points": q.zero_point_OG}
                for key, value in parts.items():
                    # Fetched in this thread, whose stream of the GPU may not be the pool's.
                    digests[f"{prefix}{name}.{key}"] = pool.submit(tensor_sha256, value.cpu())
                tensors.update({f"{prefix}{name}.{key}": value.cpu() for key, value in self.pack(q).items()})
            for name, value in result.dense.items():
                tensors[prefix + name] = value.cpu()
                digests[prefix + name] = pool.submit(tensor_sha256, tensors[prefix + name])
            meant = {name: found.result() for name, found in digests.items()}
        save_atomically(self.tensors_path(index), tensors)
        record = {
            "prefix": prefix,
            "sha256": file_sha256(self.tensors_path(index)),
            "layers": sorted(result.quantized),
            "meant": meant,
            "report": result.report,
        }
        write_bytes_atomically(self.record_path(index), json_bytes(record))

    def record(self, index: int) -> dict[str, Any]:
        return read_json(self.record_path(index))

    def load(self, index: int) -> BlockResult | None:
        path, tensors_path = self.record_path(index), self.tensors_path(index)
        if not path.exists():
            return None
        record = read_json(path)
        if not tensors_path.exists() or file_sha256(tensors_path) != record["sha256"]:
            path.unlink()  # the disk lost or changed it: do the block again
            return None
        prefix = record["prefix"]
        tensors = _all_tensors(tensors_path)
        quantized = {}
        for name in record["layers"]:
            parts = {s: tensors.pop(f"{prefix}{name}.{s}") for s in self.suffixes}
            quantized[name] = self.unpack(parts, self.scheme, name)
        dense = {name.removeprefix(prefix): value for name, value in tensors.items()}
        return BlockResult(quantized=quantized, dense=dense, report=record["report"])

    def close(self) -> None:
        """Remove the working folder once the artifact is in place."""
        shutil.rmtree(self.folder)


def _all_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    return dict(load(path.read_bytes()))


def publish(staged: Path, out: Path) -> None:
    """Rename the finished folder `staged` to `out`; an old `out` is replaced, and never half-replaced."""
    old = out.with_name(f".{out.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        os.rename(out, old)
    os.rename(staged, out)
    fsync_dir(out.parent)
    if old.exists():
        shutil.rmtree(old)


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raise ArtifactError when the disk under `folder` has less than `needed_bytes` free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ArtifactError(
            f"{folder}: the run needs {needed_bytes / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free; free some "
            "space or pass -o on another disk"
        )


__all__ = ["Journal", "check_free_space", "publish"]
