"""How quick a decoder is: first token, the tokens after it, memory, and the share of the memory's speed it reaches.

Several decoders are measured in turns within one process, so that what disturbs one disturbs all, and their ratio comes
with an interval. `DEFINITIONS` goes into every result file: tools mean different things by the same words.

Shapes: B sequences, T tokens
"""

from __future__ import annotations

import math
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import ConfigError
from compress.runtime.runner import Decoder
from compress.tell import SILENT, Tell
from evaluators.card import Clock, Source, source, watching

DEFINITIONS = {
    "ttft": "seconds from handing over the prompt to having the first new token's id on the host: prefill and one pick",
    "itl": "seconds between two successive tokens' ids on the host, every gap of every round pooled (vLLM's ITL)",
    "tpot": "(time of the last token - time of the first) / (tokens - 1), one a round (vLLM's TPOT, AIPerf's ITL)",
    "output_throughput": "new tokens of all sequences after the first, over the time that they took",
    "total_token_throughput": "prompt and new tokens of all sequences over prefill and decode together",
    "bytes_a_token": "bytes that one decode step must read: weights once, and the cache at its mean length",
    "bandwidth": "bytes a second of summing one large float32 tensor on the decoder's device, best of 7, this run",
    "share_of_bandwidth": "bytes_a_token / median itl / bandwidth",
    "request_throughput": "sequences over the time of prefill and decode together, nothing in between counted",
    "ttfts, itls, input_lens, output_lens": "round by round: seconds, and tokens of one sequence",
    "new_tokens": "every round makes exactly the asked number of new tokens; an end of text does not end it",
    "percentiles": "linear interpolation (numpy's default); null with fewer than 10 (p90) or 100 (p99) values",
    "peak_device_memory_bytes": "most that torch's allocator held; what other runtimes hold is not in it",
    "device_memory_used_bytes": "most that the whole card had in use while rounds ran, by NVML or tegrastats",
    "peak_host_memory_bytes": "largest resident memory of this process up to the end of the run, all subjects together",
    "utilisation": "mean over samples of the share of time with a kernel running, per cent, by NVML or tegrastats; it "
    "says nothing of how much of the card the kernels used",
    "clocks": "the card's state after each measured round: SM clock, memory in use, utilisation; null where unknown",
    "graph_replays": "CUDA graph replays counted, warm-ups included; launches_a_step: kernels and copies in that graph",
    "ratio": "geometric mean over rounds of the other's tpot over the first's of that round; 95 % interval (t)",
}
ENOUGH_ROUNDS = 5
# Percentile -> values that it needs: one of them lies beyond it.
ENOUGH_VALUES = {90: 10, 99: 100}
# Fall of the clock from the first to the last round above which the run says so.
CLOCK_FELL = 0.05
# 97.5 % quantile of Student's t by degrees of freedom, 1 to 30; the normal one beyond.
_T = (
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09,
    2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Lengths in tokens. rounds are measured, warm_ups run before them and are not."""

    prompt_len: int = 128
    new_tokens: int = 128
    batch: int = 1
    rounds: int = 10
    warm_ups: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 2:
            raise ConfigError(f"--new-tokens {self.new_tokens}: the time between tokens needs at least 2")


@dataclass(kw_only=True)
class Subject:
    """One decoder with its measurements, round by round. cache_bytes: of keys and values a token, 0 if unknown."""

    label: str
    decoder: Decoder
    cache_bytes: int = 0
    ttfts: list[float] = field(default_factory=list)
    itls: list[list[float]] = field(default_factory=list)
    replays: int = 0
    launches: int = 0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the card said: its state after each measured round, and over all of them. why: it said nothing."""

    clocks: Sequence[Clock]
    utilisation: float | None = None
    most_used_bytes: int | None = None
    why: str = ""


def measure(
    subjects: Sequence[Subject],
    settings: Settings,
    tell: Tell = SILENT,
    card: Callable[[], Source] = source,
) -> Seen:
    """Run every subject once a round, in turns; fills the subjects. Returns what the card said meanwhile."""
    prompts = _prompts(subjects, settings)
    tell.start("round", settings.warm_ups + settings.rounds)
    for number in range(settings.warm_ups):
        _round(subjects, prompts, settings, tell, number, keep=False)
    clocks = []
    with watching(card) as watched:
        for number in range(settings.warm_ups, settings.warm_ups + settings.rounds):
            _round(subjects, prompts, settings, tell, number, keep=True)
            clocks.append(watched.now())
    return Seen(
        clocks=clocks,
        utilisation=watched.utilisation(),
        most_used_bytes=watched.most_used_bytes(),
        why=watched.why,
    )


def _round(
    subjects: Sequence[Subject], prompts: Tensor, settings: Settings, tell: Tell, number: int, *, keep: bool
) -> None:
    for subject in subjects:
        ttft, gaps = once(subject.decoder, prompts, settings.new_tokens)
        graph = getattr(subject.decoder, "graph", None)
        if graph is not None:
            subject.replays, subject.launches = graph.replays, graph.launches
        if keep:
            subject.ttfts.append(ttft)
            subject.itls.append(gaps)
    tell.step(number + 1, f"{subjects[-1].label}: {1000 * statistics.median(gaps):.2f} ms a token")


def _prompts(subjects: Sequence[Subject], settings: Settings) -> Tensor:
    """Random ids that every subject's vocabulary has: what is said does not matter to the time it takes."""
    vocabulary = min(s.decoder.vocab_size for s in subjects)
    for s in subjects:
        need = settings.prompt_len + settings.new_tokens
        if s.decoder.capacity < need:
            raise ConfigError(
                f"{s.label}: {settings.prompt_len} + {settings.new_tokens} tokens are asked for and its cache holds "
                f"{s.decoder.capacity}; pass a smaller --prompt-len or --new-tokens"
            )
        if s.decoder.batch != settings.batch:
            raise ConfigError(f"{s.label}: was opened for a batch of {s.decoder.batch}, not {settings.batch}")
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randint(0, vocabulary, (settings.batch, settings.prompt_len), generator=generator)


def once(decoder: Decoder, prompts_BT: Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and between the others, each token's ids fetched to the host as a server would."""
    start = time.perf_counter()
    decoder.prefill(prompts_BT).argmax(-1).cpu()
    marks = [time.perf_counter()]
    for _ in range(new_tokens - 1):
        decoder.advance().cpu()  # waits for the device
        marks.append(time.perf_counter())
    return marks[0] - start, [b - a for a, b in zip(marks, marks[1:], strict=False)]


def read_bandwidth(device: str) -> float:
    """Bytes a second of reading: a sum over 4 GiB of a GPU's memory, or 256 MiB of the host's."""
    x = torch.ones((1 << 30) if device.startswith("cuda") else (64 << 20), device=device)

    def run() -> float:
        start = time.perf_counter()
        float(x.sum())
        return time.perf_counter() - start

    run()
    return x.numel() * x.element_size() / min(run() for _ in range(7))


def bytes_a_token(subject: Subject, settings: Settings) -> int:
    mean_length = settings.prompt_len + settings.new_tokens // 2
    return subject.decoder.bytes_a_token + settings.batch * mean_length * subject.cache_bytes


def result(subject: Subject, settings: Settings, bandwidth: float) -> dict[str, Any]:
    """One subject's figures under vLLM's names (milliseconds, a second), and what is ours beside them."""
    gaps = [g for round_ in subject.itls for g in round_]
    tpots = [statistics.fmean(round_) for round_ in subject.itls]
    decode = sum(gaps)
    prompt, new = settings.prompt_len, settings.new_tokens
    rounds = len(subject.ttfts)
    median = statistics.median(gaps)
    read = bytes_a_token(subject, settings)
    return {
        "label": subject.label,
        "runtime": subject.decoder.runtime,
        "completed": rounds * settings.batch,
        "failed": 0,
        "total_input_tokens": rounds * settings.batch * prompt,
        "total_output_tokens": rounds * settings.batch * new,
        "duration": sum(subject.ttfts) + decode,
        "request_throughput": rounds * settings.batch / (sum(subject.ttfts) + decode),
        "output_throughput": settings.batch * len(gaps) / decode,
        "total_token_throughput": rounds * settings.batch * (prompt + new) / (sum(subject.ttfts) + decode),
        **_spread("ttft", subject.ttfts),
        **_spread("tpot", tpots),
        **_spread("itl", gaps),
        "bytes_a_token": read,
        "share_of_bandwidth": read / median / bandwidth,
        "too_few": too_few(len(gaps)),
        "input_lens": [prompt] * rounds,
        "output_lens": [new] * rounds,
        "ttfts": subject.ttfts,
        "itls": subject.itls,
        "graph_replays": subject.replays,
        "launches_a_step": subject.launches,
    }


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean, deviation and percentiles in milliseconds; None for a percentile that lies among the last few values."""
    values = 1000 * np.asarray(seconds)
    found: dict[str, Any] = {f"mean_{name}_ms": values.mean(), f"median_{name}_ms": np.median(values)}
    found[f"std_{name}_ms"] = values.std() if len(values) > 1 else None
    for q, least in ENOUGH_VALUES.items():
        found[f"p{q}_{name}_ms"] = np.percentile(values, q) if len(values) >= least else None
    return {key: None if value is None else float(value) for key, value in found.items()}


def ratio(first: Subject, other: Subject) -> dict[str, Any]:
    """How many times as long the other takes for a token; with fewer than `ENOUGH_ROUNDS` the reason instead."""
    logs = [math.log(statistics.fmean(b) / statistics.fmean(a)) for a, b in zip(first.itls, other.itls, strict=True)]
    if len(logs) < ENOUGH_ROUNDS:
        return {
            "ratio": None,
            "reason": f"{len(logs)} rounds are too few for an interval; pass --rounds {ENOUGH_ROUNDS}",
        }
    mean = statistics.fmean(logs)
    t = _T[len(logs) - 2] if len(logs) - 2 < len(_T) else 1.96
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def warnings(seen: Seen) -> list[str]:
    """What makes the figures doubtful, or is missing from them."""
    mhz = [c.mhz for c in seen.clocks if c.mhz]
    found = [seen.why] if seen.why else []
    if len(mhz) > 1 and min(mhz) < (1 - CLOCK_FELL) * mhz[0]:
        found.append(
            f"the card's clock fell from {mhz[0]} to {min(mhz)} MHz during the run; let it cool, or run it again"
        )
    return found


def too_few(values: int) -> str | None:
    """Why a percentile of the times between tokens is not given, with what to ask for; None where all are."""
    missing = {q: least for q, least in ENOUGH_VALUES.items() if values < least}
    if not missing:
        return None
    wanted = ", ".join(f"p{q} needs {least}" for q, least in missing.items())
    return f"{values} times between tokens are too few ({wanted}); pass more --rounds or --new-tokens"


def report(
    subjects: Sequence[Subject], settings: Settings, bandwidths: Mapping[str, float], seen: Seen
) -> dict[str, Any]:
    """The result file."""
    results = [result(s, settings, bandwidths[s.label]) for s in subjects]
    for subject, found in zip(subjects[1:], results[1:], strict=True):
        found["against_first"] = ratio(subjects[0], subject)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "definitions": DEFINITIONS,
        "load": {"kind": "closed loop", "value": settings.batch},
        "settings": dict(vars(settings)),
        "machine": machine(),
        "bandwidth_bytes_per_second": dict(bandwidths),
        "peak_device_memory_bytes": peak,
        "device_memory_used_bytes": seen.most_used_bytes,
        "peak_host_memory_bytes": peak_host_bytes(),
        "utilisation": seen.utilisation,
        "clocks": [vars(c) for c in seen.clocks],
        "warnings": warnings(seen),
        "results": results,
    }


def served(label: str, rounds: Sequence[tuple[float, list[float]]], settings: Settings) -> dict[str, Any]:
    """The result file of a server, of which only times are known: one request at a time."""
    gaps = [g for _, round_ in rounds for g in round_]
    found = {
        "label": label,
        "runtime": "endpoint",
        "completed": len(rounds),
        "failed": 0,
        "duration": sum(first + sum(round_) for first, round_ in rounds),
        "request_throughput": len(rounds) / sum(first + sum(round_) for first, round_ in rounds),
        "output_throughput": len(gaps) / sum(gaps),
        **_spread("ttft", [first for first, _ in rounds]),
        **_spread("tpot", [statistics.fmean(round_) for _, round_ in rounds]),
        **_spread("itl", gaps),
        "too_few": too_few(len(gaps)),
        "ttfts": [first for first, _ in rounds],
        "itls": [round_ for _, round_ in rounds],
    }
    return {
        "definitions": DEFINITIONS,
        "load": {"kind": "closed loop", "value": 1},
        "settings": dict(vars(settings)),
        "machine": machine(),
        "warnings": [],
        "results": [found],
    }


def peak_host_bytes() -> int:
    """Largest resident memory of this process so far (`ru_maxrss`; kibibytes on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
