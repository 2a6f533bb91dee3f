"""A model's next ids, drawn for many rows at once, a token of each at a time.

On a GPU a step of a small model is a thousand launches, which take a CPU longer than the GPU takes for them; so there
it is captured once, with buffers and a cache that stay where they are, and replayed. What is replayed is not believed
but proven: it must draw what the model draws without, or what lies next to that by rounding.

Shapes: B rows, T seq_len, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.one_query import one_query
from compress.side_stream import first_cause, side_stream
from compress.tell import Tell

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions at which the graph must draw what the model does without it, and the share of rows that may differ.
_PROOF_POSITIONS, _PROOF_SHARE = 12, 0.01
# How far a row's number may lie outside the part of [0, 1) that the model gives the id the graph draws: an id lies next
# to another where the number falls within rounding of the bound between them, and many ids have many bounds, so that
# differing ids alone tell of nothing wrong.
_PROOF_DISTANCE = 1e-3


class Drawer:
    """Draws the next id of every row, with a cache that grows. num_ids: ids behind these are never drawn."""

    def __init__(self, model: PreTrainedModel, num_ids: int) -> None:
        self.model, self.num_ids = model, num_ids
        self.cache: Any = None
        self.uniform_BT = torch.empty(0, 0)

    def begin(self, uniform_BT: Tensor) -> None:
        """Begin rows anew; they are drawn by these numbers."""
        self.cache, self.uniform_BT = None, uniform_BT

    def draw(self, ids_B1: Tensor, position: int) -> list[int]:
        """The ids after these, which are at `position`."""
        logits_B1V = self._logits(ids_B1)
        return self._drawn(logits_B1V, self.uniform_BT[:, position].to(self.model.device)).tolist()

    def off(self, ids_B1: Tensor, position: int, drawn: Sequence[int]) -> Tensor:
        """A step like `draw`, for ids that another drew: how far each row's number lies outside the part of its id.

        float64 [B], 0 inside; the parts are those of [0, 1) by the cumulative probability.
        """
        probability_BV = self._probability(self._logits(ids_B1))
        device = probability_BV.device
        return _outside(probability_BV, self.uniform_BT[:, position].to(device), torch.tensor(drawn, device=device))

    def _logits(self, ids_B1: Tensor) -> Tensor:
        output = self.model(input_ids=ids_B1.to(self.model.device), past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        logits_B1V: Tensor = output.logits
        return logits_B1V

    def _probability(self, logits_B1V: Tensor) -> Tensor:
        return logits_B1V[:, -1, : self.num_ids].double().softmax(-1)

    def _drawn(self, logits_B1V: Tensor, uniform_B: Tensor) -> Tensor:
        return invert(self._probability(logits_B1V), uniform_B)


class FixedDrawer(Drawer):
    """Draws with a cache and buffers that stay where they are, so that a step can be a CUDA graph."""

    def __init__(self, model: PreTrainedModel, num_ids: int, num_rows: int, seq_len: int) -> None:
        from transformers import StaticCache

        super().__init__(model, num_ids)
        length = -(-seq_len // 8) * 8  # masks of other lengths are copied to aligned ones at every step
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.cache.layers = [_without_window(layer, length) for layer in self.cache.layers]
        self.ids_B1 = torch.zeros(num_rows, 1, dtype=torch.int64, device=model.device)
        self.uniform_B = torch.zeros(num_rows, dtype=torch.float64, device=model.device)
        self.drawn_B = torch.zeros(num_rows, dtype=torch.int64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.step()  # allocates the cache

    @property
    def has_fixed_layers(self) -> bool:
        """Whether no layer counts tokens on the host, as windows that slide do, or holds something else."""
        return all(type(layer).__name__ == "StaticLayer" for layer in self.cache.layers)

    def step(self) -> Tensor:
        """One more id of each row into `drawn_B`; the logits."""
        with one_query(self.model):
            logits: Tensor = self.model(input_ids=self.ids_B1, past_key_values=self.cache, use_cache=True).logits
        self.drawn_B.copy_(self._drawn(logits, self.uniform_B))
        return logits

    def capture(self) -> None:
        """Make the step a CUDA graph. RuntimeError where the model waits for the GPU inside it."""
        with side_stream(self.model.device):
            for _ in range(2):
                self.step()
        graph = torch.cuda.CUDAGraph()
        # Other threads may be reading the first block, or compiling, and are not to be stopped by this.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.step()
        self.graph = graph

    def begin(self, uniform_BT: Tensor) -> None:
        self.cache.reset()
        self.uniform_BT = uniform_BT.to(self.model.device)

    def draw(self, ids_B1: Tensor, position: int) -> list[int]:
        self.ids_B1.copy_(ids_B1)
        self.uniform_B.copy_(self.uniform_BT[:, position])
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        return self.drawn_B.tolist()


def _without_window(layer: Any, length: int) -> Any:
    """A cache layer whose window holds so many tokens never slides, so it is one without: no count on the host."""
    from transformers.cache_utils import StaticLayer

    never_slides = type(layer).__name__ == "StaticSlidingWindowLayer" and layer.max_cache_len == length
    return StaticLayer(max_cache_len=length) if never_slides else layer


def drawer_of(model: PreTrainedModel, num_ids: int, num_rows: int, seq_len: int, tell: Tell) -> Drawer:
    """How rows are drawn on the model's device: on a GPU by a CUDA graph, where it is proven to draw the same."""
    plain = Drawer(model, num_ids)
    if model.device.type != "cuda" or seq_len <= _PROOF_POSITIONS:
        return plain
    reason = "its cache does not hold whole sequences alone"
    try:
        fixed = FixedDrawer(model, num_ids, num_rows, seq_len)
        if fixed.has_fixed_layers:
            fixed.capture()
            if draws_alike(fixed, plain, num_rows):
                return fixed
            reason = "it draws other tokens than the model without it"
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as e:
        reason = first_cause(e)
    tell.say(f"sampling without a CUDA graph, which takes longer: {reason}")
    return plain


