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
from evaluators.card import Clock
from evaluators.latency import Seen, Settings, Subject


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
    assert found["p90_itl_ms"] is None and found["p99_itl_ms"] is None and found["std_ttft_ms"] == pytest.approx(0.0)
    assert found["too_few"] == (
        "6 times between tokens are too few (p90 needs 10, p99 needs 100); pass more --rounds or --new-tokens"
    )
    assert found["mean_tpot_ms"] == pytest.approx(20.0) and found["mean_ttft_ms"] == pytest.approx(100.0)
    assert found["output_throughput"] == pytest.approx(6 / 0.12)
    assert found["total_token_throughput"] == pytest.approx(2 * 24 / (0.2 + 0.12))
    assert found["request_throughput"] == pytest.approx(2 / (0.2 + 0.12))
    assert found["itls"] == rounds and found["ttfts"] == [0.1, 0.1] and found["output_lens"] == [4, 4]
    assert found["bytes_a_token"] == 1000 + 22 * 10
    assert found["share_of_bandwidth"] == pytest.approx(1220 / 0.015 / 1e6)


def test_percentiles_of_enough_values() -> None:
    """p99 of 99 gaps would be their largest; of 100 it lies between the two largest."""
    rounds = [[0.001 * n for n in range(1, 101)]]
    found = latency.result(subject(rounds), Settings(new_tokens=101, rounds=1), bandwidth=1e6)
    assert found["p99_itl_ms"] == pytest.approx(99.01) and found["p90_itl_ms"] == pytest.approx(90.1)
    assert found["too_few"] is None and found["p90_ttft_ms"] is None and found["std_ttft_ms"] is None
    short = latency.result(subject([rounds[0][:99]]), Settings(new_tokens=100, rounds=1), bandwidth=1e6)
    assert short["p99_itl_ms"] is None and short["p90_itl_ms"] is not None


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
    assert "fell from 1980 to 1500 MHz" in latency.warnings(Seen(clocks=clocks))[0]
    assert not latency.warnings(Seen(clocks=clocks[:2]))
    assert not latency.warnings(Seen(clocks=[Clock(mhz=None, used_bytes=None, utilisation=None)]))
    assert latency.warnings(Seen(clocks=[], why="NVML cannot be asked")) == ["NVML cannot be asked"]


def test_real_decoders_in_turns(reference_model: Path) -> None:
    decoders = [TorchDecoder.open(reference_model, capacity=24) for _ in range(2)]
    subjects = [Subject(label=str(i), decoder=d) for i, d in enumerate(decoders)]
    settings = Settings(prompt_len=16, new_tokens=6, rounds=5)
    seen = latency.measure(subjects, settings)
    assert len(seen.clocks) == 5 and all(len(s.ttfts) == 5 and len(s.itls[0]) == 5 for s in subjects)
    found = latency.report(subjects, settings, {"0": 1e10, "1": 1e10}, seen)
    assert 0.2 < found["results"][1]["against_first"]["ratio"] < 5
    assert found["results"][0]["graph_replays"] == 0 and set(found["definitions"]) >= {"itl", "tpot", "ttft"}
    assert found["peak_host_memory_bytes"] > 50e6
    # every figure of the file is defined there: by its own name, or that of what it is a mean or a percentile of
    terms = " ".join(found["definitions"])
    spread = {
        f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p90", "p99") for name in ("ttft", "tpot", "itl")
    }
    plain = {"label", "runtime", "completed", "failed", "total_input_tokens", "total_output_tokens", "duration"}
    left = set(found["results"][1]) - spread - plain - {"too_few", "against_first", "launches_a_step"}
    assert not [name for name in left if name not in terms]
    with pytest.raises(ConfigError, match=r"16 \+ 60 tokens are asked for and its cache holds 24"):
        latency.measure(subjects, Settings(prompt_len=16, new_tokens=60, rounds=1))


def test_one_token_has_no_time_between() -> None:
    with pytest.raises(ConfigError, match="--new-tokens 1"):
        Settings(new_tokens=1)
