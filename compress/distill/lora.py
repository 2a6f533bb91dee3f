"""LoRA students (Hu et al., arXiv:2106.09685) through peft: thin matrices trained beside frozen ones, and merged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.distill.models import LoadedModel
from compress.errors import ConfigError, UnsupportedError

ALPHA = 2.0  # of the rank: what a product of the thin matrices counts
_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add(loaded: LoadedModel, rank: int, seed: int) -> None:
    """Put thin matrices of `rank` beside every linear of the blocks; all other parameters are frozen.

    seed: of what they begin with, the same in every process and run.

    UnsupportedError, with the command that installs it, without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as e:
        raise UnsupportedError(
            '--lora needs peft, which is not installed; pip install "compress-toolkit[distill]"'
        ) from e
    inside = {id(m) for block in loaded.blocks for m in block.modules()}
    found = [(n, m) for n, m in loaded.model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside]
    names = [name for name, _ in found]
    least = min(min(module.weight.shape) for _, module in found)
    if not 1 <= rank <= least:
        raise ConfigError(f"--lora {rank} is outside 1..{least}, the smallest side of a matrix; pass --lora 16")
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=int(ALPHA * rank), lora_dropout=0.0, target_modules=names)
    with torch.random.fork_rng(devices=[]):  # peft makes them on the CPU
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, loaded.model)


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with thin matrices as that of an ordinary model: `W + alpha B A`, by the names of before."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if _A in name or _B in name:
            continue
        plain = name.replace(_BASE, ".")
        thin = name.replace(_BASE + "weight", "")
        if _BASE + "weight" in name and thin + _A in state:
            value = value + ALPHA * (state[thin + _B].float() @ state[thin + _A].float())
        out[plain] = value
    return out
