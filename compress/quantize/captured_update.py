"""An update that is repeated: on a GPU a CUDA graph of it, once it has run a few times.

An update of a small model or block is hundreds or thousands of launches, which take a CPU longer than the GPU takes for
them. So after the first ones it is captured, with inputs that stay where they are, and replayed. What is replayed is
not believed but proven: from one state it must take the step that the update takes without. Copies of that state, up
to three numbers for each one learned, are held meanwhile, on the CPU where they are many.

Nothing that is captured may ask the GPU. A transformers model under capture does not look whether its rows are whole
texts, as it does otherwise, but makes its attention a mask; so blocks get the masks there that they had without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.side_stream import first_cause
from compress.tell import Tell

# Updates before the capture, which choose kernels and make what the optimizer holds; all of them count.
EAGER = 3
# Updates that the CPU may be ahead of the GPU: enough for that never to wait, and progress stays true.
AHEAD = 2
# Learned numbers beyond which nothing is captured: there the GPU is the slower one, and copies of the state are large.
MOST = 1 << 29
# Learned numbers up to which the copies are held on the GPU.
FEW = 1 << 26
# How far from the update's own step a replay may end, as a share of the step (norms, of each parameter).
TOLERANCE = 1e-2


def rate_on(device: torch.device, value: float) -> float | Tensor:
    """A rate that can change (`changed_rate`): on a GPU it lies there, as a number would be part of a graph."""
    return torch.tensor(value, device=device) if device.type == "cuda" else value


def changed_rate(rate: float | Tensor, value: float) -> float | Tensor:
    """The rate with another value, in the same place if it has one. Waits for nothing."""
    return rate.fill_(value) if isinstance(rate, Tensor) else value


def adam_on(device: torch.device, groups: Sequence[dict[str, Any]]) -> torch.optim.Adam:
    """Adam whose update a graph can hold on a GPU. Each group names the rate that it `begins` with."""
    on_gpu = device.type == "cuda"
    groups = [{**group, "lr": rate_on(device, group["begins"])} for group in groups]
    return torch.optim.Adam(groups, capturable=on_gpu, foreach=True if on_gpu else None)


def set_share(adam: torch.optim.Adam, share: float) -> None:
    """Set every group's rate to this share of what it began with."""
    for group in adam.param_groups:
        group["lr"] = changed_rate(group["lr"], group["begins"] * share)


@dataclass(frozen=True, kw_only=True, eq=False)
class Changed:
    """What an update changes, in place: what is learned, and all else, such as moments, which may not be there before
    the first one."""

    learned: Sequence[Tensor]
    others: Callable[[], Sequence[Tensor]]

    @classmethod
    def by(cls, optimizer: torch.optim.Optimizer, *others: Tensor) -> Changed:
        """Its parameters and state, and these."""
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        return cls(learned=learned, others=lambda: [*state_of(optimizer), *others])


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What it holds of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [tensor for p in parameters for tensor in optimizer.state[p].values()]


class Repeated:
    """Runs `update` once a call; from the fourth call on a GPU as a graph, if that is proven. replays: of the graph.

    update: reads buffers that stay where they are, and leaves no gradients. blocks: modules whose keyword
    `attention_mask` depends on shapes alone. most: learned numbers beyond which nothing is captured. On a GPU all calls
    must be made inside `side_stream`, with an optimizer that is `capturable`.
    """

    def __init__(
        self,
        update: Callable[[], None],
        changed: Changed,
        tell: Tell,
        *,
        blocks: Sequence[nn.Module] = (),
        most: int = MOST,
    ) -> None:
        self.update, self.changed, self.blocks, self.tell, self.most = update, changed, blocks, tell, most
        self.parameters = changed.learned
        self.size = sum(p.numel() for p in self.parameters)
        self.on_gpu = self.parameters[0].is_cuda
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = self.replays = 0
        self.running: list[Any] = []

    def __call__(self) -> None:
        if self.graph is not None:
            self._replay(self.graph)
        elif self.on_gpu and self.calls == EAGER and self.size <= self.most:
            self._first_captured()
        else:
            self.update()
        self.calls += 1
        if self.on_gpu:
            event = torch.cuda.Event()
            event.record()
            self.running.append(event)
            if len(self.running) > AHEAD:
                self.running.pop(0).synchronize()

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.replay()
        self.replays += 1

    def _first_captured(self) -> None:
        """This call's update by a graph, or, where that cannot be or differs, as those before it."""
        before: list[Tensor] = []
        try:
            before = [self._copy(tensor) for tensor in self._changed()]
            with _Masks(self.blocks) as masks:
                self.update()
                alone = [self._copy(p) for p in self.parameters]
                self._restore(before)
                masks.stay = True
                graph = self._captured()
            self._replay(graph)
            apart = [_apart(*three) for three in zip(self.parameters, alone, before, strict=False)]
            wrong = [one for one in apart if not one <= TOLERANCE]  # also what is not a number
            if not wrong:
                self.graph = graph
                return
            reason = f"it ends {wrong[0]:.1e} of a step from where it does without"
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as e:
            reason = first_cause(e)
        self.tell.say(f"updating without a CUDA graph, which takes longer: {reason}")
        self.replays = 0
        for p in self.parameters:
            p.grad = None
        self._restore(before)
        self.update()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A graph of the update. RuntimeError where it waits for the GPU inside it."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # A graph's memory is its own, and cannot be had of what is cached. `torch.cuda.graph` drops that always, and it
        # would have to be had anew for every block.
        if torch.cuda.mem_get_info()[0] < torch.cuda.memory_reserved():
            torch.cuda.empty_cache()
        # Other threads may be compiling or writing, and are not to be stopped by this.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            self.update()
        finally:
            graph.capture_end()
        return graph

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(tensor.device if self.size <= FEW else "cpu", copy=True)

    def _changed(self) -> list[Tensor]:
        """All that an update changes, parameters first."""
        return [*self.parameters, *self.changed.others()]

    @torch.no_grad()
    def _restore(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self._changed(), values, strict=False):  # none where copying failed
            tensor.copy_(value)


@torch.no_grad()
def _apart(found: Tensor, expected: Tensor, before: Tensor) -> float:
    """The distance of two ends of a step, as a share of the step."""
    found = found.to(expected.device)
    distance, step = float((found - expected).norm()), float((expected - before).norm())
    return distance / step if step else (0.0 if distance == 0 else float("inf"))


class _Masks:
    """As a context: the attention masks that blocks are given. stay: they are given the last ones before this again."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks, self.stay = blocks, False
        self.last: dict[nn.Module, Any] = {}
        self.hooks: list[Any] = []

    def __enter__(self) -> _Masks:
        self.hooks = [block.register_forward_pre_hook(self._give, with_kwargs=True) for block in self.blocks]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _give(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self.stay and block in self.last:
            return args, {**kwargs, "attention_mask": self.last[block]}
        if "attention_mask" in kwargs:
            self.last[block] = kwargs["attention_mask"]
        return args, kwargs
