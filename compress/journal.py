"""A run's working folder: finished blocks on disk, so that a killed run goes on where it was.

A block is finished once `block-00003.json` exists; it is renamed into place after its tensors are on disk, so a kill at
any moment leaves either a finished block or one that will be done again. A record says of which run and which block
it is and holds a hash of itself and of its tensors: what the disk changed, or another run left, is done again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import distributed
from compress.block import BlockResult
from compress.errors import ArtifactError
from compress.files import IO_THREADS, file_sha256, json_bytes, read_json, write_bytes_atomically
from compress.formats import Format
from compress.formats.format import parts_of
from compress.plan import LayerPlan
from compress.shards import save_atomically, tensor_sha256


class Journal:
    """The store of `blocks.stream` over a scratch folder, of the run with the id `run`.

    format, plan: how the quantized layers are written, and their schemes by the names that they are written under; no
    format for a stage whose layers stay dense. kept: told each file of tensors that is on disk with its record, whether
    this process wrote it or found it.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        format: Format | None,
        plan: LayerPlan,
        kept: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.folder = folder
        self.run = run
        self.format = format
        self.plan = plan
        self.kept = kept

    def tensors_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def record_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def save(self, index: int, prefix: str, result: BlockResult) -> None:
        computed: dict[str, Tensor] = {}
        for name, q in result.quantized.items():
            layer = prefix + name
            q.check(layer)
            parts = parts_of(q, result.inputs.get(name))
            computed.update({f"{layer}.{key}": value for key, value in parts.items()})
        dense = on_host({prefix + name: value for name, value in result.dense.items()})
        with ThreadPoolExecutor(IO_THREADS) as pool:
            meant = on_host(computed) | dense
            digests = pool.map(tensor_sha256, meant.values())  # while the layers are packed
            tensors = on_host(self._packed(prefix, result)) | dense
            meant_digests = dict(zip(meant, digests, strict=True))
        save_atomically(self.tensors_path(index), tensors)
        facts = {
            "index": index,
            "prefix": prefix,
            "sha256": file_sha256(self.tensors_path(index)),
            "layers": sorted(result.quantized),
            "meant": meant_digests,
            "report": result.report,
        }
        write_record(self.record_path(index), self.run, facts)
        self.kept(self.tensors_path(index))

    def _packed(self, prefix: str, result: BlockResult) -> dict[str, Tensor]:
        """The quantized layers as the format writes them."""
        tensors: dict[str, Tensor] = {}
        for name, q in result.quantized.items():
            assert self.format is not None
            leaves = self.format.tensors(q, self.plan[prefix + name], result.inputs.get(name))
            tensors.update({f"{prefix}{name}.{leaf}": value for leaf, value in leaves.items()})
        return tensors

    def record(self, index: int) -> dict[str, Any] | None:
        """What is kept of a finished block, or None where there is nothing that can be believed."""
        record = read_record(self.record_path(index), self.run, self.tensors_path(index))
        return record if record is not None and record["index"] == index else None

    def load(self, index: int) -> BlockResult | None:
        """The block, if an earlier process finished it. Nothing is removed: a block that is not believed is redone."""
        record = self.record(index)
        if record is None:
            return None
        self.kept(self.tensors_path(index))
        prefix = record["prefix"]
        tensors = _all_tensors(self.tensors_path(index))
        result = BlockResult(quantized={}, dense={}, report=record["report"])
        for name in record["layers"]:
            layer = prefix + name
            assert self.format is not None
            names = {leaf: f"{layer}.{leaf}" for leaf in self.format.LEAVES if f"{layer}.{leaf}" in tensors}
            parts = {leaf: tensors.pop(full) for leaf, full in names.items()}
            result.quantized[name] = self.format.read(parts, self.plan[layer], layer)
            static = self.format.read_static(parts, self.plan[layer], layer)
            if static is not None:
                result.inputs[name] = static
        result.dense.update({name.removeprefix(prefix): value for name, value in tensors.items()})
        return result


@dataclass(frozen=True)
class Facts:
    """What a run has measured so far, in its scratch folder: a killed run does not measure it again."""

    folder: Path
    run: str

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What `find` returns, JSON; or what it returned when this run asked for `name` before."""
        known = self._record(name)
        return self.keep(name, find()) if known is None else known["value"]

    def known(self, name: str) -> Any:
        """What this run kept under `name`, or None."""
        known = self._record(name)
        return None if known is None else known["value"]

    def keep(self, name: str, value: Any) -> Any:
        """Keep a value, JSON, and return it."""
        write_record(self._path(name), self.run, {"name": name, "value": value})
        return value

    def _record(self, name: str) -> dict[str, Any] | None:
        known = read_record(self._path(name), self.run)
        return known if known is not None and known["name"] == name else None

    def _path(self, name: str) -> Path:
        return self.folder / f"fact-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


@dataclass(frozen=True)
class SharedStore:
    """The journal as several processes see it: the first one has it, and what it finds there comes to all.

    check: called there whenever a block's weights have been read, before anything is made of them; its errors are
    everybody's.
    """

    journal: Journal | None
    check: Callable[[], None] = lambda: None

    def load(self, index: int) -> BlockResult | None:
        def found() -> BlockResult | None:
            self.check()
            return self.journal.load(index) if self.journal else None

        return distributed.told_by_first(found)

    def save(self, index: int, prefix: str, result: BlockResult) -> None:
        if self.journal is not None:
            self.journal.save(index, prefix, result)


def on_host(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in host memory; those of a GPU in page-locked memory, copied in this thread's stream.

    To other memory the driver copies piece by piece through a buffer of its own, at a fraction of the link's speed.
    """
    found = {}
    for name, value in values.items():
        if value.is_cuda:
            found[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            found[name].copy_(value, non_blocking=True)
        else:
            found[name] = value.cpu()
    for device in {value.device for value in values.values() if value.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return found


def write_record(path: Path, run: str, facts: dict[str, Any]) -> None:
    """Keep `facts` of a file that is on disk: from here on, it counts as finished for the run with this id."""
    value = {"run": run, **facts}
    write_bytes_atomically(path, json_bytes({**value, "record_sha256": _digest(value)}))


def read_record(path: Path, run: str, tensors: Path | None = None) -> dict[str, Any] | None:
    """The facts kept at `path`; None unless they are there, whole, and of this run.

    tensors: the file that they are about, to be compared with its hash, which is the fact `sha256`.
    """
    if not path.is_file() or not (tensors is None or tensors.is_file()):
        return None
    try:
        value = read_json(path)
        stated = value.pop("record_sha256", None)
        whole = stated == _digest(value)
    except (ArtifactError, ValueError, RecursionError):  # damaged
        return None
    if not whole or value["run"] != run or (tensors is not None and file_sha256(tensors) != value["sha256"]):
        return None
    return value


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json_bytes(value)).hexdigest()


def _all_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    return dict(load(path.read_bytes()))
