"""A CUDA graph of one step, with proof that it is what ran: replays and launches are counted.

The step reads and writes fixed buffers only. It is captured after warm-up runs on a side stream, from a pool that
graphs of one decoder share, and is valid for the addresses that it was captured with: the caller makes a new one when
a buffer moves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 3


class CudaGraph:
    """`step` captured once; `replay` runs it. launches: kernels and copies in the graph; replays: how often it ran."""

    def __init__(
        self, step: Callable[[], None], *, pool: Any = None, restore: Callable[[], None] = lambda: None
    ) -> None:
        """restore puts back what the warm-up runs of the step changed (positions, caches)."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
                restore()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self._graph, pool=pool):
            step()
        self.launches = _num_nodes(self._graph.raw_cuda_graph())
        self._graph.instantiate()
        restore()
        self.replays = 0

    def replay(self) -> None:
        self._graph.replay()
        self.replays += 1


def _num_nodes(graph: int) -> int:
    """Nodes of a cudaGraph_t; the driver's and the runtime's handles are the same."""
    count = ctypes.c_size_t()
    code = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count))
    if code:
        raise RuntimeError(f"cuGraphGetNodes failed with CUDA error {code}")
    return count.value