def draws_alike(fixed: Drawer, plain: Drawer, num_rows: int) -> bool:
    """Whether `fixed` draws from the same tokens what `plain` does, but for rounding; `plain` keeps no cache of it."""
    generator = torch.Generator().manual_seed(0)
    uniform_BT = torch.rand(num_rows, _PROOF_POSITIONS, dtype=torch.float64, generator=generator)
    ids_BT = torch.randint(0, plain.num_ids, uniform_BT.shape, generator=generator)
    fixed.begin(uniform_BT)
    plain.begin(uniform_BT)
    differing = 0
    for position in range(_PROOF_POSITIONS):
        ids_B1 = ids_BT[:, position : position + 1]
        off_B = plain.off(ids_B1, position, fixed.draw(ids_B1, position))
        differing += num_rows - int((off_B <= _PROOF_DISTANCE).sum())  # what is not a number differs too
    plain.begin(uniform_BT)
    return differing <= max(1, _PROOF_SHARE * num_rows * _PROOF_POSITIONS)


def invert(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The id at which each row's cumulative probability first exceeds its uniform number: int64 [B]."""
    cumulative_BV = probability_BV.cumsum(-1)
    # scaled to the sum: rounding may leave that a little below 1, and the target must not lie behind it
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    id_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    return id_B1[:, 0].clamp(max=probability_BV.shape[-1] - 1)


def _outside(probability_BV: Tensor, uniform_B: Tensor, id_B: Tensor) -> Tensor:
    """How far each row's number, scaled as `invert` does, lies outside its id's part: float64 [B]."""
    cumulative_BV = probability_BV.cumsum(-1)
    target_B = uniform_B * cumulative_BV[:, -1]
    end_B = cumulative_BV.gather(-1, id_B[:, None])[:, 0]
    start_B = cumulative_BV.gather(-1, (id_B - 1).clamp(min=0)[:, None])[:, 0].where(id_B > 0, 0.0)
    return torch.maximum(start_B - target_B, target_B - end_B).clamp(min=0)
