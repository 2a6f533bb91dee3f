"""Who computes: one process, copies of the student that average gradients (DDP), or shares of it (FSDP2, ZeRO-3).

Hugging Face `accelerate` places, wraps and synchronises; what decides a number (dtype policy, reduction, clipping, what
a checkpoint holds) is said here. Sums over processes that go into a log are taken in one place, `mean`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compress import distributed
from compress.distill import checkpoint, zero
from compress.distill.zero import Zero
from compress.errors import ConfigError

ENGINES = ("auto", "ddp", "fsdp", "deepspeed")
SHARING = ("fsdp", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """engine: one of `ENGINES`. compute: dtype of matrix products; master weights are float32. device: of this process.

    compress_gradients: rank of PowerSGD's factors, `gradients.HALVED`, None for whole gradients. exact_parameters:
    shares are gathered in float32, for parameters that 16 bits would change (codes about to be rounded). keep_gathered:
    FSDP2 gathers a block once an update and not twice. clip: largest norm of a gradient.
    """

    engine: str = "auto"
    compute: torch.dtype = torch.float32
    device: str = "cpu"
    compress_gradients: int | str | None = None
    exact_parameters: bool = False
    keep_gathered: bool = False
    clip: float = 1.0

    def resolved(self, processes: int) -> str:
        """`single`, `ddp`, `fsdp` or `deepspeed`. ConfigError for what does not go together."""
        if self.engine == "deepspeed":
            _require_deepspeed(self.device)
        engine = self.engine
        if engine == "auto":
            shards = self.device.startswith("cuda") and self.compress_gradients is None
            engine = "fsdp" if shards else "ddp"
        if self.compress_gradients is not None and engine != "ddp":
            raise ConfigError(
                f"--compress-gradients works on whole gradients, which --engine {engine} has in no process (PyTorch's "
                "hook is for DDP); pass --engine ddp"
            )
        if processes == 1:
            if self.compress_gradients is not None:
                raise ConfigError(
                    "--compress-gradients is for several processes and one runs; start them with torchrun "
                    "--nproc-per-node N -m compress distill, or leave it out"
                )
            return "single"
        return engine


def _require_deepspeed(device: str) -> None:
    """ConfigError or UnsupportedError where its engine cannot run."""
    if not distributed.running():
        raise ConfigError(
            "--engine deepspeed shares a student out to several processes and one runs; start torchrun "
            "--nproc-per-node N -m compress distill, or leave it out"
        )
    zero.imported(torch.device(device).type)


class Engine:
    """The prepared student and optimizer. Made once a process; see `start`."""

    def __init__(self, kind: str, module: nn.Module, optimizer: Any, device: torch.device, through: Any) -> None:
        self.kind = kind
        self.module = module
        self.optimizer = optimizer
        self.device = device
        self._accelerator: Any = None if kind == "deepspeed" else through
        self._zero: Zero | None = through if kind == "deepspeed" else None
        # now, while FSDP2 has gathered nothing: after a forward pass they may be others for a while
        self._named = [(name, p) for name, p in self.inner.named_parameters() if p.requires_grad]

    @classmethod
    def start(
        cls,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: EngineOptions,
        *,
        block_class: str,
        micro_batch: int,
        accumulation: int,
    ) -> Engine:
        """Wrap the student and its optimizer for the processes that are running. block_class: what FSDP2 shards by."""
        kind = options.resolved(distributed.num_processes())
        if kind == "deepspeed":
            exact, clip = options.exact_parameters, options.clip
            config = zero.settings(
                options.compute, exact=exact, micro_batch=micro_batch, passes=accumulation, clip=clip
            )
            made = Zero(student, optimizer, config, options.device)
            return cls(kind, made.module, made.optimizer, torch.device(options.device), made)
        accelerator = _accelerator(kind, options, block_class)
        module, prepared = accelerator.prepare(student, optimizer)
        return cls(kind, module, prepared.optimizer, accelerator.device, accelerator)

    @property
    def inner(self) -> nn.Module:
        """The student itself, inside what wraps it."""
        module = self.module
        while isinstance(inside := getattr(module, "module", None), nn.Module):
            module = inside
        return module

    @property
    def shares(self) -> bool:
        """Whether each process has a part of the student of its own, and not a copy."""
        return self.kind in SHARING

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The student's trained parameters, by names that no wrapper changes, in one order everywhere."""
        return self._named

    def rehearse(self, *arguments: Any) -> None:
        """One pass that changes nothing, after which DDP's buckets keep their layout; see `gradients`."""
        if self.kind != "ddp":
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            loss, _ = self.module(*arguments)
            self.backward(loss * 0)
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        if self._zero is not None:
            self._zero.backward(loss)
        else:
            self._accelerator.backward(loss)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Gradients of copies stay in each process unless this is the last pass before an update.

        Those of shares are shared out after each pass: before that they are as large as the whole model.
        """
        if self._zero is not None:
            self._zero.boundary(last)
        waits = self.kind == "ddp" and not last
        with self._accelerator.no_sync(self.module) if waits else contextlib.nullcontext():
            yield

    def clip(self, most: float) -> Tensor:
        """Scale gradients down to norm `most`; returns the norm before, at the device, the same in every process.

        DeepSpeed clips in its update, which then tells the norm; this returns 0.
        """
        if self._zero is not None:
            return torch.zeros((), device=self.device)
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in self.named_parameters()], most)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole

    def update(self, norm: float) -> float:
        """norm: what `clip` found. Returns the gradients' norm; where that is not finite, DeepSpeed changes nothing."""
        if self._zero is not None:
            return self._zero.update()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def on_its_way(self, values: Tensor) -> Callable[[], list[float]]:
        """Begins to bring numbers to the host; who calls the result waits for them, and for nothing behind them."""
        if not values.is_cuda:
            return values.tolist
        here = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> list[float]:
            arrived.synchronize()
            found: list[float] = here.tolist()
            return found

        return wait

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes of float64 values at the device, the same in every one; adds in their order."""
        if not distributed.running():
            return values
        every = [torch.empty_like(values) for _ in range(distributed.num_processes())]
        dist.all_gather(every, values)
        total = torch.zeros_like(values)
        for one in every:
            total += one
        return total / len(every)

    def agree(self, values: Sequence[float]) -> list[float]:
        """`mean` of a few numbers of the host, waited for."""
        found: list[float] = self.mean(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()
        return found

    def tensors(self, *, optimizer: bool) -> dict[str, Tensor]:
        """What a checkpoint must hold of this process: trained parameters, and the optimizer's state if asked for.

        Of copies, the first process's alone.
        """
        if self._zero is not None:
            return self._zero.tensors(optimizer=optimizer)
        writes = self.shares or distributed.rank() == 0
        return checkpoint.training_tensors(
            self.named_parameters(), self.optimizer if optimizer else None, writes=writes
        )

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back, of copies in every process."""
        if self._zero is not None:
            self._zero.restore(tensors)
        else:
            checkpoint.restore(tensors, self.named_parameters(), self.optimizer)

    def are_finite(self) -> bool:
        """Whether all trained parameters are, in every process."""
        held = self.tensors(optimizer=False).values() if self.shares else [p for _, p in self.named_parameters()]
        return math.isfinite(self.agree([float(torch.stack([t.detach().sum() for t in held]).sum())])[0])

    def whole_state(self) -> dict[str, Tensor]:
        """The student's full state on the CPU of the first process; empty in the others."""
        if self._zero is not None:
            return self._zero.whole_state()
        if self.kind == "fsdp":
            state = _gathered(self.inner)
        else:
            state = self.inner.state_dict()
        if distributed.rank() != 0:
            return {}
        return {name: value.detach().cpu() for name, value in state.items()}


def shared_precision(options: EngineOptions) -> Any:
    """FSDP2's policy: what a block gives stays in the dtype that it is gathered in, for the losses multiply in it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    gathered_in = torch.float32 if options.exact_parameters else options.compute
    return MixedPrecisionPolicy(param_dtype=gathered_in, reduce_dtype=torch.float32)


def _accelerator(kind: str, options: EngineOptions, block_class: str) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run in this process
    extra: dict[str, Any] = {}
    if kind == "fsdp":
        extra["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=not options.keep_gathered,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[block_class],
            mixed_precision_policy=shared_precision(options),
        )
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision="no", **extra)
    if kind == "fsdp" and options.device == "cpu":  # where accelerate takes no notice of its plugin, and makes copies
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = extra["fsdp_plugin"]
    return accelerator


def _gathered(module: nn.Module) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found: dict[str, Any] = get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return found
