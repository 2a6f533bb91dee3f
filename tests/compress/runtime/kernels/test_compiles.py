"""Every kernel compiles for the cards that it is for, with the settings it is launched with. Nothing is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import UnsupportedError
from compress.runtime.kernels import decode, nvrtc, weight_only

CARDS = ("80", "87", "90")
DECODE = [{"SIZE": size, "HEADS": heads, "CHUNK": chunk} for size, heads, chunk in ((64, 4, 32), (128, 1, 128))]
LINEAR = [
    {
        "BITS": bits, "GROUP": group, "RUN": run, "TILES": tiles, "WARPS": warps, "ROWS": rows, "GATED": gated,
        "NORMED": int(fused == "normed"), "ADDED": int(fused == "added"),
    }
    for bits, group, run, tiles, warps, rows, gated, fused in (
        (4, 128, 1, 1, 8, 1, 0, ""), (4, 128, 1, 1, 4, 1, 1, "normed"), (4, 32, 2, 8, 4, 2, 1, ""),
        (8, 0, 2, 1, 16, 1, 0, "added"), (8, 128, 1, 2, 8, 1, 1, ""), (16, 0, 1, 1, 16, 2, 0, "normed"),
        (4, 128, 1, 8, 8, 2, 0, "added"), (4, 64, 1, 4, 8, 2, 1, "normed"),
    )
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        nvrtc._nvrtc()
    except UnsupportedError as e:
        pytest.skip(f"NVRTC ABSENT, NOTHING COMPILED: pip install nvidia-cuda-nvrtc ({e})")


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    ("source", "values"), [*((decode.SOURCE, v) for v in DECODE), *((weight_only.SOURCE, v) for v in LINEAR)]
)
def test_compiles(source: Path, values: dict[str, int], card: str) -> None:
    options = [f"--gpu-architecture=sm_{card}", "--std=c++17", *(f"-D{k}={v}" for k, v in values.items())]
    image = nvrtc._cubin(source, options)
    assert image[:4] == b"\x7fELF" and len(image) > 5000


def test_what_does_not_compile_is_one_sentence() -> None:
    with pytest.raises(UnsupportedError, match=r"decode.cu does not compile for --gpu-architecture=sm_80: .*SIZE"):
        nvrtc._cubin(decode.SOURCE, ["--gpu-architecture=sm_80", "--std=c++17"])
