"""Several processes share the calibration set: each runs its part of the rows, and the sums are added up.

Every process loads each block and makes every choice from the same sums, so that weights never travel; what a layer
becomes may be computed by one of them and sent to the others. Only the first one should write. The parts are contiguous
runs of rows, and their sums are always added in the order of the parts: W processes give, bit for bit, what one
process gives that adds the set up in W parts (`num_parts=W` of `blocks.stream`, with as many threads a process). One
process that adds it up in one part takes float32 sums in another order and gets other last bits, because what was
summed one by one cannot be had from sums of parts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from compress.errors import CompressError

T = TypeVar("T")
# What gloo and NCCL say in the processes that are left when one of them ends.
_PEER_ENDED = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited|remote worker crashing")
# The others wait while the first process samples text, reads the model and writes the artifact.
PATIENCE = timedelta(hours=12)


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Meet the processes that `torchrun` started beside this one, if any; gives the device that is this process's own.

    Reads torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Each process of a host gets a
    GPU of its own when `device` is a GPU.
    """
    if started() == 1:
        yield device
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        device = f"cuda:{int(os.environ['LOCAL_RANK'])}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield device
    except RuntimeError as e:
        if not _PEER_ENDED.search(str(e)):
            raise
        raise CompressError(
            "another process of this run has ended, so this one cannot go on; what that one printed says why"
        ) from e
    finally:
        dist.destroy_process_group()


def started() -> int:
    """How many processes `torchrun` started, met or not; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def running() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process among those that share the calibration set; 0 for the one that writes."""
    return dist.get_rank() if running() else 0


def num_processes() -> int:
    return dist.get_world_size() if running() else 1


def bounds(num_items: int, count: int) -> list[tuple[int, int]]:
    """Where `count` contiguous runs of the items begin and end, whose lengths differ by at most one; some are empty if
    items are few."""
    ends = [num_items * i // count for i in range(count + 1)]
    return list(pairwise(ends))


def owners(costs: Sequence[float], count: int) -> list[int]:
    """Which of `count` processes does which piece of work: the dearest first, each to who has least to do so far."""
    loads = [0.0] * count
    found = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[item] = loads.index(min(loads))
        loads[found[item]] += costs[item]
    return found


def add_up(partial: Tensor) -> None:
    """Replace each process's `partial` by the sum over processes, added in their order; in place, the same everywhere.

    An all-reduce would be free to add in any order. Needs two more tensors of the size of `partial`.
    """
    if not running():
        return
    total = torch.zeros_like(partial)
    for source in range(num_processes()):
        term = partial.clone() if source == rank() else torch.empty_like(partial)
        dist.broadcast(term, source)
        total += term
    partial.copy_(total)


def add_up_count(count: int, device: torch.device) -> int:
    """The sum over processes of an integer; `device` is where the processes exchange tensors."""
    if not running():
        return count
    total = torch.tensor([count], dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)


def largest(value: Tensor) -> Tensor:
    """Element by element the largest over processes; in whatever order, for it does not matter."""
    if running():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def joined_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, one process's behind the other's, in their order; numbers of rows may differ."""
    if not running():
        return rows
    out = []
    for source in range(num_processes()):
        count = torch.tensor([len(rows)], dtype=torch.int64, device=rows.device)
        dist.broadcast(count, source)
        part = rows.contiguous() if source == rank() else rows.new_empty(int(count), *rows.shape[1:])
        dist.broadcast(part, source)
        out.append(part)
    return torch.cat(out)


def from_first(value: Tensor) -> Tensor:
    """What the first process holds; `value` elsewhere gives the number of dimensions, the dtype and the device only."""
    if not running():
        return value
    shape = torch.tensor(value.shape, dtype=torch.int64, device=value.device)
    dist.broadcast(shape, 0)
    out = value.contiguous() if rank() == 0 else torch.empty(shape.tolist(), dtype=value.dtype, device=value.device)
    dist.broadcast(out, 0)
    return out


def from_one(value: Tensor, source: int) -> Tensor:
    """What process `source` holds; `value` elsewhere gives the shape, the dtype and the device, and is overwritten."""
    if not running():
        return value
    out = value.contiguous()
    dist.broadcast(out, source)
    return out


def told_by_first(compute: Callable[[], T]) -> T:
    """What `compute` gives in the first process, which alone calls it; an error of ours is raised in every process."""
    if not running():
        return compute()
    told: list[tuple[T | None, BaseException | None]] = [(None, None)]
    if rank() == 0:
        try:
            told = [(compute(), None)]
        except CompressError as e:
            told = [(None, e)]
        except BaseException as e:
            dist.broadcast_object_list([(None, CompressError(f"the first process failed ({type(e).__name__})"))], 0)
            raise
    dist.broadcast_object_list(told, 0)
    value, error = told[0]
    if error is not None:
        raise error
    return cast(T, value)


def first_does(compute: Callable[[], T]) -> T | None:
    """What `compute` gives, in the first process; None in the others, which wait. See `told_by_first` for errors."""
    made: list[T] = []
    told_by_first(lambda: made.append(compute()))
    return made[0] if made else None


def wait_for_all() -> None:
    """Return once every process has come here."""
    if running():
        dist.barrier()
