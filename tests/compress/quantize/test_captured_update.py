"""An update whose inputs stay where they are, and what is kept where a graph of it cannot be made.

That a graph does what the update does is a matter for a GPU: tests/gpu.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.quantize import captured_update, end_to_end
from compress.quantize.captured_update import Changed, Repeated
from compress.quantize.end_to_end import EndToEndOptions
from compress.tell import SILENT, Heard

ROWS = [torch.tensor(rows) for rows in ([3, 0], [5, 1], [2, 7], [4, 6], [1, 3])]
OPTIONS = EndToEndOptions(updates=len(ROWS), rows=2, rate=0.01, code_rate=0.03)


class Run:
    """A tiny model and its update."""

    def __init__(self, made: Any, tell: Any = SILENT) -> None:
        self.student, self.taught = made
        self.learning = end_to_end._learn(self.student, OPTIONS)
        self.update = end_to_end._Update(self.student, self.taught, OPTIONS, self.learning, 2)
        self.repeated = Repeated(
            self.update, Changed.by(self.update.adam, self.update.losses), tell, blocks=self.student.blocks
        )

    def take(self, number: int) -> None:
        self.update.take(ROWS[number], 1 - number / len(ROWS))

    @property
    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for group in self.update.adam.param_groups for p in group["params"]]


@pytest.fixture
def start(build_model: Any, rounded_student: Any) -> Any:
    folder = build_model()
    return lambda tell=SILENT: Run(rounded_student(folder), tell)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_buffers_give_the_parameters_that_rows_give(start: Any) -> None:
    """Bit for bit, beside the loop written out; and nearly so with rates in tensors, which a graph needs."""
    plain = start()
    adam = torch.optim.Adam(plain.learning.of_rate(OPTIONS), lr=OPTIONS.rate)
    losses = 0.0
    for number, rows in enumerate(ROWS):
        for group in adam.param_groups:
            group["lr"] = group["begins"] * (1 - number / len(ROWS))
        passed_on = plain.learning.place()
        loss = end_to_end._divergence(plain.student, plain.taught, OPTIONS, rows)
        loss.backward()  # type: ignore[no-untyped-call]
        passed_on()
        adam.step()
        adam.zero_grad()
        losses += float(loss.detach())
    fixed, tensors = start(), start()
    for group in tensors.update.adam.param_groups:
        group["lr"] = torch.tensor(group["begins"])
    for run in (fixed, tensors):
        inputs = run.update.ids_BT.data_ptr(), run.update.hidden_BTH.data_ptr()
        for number in range(len(ROWS)):
            run.take(number)
            run.repeated()
        assert (run.update.ids_BT.data_ptr(), run.update.hidden_BTH.data_ptr()) == inputs
        assert (run.repeated.calls, run.repeated.replays) == (len(ROWS), 0)
        assert float(run.update.losses) == pytest.approx(losses, rel=1e-4)
    assert same(fixed.parameters, plain.parameters)
    begun = start().parameters
    for found, expected, first in zip(tensors.parameters, plain.parameters, begun, strict=True):
        assert captured_update._apart(found, expected, first) < captured_update.TOLERANCE
    assert not same(plain.parameters, begun)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a graph can be made where there is a CUDA DEVICE")
def test_where_no_graph_can_be_made_it_is_said_and_the_update_is_made_once(start: Any) -> None:
    heard = Heard()
    plain, run = start(), start(heard)
    for number in range(len(ROWS)):
        for one in (plain, run):
            one.take(number)
        plain.repeated()
        if number == captured_update.EAGER:
            run.repeated._first_captured()
        else:
            run.repeated()
    assert same(run.parameters, plain.parameters) and torch.equal(run.update.losses, plain.update.losses)
    (said,) = heard.said
    assert said.startswith("updating without a CUDA graph, which takes longer: ") and len(said) > 60
    assert run.repeated.graph is None and run.repeated.replays == 0


def test_what_an_update_changes_is_put_back(start: Any) -> None:
    run = start()
    for number in (0, 1):
        run.take(number)
        run.repeated()
    run.take(2)
    before = [run.repeated._copy(tensor) for tensor in run.repeated._changed()]
    ends = []
    for _ in range(2):
        run.update()
        ends.append([run.repeated._copy(tensor) for tensor in run.repeated._changed()])
        run.repeated._restore(before)
        assert same(run.repeated._changed(), before)
    assert same(*ends) and not any(torch.equal(a, b) for a, b in zip(ends[0][:2], before[:2], strict=True))


def test_a_replay_is_measured_by_the_step() -> None:
    before, step = torch.tensor([8.0, -8.0]), torch.tensor([0.03, 0.04])
    apart = partial(captured_update._apart, before=before)
    assert apart(before + step, before + step) == apart(before, before) == 0
    assert apart(before, before + step) == 1
    assert apart(before + step * 1.001, before + step) == pytest.approx(1e-3, rel=0.01)
    assert apart(before + step, before) == float("inf")
    assert not apart(before * float("nan"), before + step) <= captured_update.TOLERANCE


def test_masks_that_stay_are_those_of_before(start: Any) -> None:
    run = start()
    run.learning.place()
    student = run.student
    ids = torch.randint(0, 512, (2, 24))
    seen: list[Any] = []
    with captured_update._Masks(student.blocks) as masks:
        student.blocks[0].register_forward_pre_hook(
            lambda block, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        masked = torch.ones_like(ids)
        masked[:, :5] = 0
        with torch.no_grad():
            student.base(input_ids=ids, use_cache=False)
            student.base(input_ids=ids, attention_mask=masked, use_cache=False)
            masks.stay = True
            student.base(input_ids=ids, use_cache=False)
    with torch.no_grad():
        student.base(input_ids=ids, use_cache=False)
    assert seen[0] is None and seen[1] is not None and seen[2] is seen[1] and seen[3] is None
