"""A training run on disk, so that a killed one goes on bit for bit: parameters, optimizer, random states, position.

    checkpoints/step-00000120/   rank-00000.safetensors, .json    each process's own part
                                 checkpoint.json                  hashes of those, what the run is, where it stands

Every process writes its part into a folder under another name; the first one adds the hashes and renames it, so that a
kill leaves a whole checkpoint or none. The last two are kept, because a disk can lose the newest. Only safetensors and
JSON are read: nothing is unpickled.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress import distributed
from compress.errors import ArtifactError, CompressError, ConfigError
from compress.files import file_sha256, fsync_path, json_bytes, read_json, write_bytes_atomically

FACTS = "checkpoint.json"
KEPT = 2


class Checkpoints:
    """The checkpoints of one run. what: what must be the same for a run to go on (processes, engine, data)."""

    def __init__(self, folder: Path, what: Mapping[str, Any]) -> None:
        self.folder = folder
        self.what = dict(what)

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, ascending."""
        found = [p for p in self.folder.glob("step-*") if (p / FACTS).exists()]
        return sorted(int(p.name.removeprefix("step-")) for p in found)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, tensors: Mapping[str, Tensor], own: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """To be called by every process. tensors, own: this process's. state: the run's, the same everywhere."""
        working = self.folder / ".writing"
        if distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir()
        distributed.wait_for_all()
        part = working / f"rank-{distributed.rank():05d}.safetensors"
        save_file(_separate(tensors), part)
        write_bytes_atomically(part.with_suffix(".json"), json_bytes(dict(own)))
        distributed.wait_for_all()
        if distributed.rank() == 0:
            hashes = {p.name: file_sha256(p) for p in sorted(working.iterdir())}
            facts = {"step": step, "what": self.what, "state": dict(state), "files": hashes}
            write_bytes_atomically(working / FACTS, json_bytes(facts))
            _sync(working)
            shutil.rmtree(self.path(step), ignore_errors=True)
            working.rename(self.path(step))
            fsync_path(self.folder)
            for old in self.steps()[:-KEPT]:
                shutil.rmtree(self.path(old))
        distributed.wait_for_all()
        return self.path(step)

    def newest(self, note: Callable[[str], None]) -> int | None:
        """The newest step whose checkpoint is whole; `note` hears of damaged ones. The same in every process."""

        def whole() -> int | None:
            for step in reversed(self.steps()):
                damaged = self._damaged(step)
                if damaged is None:
                    return step
                note(f"checkpoint {self.path(step)} is damaged ({damaged}); the one before it is used")
            return None

        return distributed.told_by_first(whole)

    def _damaged(self, step: int) -> str | None:
        try:
            files: dict[str, str] = read_json(self.path(step) / FACTS)["files"]
            for name, expected in files.items():
                path = self.path(step) / name
                if not path.exists() or file_sha256(path) != expected:
                    return name
        except (CompressError, KeyError):
            return FACTS
        return None

    def load(self, step: int, rank: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """(tensors, own, state) as `save` was given them, by this process or by `rank`.

        ConfigError when the run is another one.
        """
        facts = read_json(self.path(step) / FACTS)
        self._compare(self.path(step), facts["what"])
        part = self.path(step) / f"rank-{distributed.rank() if rank is None else rank:05d}.safetensors"
        return load_file(part), read_json(part.with_suffix(".json")), facts["state"]

    def _compare(self, path: Path, theirs: Mapping[str, Any]) -> None:
        for key, mine in self.what.items():
            if theirs.get(key) == mine:
                continue
            if key == "processes":
                then = theirs.get(key)
                raise ConfigError(
                    f"{path} was written by {then} process{'es' * (then != 1)} and {mine} run now; start {then} of "
                    "them (torchrun --nproc-per-node), or pass --no-resume to begin again"
                )
            raise ConfigError(
                f"{path} belongs to a run with another {key} ({_short(theirs.get(key))}, now {_short(mine)}); go on "
                "with that one's, or pass --no-resume to begin again"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:16] + "..."


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: a file holds no views."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        fsync_path(path)
    fsync_path(folder)


# ---- what is in a part -------------------------------------------------------------------------------


def training_tensors(
    named: list[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer | None, *, writes: bool
) -> dict[str, Tensor]:
    """This process's shares of the trained parameters and of the optimizer's state; nothing unless it `writes`."""
    if not writes:
        return {}
    out: dict[str, Tensor] = {}
    for name, parameter in named:
        out[f"param.{name}"] = local(parameter)
        for key, value in ({} if optimizer is None else optimizer.state.get(parameter, {})).items():
            out[f"optim.{name}.{key}"] = local(value)
    return out


@torch.no_grad()
def restore(
    tensors: Mapping[str, Tensor], named: list[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> None:
    """Put `training_tensors` back. ArtifactError when a parameter is missing or has another shape."""
    for name, parameter in named:
        stored = tensors.get(f"param.{name}")
        mine = local(parameter)
        if stored is None or stored.shape != mine.shape:
            raise ArtifactError(f"the checkpoint has no {name} of shape {tuple(mine.shape)}; pass --no-resume")
        mine.copy_(stored)
        state = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"optim.{name}.{key}")
            if value is not None:
                state[key] = _like(value, parameter) if value.ndim else _counter(value, parameter, optimizer)
        if state:
            optimizer.state[parameter] = state


def local(value: Tensor) -> Tensor:
    """A sharded tensor's own part; any other tensor itself."""
    part: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return part


def _like(value: Tensor, parameter: Any) -> Tensor:
    value = value.to(local(parameter).device)
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _counter(value: Tensor, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """The optimizer's count of updates lies where a fused one wants it, else on the CPU."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return value.to(parameter.device) if fused else value


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON) of every generator of this process: PyTorch's, its GPU's, numpy's and Python's."""
    _, numpy_keys, position, has_gauss, gauss = np.random.get_state()
    version, python, next_gauss = random.getstate()
    tensors = {"rng.torch": torch.get_rng_state(), "rng.numpy": torch.from_numpy(np.array(numpy_keys, dtype=np.int64))}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    own = {"numpy": [position, has_gauss, gauss], "python": [version, list(python), next_gauss]}
    return tensors, own


def restore_random_state(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    """The inverse of `random_state`; ArtifactError when a generator does not take its state back."""
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    position, has_gauss, gauss = own["numpy"]
    np.random.set_state(("MT19937", tensors["rng.numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, python, next_gauss = own["python"]
    random.setstate((version, tuple(python), next_gauss))
    found, _ = random_state()
    wrong = [name for name, value in found.items() if not torch.equal(value, tensors.get(name, value))]
    if wrong:
        raise ArtifactError(f"the checkpoint's {wrong[0]} could not be restored; pass --no-resume to begin again")
