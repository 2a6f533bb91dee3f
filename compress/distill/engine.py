"""Who computes: one process, copies of the student that average gradients (DDP), or shares of it (FSDP2, ZeRO-3).

Hugging Face `accelerate` places, wraps and synchronises; what decides a number (dtype policy, reduction, clipping, what
a checkpoint holds) is said here. Sums over processes that go into a log are taken in one place, `agree`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compress import distributed
from compress.errors import ConfigError, UnsupportedError

ENGINES = ("auto", "ddp", "fsdp", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """engine: one of `ENGINES`. compute: dtype of matrix products; master weights are float32. device: of this process.

    compress_gradients: rank of PowerSGD's factors, `gradients.HALVED`, None for whole gradients. exact_parameters:
    shares are gathered in float32, for parameters that 16 bits would change (codes about to be rounded). clip: largest
    norm of a gradient.
    """

    engine: str = "auto"
    compute: torch.dtype = torch.float32
    device: str = "cpu"
    compress_gradients: int | str | None = None
    exact_parameters: bool = False
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
        if processes == 1 and engine != "deepspeed":
            if self.compress_gradients is not None:
                raise ConfigError(
                    "--compress-gradients is for several processes and one runs; start them with torchrun "
                    "--nproc-per-node N -m compress distill, or leave it out"
                )
            return "single"
        return engine


def _require_deepspeed(device: str) -> None:
    """ConfigError or UnsupportedError where its engine cannot run."""
    if not device.startswith("cuda") or not distributed.running():
        found = "one process" if device.startswith("cuda") else f"device {device}"
        raise ConfigError(
            f"--engine deepspeed is for several GPUs under torchrun, and this is {found}; start torchrun "
            "--nproc-per-node N -m compress distill --device cuda, or use --engine fsdp"
        )
    try:
        importlib.import_module("deepspeed")
    except ImportError as e:
        raise UnsupportedError(
            '--engine deepspeed needs deepspeed, which is not installed; pip install "compress-toolkit[deepspeed]", or '
            "use --engine fsdp, which shards as much"
        ) from e


class Engine:
    """The prepared student and optimizer. Made once a process; see `start`."""

    def __init__(self, accelerator: Any, kind: str, module: nn.Module, optimizer: Any, options: EngineOptions) -> None:
        self._accelerator = accelerator
        self.kind = kind
        self.module = module
        self.optimizer = optimizer
        self.options = options
        self.device: torch.device = accelerator.device
        self._named: list[tuple[str, nn.Parameter]] = []

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
        accelerator = _accelerator(kind, options, block_class, micro_batch, accumulation)
        module, prepared = accelerator.prepare(student, optimizer)
        return cls(accelerator, kind, module, prepared, options)

    @property
    def inner(self) -> nn.Module:
        """The student itself, inside what wraps it."""
        module = self.module
        while isinstance(inside := getattr(module, "module", None), nn.Module):
            module = inside
        return module

    @property
    def keeps(self) -> bool:
        """Whether a checkpoint can hold this run: what DeepSpeed shares out is not where `checkpoint` looks for it."""
        return self.kind != "deepspeed"

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The student's trained parameters, by names that no wrapper changes, in one order everywhere."""
        if not self._named:
            self._named = [(name, p) for name, p in self.inner.named_parameters() if p.requires_grad]
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
        self._accelerator.backward(loss)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Gradients of copies stay in each process unless this is the last pass before an update.

        Those of shares are shared out after each pass: before that they are as large as the whole model.
        """
        if self.kind == "deepspeed":
            self.module.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        waits = self.kind == "ddp" and not last
        with self._accelerator.no_sync(self.module) if waits else contextlib.nullcontext():
            yield

    def clip(self, most: float) -> Tensor:
        """Scale gradients down to norm `most`; returns the norm before, at the device, the same in every process."""
        if self.kind == "deepspeed":  # clips inside its own step
            return torch.zeros((), device=self.device)
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in self.named_parameters()], most)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

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

    def agree(self, values: Sequence[float]) -> list[float]:
        """The mean over processes of a few numbers, the same in every process; adds in the order of processes."""
        if not distributed.running():
            return [float(v) for v in values]
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        every = [torch.empty_like(mine) for _ in range(distributed.num_processes())]
        dist.all_gather(every, mine)
        total = torch.zeros_like(mine)
        for one in every:
            total += one
        return [float(v) for v in total / len(every)]

    def whole_state(self) -> dict[str, Tensor]:
        """The student's full state on the CPU of the first process; empty in the others."""
        if self.kind == "deepspeed":
            state = self._accelerator.get_state_dict(self.module)
        elif self.kind == "fsdp":
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


def _accelerator(kind: str, options: EngineOptions, block_class: str, micro_batch: int, accumulation: int) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run in this process
    extra: dict[str, Any] = {}
    if kind == "fsdp":
        extra["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[block_class],
            mixed_precision_policy=shared_precision(options),
        )
    if kind == "deepspeed":
        extra["deepspeed_plugin"] = DeepSpeedPlugin(
            hf_ds_config={
                "zero_optimization": {"stage": 3},
                "bf16": {"enabled": options.compute == torch.bfloat16},
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": options.clip,
                "zero_allow_untested_optimizer": True,
            }
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
