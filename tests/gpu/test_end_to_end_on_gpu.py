"""Learning through the whole model by a CUDA graph of its update: as without, and the same again."""

from typing import Any

import pytest
import torch

import calibration_data
from compress.quantize import captured_update, end_to_end
from compress.quantize.end_to_end import EndToEndOptions, Trained
from compress.tell import Heard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: updates by a graph were not tested"),
]

UPDATES = 12


def tensors(trained: Trained) -> dict[str, torch.Tensor]:
    found = {f"{n}.codes": w.codes_OI for n, w in trained.layers.items()}
    found |= {f"{n}.scales": w.scale_OG for n, w in trained.layers.items()}
    return found | trained.norms


@pytest.mark.parametrize(("dtype", "again"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_a_graph_learns_what_its_update_does(
    dtype: torch.dtype, again: bool, rounded_student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """again: blocks compute their inner values again in the backward pass."""
    runs: list[captured_update.Repeated] = []
    most = captured_update.MOST

    class Watched(captured_update.Repeated):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.most = most
            runs.append(self)

    monkeypatch.setattr(captured_update, "Repeated", Watched)
    options = EndToEndOptions(updates=UPDATES, rows=4, rate=3e-3, code_rate=3e-2, dtype=dtype, checkpointing=again)

    def train() -> Trained:
        heard = Heard()
        student, taught = rounded_student(calibration_data.reference_model(), "cuda", 24, 128, dtype)
        trained = end_to_end.train(student, taught, options, heard)
        assert not heard.said and not heard.notes, heard.events
        assert [event[1] for event in heard.events if event[0] == "step"] == list(range(1, UPDATES + 1))
        return trained

    graphed, repeated = train(), train()
    most = 0
    plain = train()
    assert [run.replays for run in runs] == [UPDATES - captured_update.EAGER] * 2 + [0]
    one, other, without = (tensors(trained) for trained in (graphed, repeated, plain))
    assert graphed.divergences == repeated.divergences
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert graphed.divergences[0] == plain.divergences[0]
    assert graphed.divergences[1] == pytest.approx(plain.divergences[1], rel=1e-2)
    assert graphed.divergences[1] < 0.99 * graphed.divergences[0]
    for name, value in without.items():
        if name.endswith(".codes"):
            assert float((one[name] != value).float().mean()) < 0.01, name
        else:
            assert torch.allclose(one[name].float(), value.float(), rtol=1e-2), name
