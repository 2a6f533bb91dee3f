"""Gradients sent as less than they are, by hooks of DDP: as bfloat16, or as two thin matrices (PowerSGD, Vogels et al.,
arXiv:1905.13727), whose state is kept over a resume.

PyTorch's hook keeps an error and a factor for each bucket of gradients, and DDP lays its buckets out anew after the
first backward pass of a process. A resumed run would meet its old errors in other buckets. So each process makes one
backward pass that changes nothing before the hook begins (`Engine.rehearse`), after which the layout stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd

_MEMORIES = ("error_dict", "p_memory_dict", "q_memory_dict")
# What `--compress-gradients` is called that halves them.
HALVED = "bf16"


class Compression(Protocol):
    """A hook that is off until `on`, what a checkpoint holds of it, and the bytes of gradients that it saves."""

    on: bool

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of this process."""

    def numbers(self) -> dict[str, Any]: ...

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], device: torch.device) -> None: ...

    def saved(self) -> dict[str, int]:
        """Bytes of gradients that a process has handed to the network, and what it would have without compression."""


def compression_of(module: nn.Module, how: int | str, begins: int, seed: int) -> Compression:
    """`HALVED`, or PowerSGD of rank `how`. begins: updates before that compresses."""
    if isinstance(how, str):
        return HalvedGradients(module)
    return PowerSgd(module, how, begins, seed)


class HalvedGradients:
    """Gradients of one DDP module are rounded to bfloat16, sent and added up in it. Nothing is carried over."""

    def __init__(self, module: nn.Module) -> None:
        self.on = False
        self.elements = 0
        module.register_comm_hook(self, _halve)  # type: ignore[operator]

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def numbers(self) -> dict[str, Any]:
        return {"elements": self.elements}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], device: torch.device) -> None:
        self.elements = numbers["elements"]

    def saved(self) -> dict[str, int]:
        return {"sent": 2 * self.elements, "uncompressed": 4 * self.elements}


class PowerSgd:
    """PowerSGD of one DDP module. begins: updates before it compresses (at least 2). Off until `on`."""

    def __init__(self, module: nn.Module, rank: int, begins: int, seed: int) -> None:
        self.state = powersgd.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=max(2, begins),
            random_seed=seed,
        )
        self.on = False
        self.plain_elements = 0
        module.register_comm_hook(self, _hook)  # type: ignore[operator]

    def tensors(self) -> dict[str, Tensor]:
        out = {
            f"powersgd.{memory}.{bucket}": value
            for memory in _MEMORIES
            for bucket, value in getattr(self.state, memory).items()
        }
        _, keys, *_ = self.state.rng.get_state(legacy=True)
        return {**out, "powersgd.rng": torch.from_numpy(np.array(keys, dtype=np.int64))}

    def numbers(self) -> dict[str, Any]:
        _, _, position, has_gauss, gauss = self.state.rng.get_state(legacy=True)
        return {
            "rng": [position, has_gauss, gauss],
            "iter": self.state.iter,
            "elements": [
                self.plain_elements,
                self.state.total_numel_before_compression,
                self.state.total_numel_after_compression,
            ],
        }

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], device: torch.device) -> None:
        for memory in _MEMORIES:
            prefix = f"powersgd.{memory}."
            values = {int(n.removeprefix(prefix)): v.to(device) for n, v in tensors.items() if n.startswith(prefix)}
            setattr(self.state, memory, values)
        keys = tensors["powersgd.rng"].numpy().astype(np.uint32)
        self.state.rng.set_state(("MT19937", keys, *numbers["rng"]))
        self.state.iter = numbers["iter"]
        plain, before, after = numbers["elements"]
        self.plain_elements = plain
        self.state.total_numel_before_compression, self.state.total_numel_after_compression = before, after

    def saved(self) -> dict[str, int]:
        before, after = self.state.total_numel_before_compression, self.state.total_numel_after_compression
        return {"sent": 4 * (self.plain_elements + after), "uncompressed": 4 * (self.plain_elements + before)}


def _halve(mine: HalvedGradients, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    if not mine.on:
        return default_hooks.allreduce_hook(None, bucket)  # type: ignore[arg-type]
    mine.elements += bucket.buffer().numel()
    return default_hooks.bf16_compress_hook(None, bucket)  # type: ignore[arg-type]


def _hook(mine: PowerSgd, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    if not mine.on:
        return default_hooks.allreduce_hook(None, bucket)  # type: ignore[arg-type]
    if mine.state.iter < mine.state.start_powerSGD_iter:
        mine.plain_elements += bucket.buffer().numel()
    future = powersgd.powerSGD_hook(mine.state, bucket)
    if not bucket.buffer().is_cuda:
        # gloo runs the hook's later all-reduces from threads of its own, where those of two buckets would change places
        future.wait()
    return future


# DDP looks at the annotations themselves, which are text in this file
for _one in (_halve, _hook):
    _one.__annotations__.update({"bucket": GradBucket, "return": torch.futures.Future[torch.Tensor]})
