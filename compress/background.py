"""Keeping finished blocks while the next one is computed: one at a time, in order, in a thread of its own.

Packing, hashing and waiting for the disk need no GPU, so they may overlap with it. What a crash leaves is what the
store below leaves: a block counts as finished when *that* store says so, which is later than `save` returns here.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.blocks import BlockResult, BlockStore


class BackgroundStore:
    """A `BlockStore` that hands blocks to another one in a thread. Use as a context manager.

    At most one block waits: `save` first waits for the one before it. An error of the thread is raised by the next
    `save` or on leaving the context, which therefore means that every block is kept.
    """

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="save-block")
        self.pending: Future[None] | None = None

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
        self.pending = self.pool.submit(self.store.save, index, prefix, result)
