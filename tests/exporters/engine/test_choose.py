"""Which library builds for which card, and what is said when none does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from compress.errors import ConfigError
from exporters.engine.choose import Builder, OnDevice, choose, compiles_for
from exporters.sizing.targets import TARGETS

RTX = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


def installed(*libraries: str) -> Callable[[str], tuple[str, ...] | None]:
    cards = {"tensorrt": (), "tensorrt-rtx": RTX}
    return lambda name: cards[name] if name in libraries else None


def test_absent_card_that_tensorrt_rtx_knows() -> None:
    built = choose(TARGETS["a100"], None, here=None, known=installed("tensorrt", "tensorrt-rtx"))
    assert built == Builder(library="tensorrt-rtx", bindings="tensorrt_rtx", sm=80)


@pytest.mark.parametrize("target", ["a100", "h100", "orin"])
def test_card_of_this_machine_is_tensorrt_s(target: str) -> None:
    built = choose(TARGETS[target], None, here=TARGETS[target].sm, known=installed("tensorrt", "tensorrt-rtx"))
    assert built == Builder(library="tensorrt", bindings="tensorrt", sm=None)


@pytest.mark.parametrize(
    ("target", "libraries", "here", "said"),
    [
        ("orin", ("tensorrt", "tensorrt-rtx"), None, "orin is SM 8.7, the GPU of this machine is none, .* 12.1 only"),
        ("h100", ("tensorrt",), "8.0", "h100 is SM 9.0, the GPU of this machine is SM 8.0.*pip install"),
        ("a100", (), None, r'TensorRT-RTX is not installed; pip install "compress-toolkit\[tensorrt-rtx\]"'),
    ],
)
def test_nothing_here_builds_for_it(target: str, libraries: tuple[str, ...], here: str | None, said: str) -> None:
    left = choose(TARGETS[target], None, here=here, known=installed(*libraries))
    assert isinstance(left, OnDevice)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(left.reason)


@pytest.mark.parametrize(
    ("target", "asked", "libraries", "here", "said"),
    [
        (
            "a100",
            "tensorrt-rtx",
            (),
            None,
            r'not installed for this Python; pip install "compress-toolkit\[tensorrt-rtx',
        ),
        ("a100", "tensorrt", (), None, r'pip install "compress-toolkit\[tensorrt\]"'),
        ("a100", "tensorrt", ("tensorrt",), "9.0", r"this machine \(SM 9.0\), and a100 is SM 8.0; leave --builder out"),
        ("orin", "tensorrt-rtx", ("tensorrt-rtx",), None, "compiles for SM 7.5, .*, and orin is SM 8.7"),
        ("orin", None, (), "8.7", r"orin\'s GPU is here, and TensorRT is not installed .*compress-toolkit\[tensorrt\]"),
    ],
)
def test_refusals(target: str, asked: str | None, libraries: tuple[str, ...], here: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose(TARGETS[target], asked, here=here, known=installed(*libraries))


def test_cards_are_read_from_the_library() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TENSORRT-RTX ABSENT, NOTHING COMPILED: pip install '.[tensorrt-rtx]'")
    found = compiles_for("tensorrt-rtx")
    assert found is not None and {"8.0", "8.6", "8.9"} <= set(found) and "8.7" not in found
