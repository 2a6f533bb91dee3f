"""What a card says: tegrastats' lines, who is asked on which machine, and samples from a source that ticks."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from evaluators import card
from evaluators.card import Clock, Nothing, Tegrastats, is_jetson, parse_tegrastats, watching

# Written here after the format of NVIDIA's Developer Guide ("Tegrastats Utility"), one per release.
ORIN = (
    "11-26-2026 10:11:12 RAM 9216/62841MB (lfb 22x4MB) SWAP 0/31420MB (cached 0MB) CPU [3%@2201,0%@2201,off,off] "
    "EMC_FREQ 41%@3199 GR3D_FREQ 98%@[1300,1298] VIC_FREQ 0%@115 APE 174 GPU@51.2C VDD_GPU_SOC 18012mW/17500mW"
)
XAVIER = "RAM 2045/7765MB (lfb 1x2MB) SWAP 12/3882MB CPU [12%@1190] EMC_FREQ 0%@1600 GR3D_FREQ 62%@318 APE 150"
WITHOUT_ROOT = "RAM 512/7620MB (lfb 4x4MB) CPU [2%@729,1%@729] GR3D_FREQ 0% cpu@48.5C tj@50C"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (ORIN, Clock(mhz=1300, used_bytes=9216 << 20, utilisation=98)),
        (XAVIER, Clock(mhz=318, used_bytes=2045 << 20, utilisation=62)),
        (WITHOUT_ROOT, Clock(mhz=None, used_bytes=512 << 20, utilisation=0)),
        ("tegrastats: permission denied", card.SILENT),
    ],
)
def test_lines_of_tegrastats(line: str, wanted: Clock) -> None:
    assert parse_tegrastats(line) == wanted


def test_tegrastats_is_followed_and_ended(tmp_path: Path) -> None:
    """A program that prints as it does: the last line counts, and nothing is left running."""
    program = tmp_path / "tegrastats"
    program.write_text(f"#!/bin/sh\necho '{XAVIER}'\nsleep 0.1\necho '{ORIN}'\nexec sleep 60\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with watching(lambda: Tegrastats([str(program)]), interval=0.02) as watched:
        end = time.monotonic() + 10
        while watched.now().mhz != 1300 and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.1)
    assert watched.now() == parse_tegrastats(ORIN)
    assert watched.most_used_bytes() == 9216 << 20 and 62 <= (watched.utilisation() or 0) <= 98


def test_who_is_a_jetson(tmp_path: Path) -> None:
    assert not is_jetson(tmp_path)
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_bytes(b"Raspberry Pi 5\0")
    assert not is_jetson(tmp_path)
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    assert is_jetson(tmp_path)


def test_nvml_is_never_asked_on_a_jetson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never() -> None:
        raise AssertionError("NVML was asked")

    monkeypatch.setattr(card, "Nvml", never)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = card.source_of(has_gpu=True, jetson=True)
    assert isinstance(found, Nothing) and "tegrastats is not on PATH" in found.why
    told = card.source_of(has_gpu=True, jetson=False)
    assert isinstance(told, Nothing) and "NVML cannot be asked (NVML was asked)" in told.why


def test_without_a_card_nothing_is_said() -> None:
    found = card.source_of(has_gpu=False, jetson=False)
    assert isinstance(found, Nothing) and not found.why and found.read() == card.SILENT


def test_samples_are_taken_while_the_body_runs() -> None:
    class Ticks(Nothing):
        count = 0

        def read(self) -> Clock:
            self.count += 1
            return Clock(mhz=1000, used_bytes=self.count, utilisation=50 if self.count % 2 else 100)

    with watching(Ticks, interval=0.01) as watched:
        time.sleep(0.3)
    taken = len(watched.samples)
    assert taken >= 4 and watched.most_used_bytes() == taken and 50 <= (watched.utilisation() or 0) <= 100
