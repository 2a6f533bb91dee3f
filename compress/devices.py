"""Which device computes, and in which arithmetic, when the user did not say or asks for what is not there."""

from __future__ import annotations

from pathlib import Path

from compress.errors import ConfigError

AUTO = "auto"


def pick_device(asked: str) -> str:
    """`auto`: the GPU if PyTorch can use one, else the CPU; otherwise what was asked for.

    Raises ConfigError for a device that is neither cpu nor cuda, or that is not there.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == AUTO:
        return "cuda" if count else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {asked} is neither cpu nor cuda[:N]; pass one of these, or leave it out")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"--device {asked} is not there: PyTorch {torch.__version__} can use {count} GPUs; pass --device cpu, or "
            "install a PyTorch for this GPU's driver"
        )
    return asked


def pick_dtype(asked: str, device: str) -> str:
    """`auto`: bfloat16 on a GPU, whose matrix units want 16 bits, float32 on the CPU; otherwise what was asked for."""
    if asked != AUTO:
        return asked
    return "bfloat16" if device.startswith("cuda") else "float32"


def described(device: str) -> str:
    """The device as a person knows it: `cpu`, or `cuda (NVIDIA H100 80GB HBM3)`."""
    if device == "cpu":
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def available(device: str) -> int:
    """Bytes that can still be taken: of the GPU, what this process keeps of it unused included, or of the machine and
    this process's control group."""
    import torch

    if device.startswith("cuda"):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    import psutil

    free = int(psutil.virtual_memory().available)
    most, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, int(most.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no control group, or no limit in it
        return free
