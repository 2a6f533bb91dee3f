"""What need not wait for the GPU, nor the GPU for it: keeping finished blocks while the next one is computed.

Packing, hashing and waiting for the disk need no GPU, so they may overlap with it. What a crash leaves is what the
store below leaves: a block counts as finished when *that* store says so, which is later than `save` returns here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from compress.block import BlockResult, BlockStore

T = TypeVar("T")


class BackgroundStore:
    """A `BlockStore` that hands blocks to another one in a thread. Use as a context manager.

    At most one block waits: `save` first waits for the one before it. An error of the thread is raised by the next
    `save` or on leaving the context, which therefore means that every block is kept.
    """

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="save-block")
        self.pending: Future[None] | None = None
        self.stream: torch.cuda.Stream | None = None

    def __enter__(self) -> BackgroundStore:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.wait()
        except BaseException:
            if error is None:  # else the first error is the one to report
                raise
        finally:
            self.pool.shutdown()

    def wait(self) -> None:
        """Return once nothing is under way; raises what went wrong."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def load(self, index: int) -> BlockResult | None:
        return self.store.load(index)  # never the block under way: blocks are loaded before they are saved

    def save(self, index: int, prefix: str, result: BlockResult) -> None:
        self.wait()
        # On a stream of its own, or copies to the host would wait for the next block's work and that work for them.
        ready = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        self.pending = self.pool.submit(self._save, ready, index, prefix, result)

    def _save(self, ready: torch.cuda.Event | None, index: int, prefix: str, result: BlockResult) -> None:
        if ready is None:
            self.store.save(index, prefix, result)
            return
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            self.store.save(index, prefix, result)
            # Nothing of `result` may be freed while the stream still reads it.
            self.stream.synchronize()


@contextmanager
def meanwhile(compute: Callable[[], T]) -> Iterator[Future[T]]:
    """Run `compute` in a thread while the context lasts; gives its future, whose `result()` waits or raises the error.

    Leaving the context waits as well, so that nothing is written behind the caller's back.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="meanwhile") as pool:
        yield pool.submit(compute)
