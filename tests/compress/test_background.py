"""Finished blocks are kept in order while the next one is computed, and no error of that thread is lost."""

import threading
import time

import pytest

from compress.background import BackgroundStore, meanwhile
from compress.block import BlockResult
from compress.errors import ArtifactError


class Slow:
    """A store whose disk is slow, and full at block `full`."""

    def __init__(self, full: int = -1) -> None:
        self.kept: list[int] = []
        self.full = full
        self.threads: set[int] = set()

    def load(self, index: int) -> BlockResult | None:
        return None

    def save(self, index: int, prefix: str, result: BlockResult) -> None:
        time.sleep(0.02)
        self.threads.add(threading.get_ident())
        if index == self.full:
            raise ArtifactError("the disk is full")
        self.kept.append(index)


def result() -> BlockResult:
    return BlockResult(quantized={}, dense={})


def test_everything_is_kept_in_order_when_the_context_ends() -> None:
    slow = Slow()
    with BackgroundStore(slow) as store:
        for i in range(5):
            store.save(i, "", result())
            assert len(slow.kept) >= i, "more than one block was waiting"
    assert slow.kept == [0, 1, 2, 3, 4]
    assert threading.get_ident() not in slow.threads


@pytest.mark.parametrize("full", [1, 2])
def test_an_error_reaches_the_caller(full: int) -> None:
    """At the next block, or, for the last one, at the end; later blocks are not kept over a gap."""
    slow = Slow(full)
    with pytest.raises(ArtifactError, match="the disk is full"), BackgroundStore(slow) as store:
        for i in range(3):
            store.save(i, "", result())
    assert slow.kept == list(range(full))


def test_an_error_of_the_caller_wins_and_the_block_under_way_is_kept() -> None:
    slow = Slow()
    with pytest.raises(KeyboardInterrupt), BackgroundStore(slow) as store:
        store.save(0, "", result())
        raise KeyboardInterrupt
    assert slow.kept == [0]
    with pytest.raises(KeyboardInterrupt), BackgroundStore(Slow(0)) as store:
        store.save(0, "", result())
        raise KeyboardInterrupt


def test_meanwhile_gives_the_value_or_the_error_and_waits() -> None:
    with meanwhile(lambda: 6 * 7) as future:
        assert future.result() == 42

    def fail() -> int:
        raise ArtifactError("gone")

    with pytest.raises(ArtifactError, match="gone"), meanwhile(fail) as future:
        future.result()
    finished: list[int] = []

    def slow() -> None:
        time.sleep(0.05)
        finished.append(1)

    with pytest.raises(KeyboardInterrupt), meanwhile(slow):
        raise KeyboardInterrupt
    assert finished
