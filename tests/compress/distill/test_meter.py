import pytest

from compress.distill import meter
from compress.distill.meter import WARM_UP, Meter


def test_the_rate_is_of_the_steps_between_warm_up_and_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    found = Meter(tokens=1000, flops=2e9, peak=1e13)
    for number in range(WARM_UP + 4):
        now[0] += 60.0 if number < WARM_UP else 0.5
        found.step()
        assert (found.tokens_per_second is None) == (number < WARM_UP)
    now[0] += 30.0  # the artifact is written
    assert found.tokens_per_second == pytest.approx(2000)
    assert found.mfu == pytest.approx(2000 * 2e9 / 1e13)
    assert found.text() == ", 2,000 tokens/s, MFU 40.0 %"
