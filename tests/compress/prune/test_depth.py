"""Damage of blocks against transformers with the blocks taken out, one model at a time."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.divergence import divergences
from compress.model import StreamedModel
from compress.prune import depth
from compress.prune.depth import Depth, Removal, SpanInfluence, measure_depth, sweep

Build = Callable[..., Path]
BLOCKS = 5


@pytest.fixture
def folder(build_model: Build) -> Path:
    return build_model(num_hidden_layers=BLOCKS)


def ids(rows: int = 3, length: int = 24) -> Tensor:
    return torch.randint(0, 4096, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def slow(folder: Path, kept: Sequence[int]) -> Tensor:
    """Log-probabilities `[N, T, V]` of a model with only the blocks `kept`, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in kept])
    logits: Tensor = model(ids(), use_cache=False).logits
    return logits.log_softmax(-1)


def slow_divergence(folder: Path, kept: Sequence[int]) -> float:
    log_p, log_q = slow(folder, range(BLOCKS)).double(), slow(folder, kept).double()
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_a_sweep_runs_every_candidate_as_if_it_were_the_model(folder: Path) -> None:
    model = StreamedModel.open(folder)
    entering = model.embed_batches(ids().split(2))
    whole = sweep(model, entering, range(BLOCKS), [])
    candidates = [(0,), (2,), (4,), (1, 2), (2, 3, 4)]
    swept = sweep(model, entering, range(BLOCKS), candidates)
    found = divergences(model, whole.final, [swept.candidates[c] for c in candidates])
    for candidate, divergence in zip(candidates, found, strict=True):
        kept = [i for i in range(BLOCKS) if i not in candidate]
        assert divergence == pytest.approx(slow_divergence(folder, kept), rel=1e-4), candidate
        assert sorted(swept.influence[candidate]) == kept
    assert divergences(model, whole.final, [swept.final]) == [pytest.approx(0, abs=1e-9)]


def test_greedy_takes_the_best_each_time_and_spans_are_tried(folder: Path) -> None:
    model = StreamedModel.open(folder)
    found = measure_depth(model, ids(), 2, batch=3, candidates=BLOCKS, spans=BLOCKS)
    everything = set(range(BLOCKS))
    costs = {i: slow_divergence(folder, sorted(everything - {i})) for i in everything}
    first = min(costs, key=lambda i: costs[i])
    assert found.removals[0].block == first
    assert found.removals[0].tried == pytest.approx(costs, rel=1e-4)
    seconds = {i: slow_divergence(folder, sorted(everything - {first, i})) for i in everything - {first}}
    assert found.removals[1].tried == pytest.approx(seconds, rel=1e-4)
    spans = {(i, 2): slow_divergence(folder, sorted(everything - {i, i + 1})) for i in range(BLOCKS - 1)}
    assert found.spans == pytest.approx(spans, rel=1e-4)
    assert found.divergence(2) == pytest.approx(min(*seconds.values(), *spans.values()), rel=1e-4)
    assert found.divergence(2) == pytest.approx(slow_divergence(folder, found.kept(2)), rel=1e-4)
    assert found.kept(1) == sorted(everything - {first}) and found.divergence(1) == found.removals[0].divergence
    assert Depth.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_run_of_neighbours_that_costs_less_goes_instead() -> None:
    steps = [Removal(block=1, divergence=0.1, tried={}), Removal(block=3, divergence=0.5, tried={})]
    found = Depth(influence=[0.0] * 5, removals=steps, spans={(0, 2): 0.6, (2, 2): 0.4})
    assert found.kept(2) == [0, 1, 4] and found.divergence(2) == 0.4
    assert found.kept(1) == [0, 2, 3, 4] and found.kept(0) == [0, 1, 2, 3, 4]


def test_few_candidates_are_the_least_influential(folder: Path) -> None:
    model = StreamedModel.open(folder)
    found = measure_depth(model, ids(), 1, batch=3, candidates=2)
    least = sorted(range(BLOCKS), key=lambda i: found.influence[i])[:2]
    assert sorted(found.removals[0].tried) == sorted(least)


def test_influence_is_one_minus_the_cosine(folder: Path) -> None:
    model = StreamedModel.open(folder)
    entering = model.embed_batches(ids().split(3))
    swept = sweep(model, entering, range(BLOCKS), [])
    states = [entering[0]]
    with torch.no_grad():
        for index in range(BLOCKS):
            model.load_block(index)
            states.append(model.run_block(index, states[-1]))
            model.release_block(index)

    def turned(a: Tensor, b: Tensor) -> float:
        cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        return float((1 - cosine).mean())

    expected = [turned(states[i], states[i + 1]) for i in range(BLOCKS)]
    assert [swept.influence[()][i] for i in range(BLOCKS)] == pytest.approx(expected, rel=1e-3)
    found = SpanInfluence((2, 3))
    sweep(model, entering, range(BLOCKS), [], seen=found.see)
    for length in (2, 3):
        spans = [turned(states[i], states[i + length]) for i in range(BLOCKS + 1 - length)]
        assert found.influence[length] == pytest.approx(spans, rel=1e-3)
        order = sorted(range(len(spans)), key=lambda i: spans[i])
        assert [run for run in found.least(2) if len(run) == length] == [tuple(range(i, i + length)) for i in order[:2]]


def test_a_sweep_goes_on_where_the_last_one_branched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks before the first candidate are not loaded again, and nothing that is measured changes."""
    model = StreamedModel.open(folder)
    loaded: list[int] = []
    load = model.load_block
    monkeypatch.setattr(model, "load_block", lambda index, *args: (loaded.append(index), load(index, *args))[1])
    found = measure_depth(model, ids(), 3, batch=2, candidates=2, spans=1)
    first, second = [sorted(r.tried) for r in found.removals[:2]]
    begin = min(*first, *(start for start, _ in found.spans))
    assert loaded[: 2 * BLOCKS] == [*range(BLOCKS)] * 2
    again = 0 if second[0] < begin else begin
    third = [i for i in range(again, BLOCKS) if i != found.removals[0].block]
    assert loaded[2 * BLOCKS :][: len(third)] == third
    gone: set[int] = set()
    for removal in found.removals:
        for block, cost in removal.tried.items():
            kept = sorted(set(range(BLOCKS)) - gone - {block})
            assert cost == pytest.approx(slow_divergence(folder, kept), rel=1e-4)
        gone.add(removal.block)


def test_more_candidates_than_a_sweep_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamedModel.open(folder)
    whole = measure_depth(model, ids(), 3, batch=2)
    monkeypatch.setattr(depth, "AT_ONCE", 2)
    assert measure_depth(model, ids(), 3, batch=2) == whole


def test_nothing_to_remove(folder: Path) -> None:
    found = measure_depth(StreamedModel.open(folder), ids(), 0, batch=3)
    assert found.kept(0) == list(range(BLOCKS)) and found.divergence(0) == 0 and not found.removals
