"""What a benchmark computes from times, against the definitions; and that it measures real decoders in turns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.errors import ConfigError
from compress.runtime.resident import TorchDecoder
from evaluators import latency
from evaluators.latency import Clock, Settings, Subject


class Ticking:
    """A decoder that takes known times: what is computed from them can be checked by hand."""

    runtime = "test"
    vocab_size = 50
    capacity = 1000
    batch = 1
    bytes_a_token = 1000

    def prefill(self, ids_BT: Tensor) -> Tensor:
        return torch.zeros(1, self.vocab_size)

    def step(self, ids_B: Tensor) -> Tensor:
        return torch.zeros(1, self.vocab_size)

    def advance(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int64)


def subject(itls: list[list[float]], label: str = "a") -> Subject:
    return Subject(label=label, decoder=Ticking(), cache_bytes=10, ttfts=[0.1] * len(itls), itls=itls)


def test_figures_follow_their_definitions() -> None:
    settings = Settings(prompt_len=20, new_tokens=4, rounds=2)
    rounds = [[0.010, 0.020, 0.030], [0.010, 0.010, 0.040]]
    found = latency.result(subject(rounds), settings, bandwidth=1e6)
    gaps = np.array(rounds).reshape(-1)
    assert found["median_itl_ms"] == pytest.approx(1000 * np.median(gaps))
    assert found["p99_itl_ms"] == pytest.approx(1000 * np.percentile(gaps, 99))
    assert found["mean_tpot_ms"] == pytest.approx(20.0) and found["mean_ttft_ms"] == pytest.approx(100.0)
    assert found["output_throughput"] == pytest.approx(6 / 0.12)
    assert found["total_token_throughput"] == pytest.approx(2 * 24 / (0.2 + 0.12))
    assert found["bytes_a_token"] == 1000 + 22 * 10
    assert found["share_of_bandwidth"] == pytest.approx(1220 / 0.015 / 1e6)


def test_the_interval_of_a_ratio_is_students() -> None:
    first, other = subject([[1.0]] * 6), subject([[2.0], [2.2], [1.8], [2.1], [2.0], [1.9]])
    found = latency.ratio(first, other)
    logs = np.log([2.0, 2.2, 1.8, 2.1, 2.0, 1.9])
    half = 2.571 * logs.std(ddof=1) / math.sqrt(6)
    assert found["ratio"] == pytest.approx(math.exp(logs.mean()))
    assert found["low"] == pytest.approx(math.exp(logs.mean() - half), rel=1e-3) and found["low"] < 2 < found["high"]


def test_too_few_rounds_give_a_reason_and_no_figure() -> None:
    found = latency.ratio(subject([[1.0]] * 4), subject([[2.0]] * 4))
    assert found == {"ratio": None, "reason": "4 rounds are too few for an interval; pass --rounds 5"}


def test_a_clock_that_falls_is_told() -> None:
    clocks = [Clock(mhz=m, used_bytes=None, utilisation=None) for m in (1980, 1970, 1500)]
    assert "fell from 1980 to 1500 MHz" in latency.warnings(clocks)[0]
    assert not latency.warnings(clocks[:2]) and not latency.warnings(
        [Clock(mhz=None, used_bytes=None, utilisation=None)]
    )


def test_real_decoders_in_turns(reference_model: Path) -> None:
    decoders = [TorchDecoder.open(reference_model, capacity=24) for _ in range(2)]
    subjects = [Subject(label=str(i), decoder=d) for i, d in enumerate(decoders)]
    settings = Settings(prompt_len=16, new_tokens=6, rounds=5)
    clocks = latency.measure(subjects, settings)
    assert len(clocks) == 5 and all(len(s.ttfts) == 5 and len(s.itls[0]) == 5 for s in subjects)
    found = latency.report(subjects, settings, {"0": 1e10, "1": 1e10}, clocks)
    assert 0.2 < found["results"][1]["against_first"]["ratio"] < 5
    assert found["results"][0]["graph_replays"] == 0 and set(found["definitions"]) >= {"itl", "tpot", "ttft"}
    with pytest.raises(ConfigError, match=r"16 \+ 60 tokens are asked for and its cache holds 24"):
        latency.measure(subjects, Settings(prompt_len=16, new_tokens=60, rounds=1))


def test_one_token_has_no_time_between() -> None:
    with pytest.raises(ConfigError, match="--new-tokens 1"):
        Settings(new_tokens=1)
