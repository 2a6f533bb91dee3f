"""What makes an ONNX folder run by itself: a script that needs onnxruntime, numpy and tokenizers, and their pins.

A chat template needs jinja2 as well.
"""

from __future__ import annotations

from pathlib import Path

from compress.files import write_bytes_atomically

FILES = ("run.py", "requirements.txt")


def pins() -> list[str]:
    """The packages that run.py needs, `name==version` each."""
    lines = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if "==" in line]


def copy_into(folder: Path) -> None:
    """Put the bundle's files into `folder`."""
    for name in FILES:
        write_bytes_atomically(folder / name, (Path(__file__).parent / name).read_bytes())
