"""DeepSpeed's ZeRO-3: each process keeps a share of parameters, gradients and the optimizer's state.

What it is given decides numbers as for the other engines: the same AdamW on float32 masters as loaded (its own `bf16`
would begin with weights rounded to 16 bits). Of linear layers, parameters are gathered and gradients summed over
processes in the dtype of matrix products, all else in float32; sums over passes are float32. DeepSpeed is called
itself: through `accelerate` every backward pass is an update as well, and there is no look at a loss between the two.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ArtifactError, ConfigError, UnsupportedError

SHARE, STATE = "param.", "optim."
# Parameters that a process may have whole at once, and gradients that are sent together.
LIVE, SENT = 1_000_000_000, 100_000_000


def settings(compute: torch.dtype, *, exact: bool, micro_batch: int, passes: int, clip: float) -> dict[str, Any]:
    """DeepSpeed's configuration. exact: nothing is gathered in fewer bits than it is kept in."""
    narrow = compute == torch.bfloat16 and not exact
    return {
        "zero_optimization": {"stage": 3, "stage3_max_live_parameters": LIVE, "reduce_bucket_size": SENT},
        "torch_autocast": {"enabled": narrow, "dtype": "bfloat16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
    }


class Zero:
    """DeepSpeed's engine around a student. module: what is called. device: of this process."""

    def __init__(
        self, student: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any], device: str
    ) -> None:
        deepspeed = imported(torch.device(device).type)
        self._tools, self._gathered = deepspeed.utils, deepspeed.zero.GatheredParameters
        for tensor in (*student.parameters(), *student.buffers()):
            if tensor.stride() != torch.empty(tensor.shape, device="meta").stride():
                # codes lie as their file packs them, and it sends bytes (one column has any stride and is contiguous)
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        with contextlib.redirect_stdout(sys.stderr):
            made = deepspeed.initialize(model=student, optimizer=optimizer, config=dict(config))
        self.module, self.optimizer = made[:2]

    def boundary(self, last: bool) -> None:
        """Before a forward pass: whether an update follows its backward pass."""
        self.module.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss, scale_wrt_gas=False)

    def update(self) -> float:
        """The gradients' norm before they were clipped. Without an update where that is not finite."""
        self.module.step()
        return float(self.module.get_global_grad_norm())

    def tensors(self, *, optimizer: bool) -> dict[str, Tensor]:
        """This process's shares of the parameters, and of the optimizer's state if asked for."""
        held = self.optimizer.state_dict()
        out = {f"{SHARE}{i}": share.detach() for i, share in enumerate(held["fp32_flat_groups"])}
        if optimizer:
            for i, state in held["optimizer_state_dict"]["state"].items():
                out.update({f"{STATE}{i}.{key}": value for key, value in state.items()})
        return out

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back. ArtifactError where they are of other shapes."""
        held = self.optimizer.state_dict()
        shares = held["fp32_flat_groups"]
        stored = [tensors.get(f"{SHARE}{i}") for i in range(len(shares))]
        for i, (mine, value) in enumerate(zip(shares, stored, strict=True)):
            if value is None or value.shape != mine.shape:
                raise ArtifactError(f"the checkpoint has no share {i} of {mine.numel()} numbers; pass --no-resume")
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(STATE):
                number, key = name.removeprefix(STATE).split(".", 1)
                states.setdefault(int(number), {})[key] = value
        held["fp32_flat_groups"] = stored
        held["optimizer_state_dict"] = {**held["optimizer_state_dict"], "state": states}
        self.optimizer.checkpoint_event_prologue()
        self.optimizer.load_state_dict({torch.distributed.get_rank(): held}, load_optimizer_states=bool(states))
        self.optimizer.checkpoint_event_epilogue()

    def whole_state(self) -> dict[str, Tensor]:
        """Every tensor of the student's state, gathered one by one, on the CPU of the first process; {} elsewhere."""
        first = torch.distributed.get_rank() == 0
        student = self.module.module
        kept = student.state_dict().keys()
        out: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        for name, parameter in student.named_parameters(remove_duplicate=False):
            if id(parameter) not in names:
                if parameter.requires_grad:
                    whole = self._tools.safe_get_full_fp32_param(parameter)
                else:
                    with self._gathered([parameter]):
                        whole = parameter.detach().clone()
                out[name] = whole.cpu() if first else torch.empty(0)
                names[id(parameter)] = name
            out[name] = out[names[id(parameter)]]
        out.update({name: value.cpu() for name, value in student.named_buffers() if name in kept})
        return out if first else {}


def imported(kind: str) -> Any:
    """DeepSpeed for devices of one kind. It writes to standard error, and only what is wrong.

    To be called before transformers is imported, which imports it too. UnsupportedError where it is missing,
    ConfigError where it was set up for other devices.
    """
    os.environ.setdefault("DS_ACCELERATOR", kind)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            deepspeed = importlib.import_module("deepspeed")
    except ImportError as e:
        raise UnsupportedError(
            '--engine deepspeed needs deepspeed, which is not installed; pip install "compress-toolkit[deepspeed]", or '
            "use --engine fsdp, which shards as much"
        ) from e
    # its calls of PyTorch's, at every gathering
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    found = deepspeed.accelerator.get_accelerator().device_name()
    if found != kind:
        raise ConfigError(f"DeepSpeed is set up for {found} and --device is {kind}; set DS_ACCELERATOR={kind}")
    return deepspeed
