"""What the gate's promises are worth: simulate pairs of known true recovery, and count the verdicts.

    python tests/bench/coverage.py [--trials 1000] [--plot evaluators/coverage.svg]

A gate that keeps its word passes a candidate whose true recovery is exactly the threshold in at most 5 % of trials.
How often it passes a better one, at which amount of data, is its power. Perplexity, losses by window of 511 tokens:
"as measured" are normal with the spread (0.0163 nats a token) and the autocorrelation (0.14) found between the
reference model and its INT4 artifact on 200 windows of WikiText-2 (their skewness, 0.2, is left out); beside it ones
without autocorrelation, ones with much (0.4), and skewed heavy-tailed ones (gamma of shape 0.5, skewness 2.8).
Accuracy: items with a reference accuracy of 0.7, of which a share is answered rightly by one model only.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evaluators.gate import LEAST_WINDOWS, judge_accuracy, judge_perplexity

Array = npt.NDArray[np.float64]
TRUTHS = (0.96, 0.98, 0.99)
WINDOWS = (LEAST_WINDOWS, 50, 200, 1000)
ITEMS = (50, 200, 1000, 5000)
SPREAD = 0.0163
DRAWS = 1000


def independent(rng: np.random.Generator, n: int) -> Array:
    return rng.normal(0, SPREAD, n)


def neighbours(rng: np.random.Generator, n: int, correlation: float) -> Array:
    """First-order autoregression with this coefficient and the same spread."""
    noise = rng.normal(0, SPREAD * math.sqrt(1 - correlation**2), n)
    out = np.empty(n)
    out[0] = rng.normal(0, SPREAD)
    for i in range(1, n):
        out[i] = correlation * out[i - 1] + noise[i]
    return out


def heavy(rng: np.random.Generator, n: int) -> Array:
    """Skewed and heavy-tailed: a centred gamma of shape 0.5 (skewness 2.8), losses on the long side."""
    return (rng.gamma(0.5, 1, n) - 0.5) / math.sqrt(0.5) * SPREAD


SHAPES: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "as measured": lambda rng, n: neighbours(rng, n, 0.14),
    "independent": independent,
    "autocorrelated": lambda rng, n: neighbours(rng, n, 0.4),
    "skewed": heavy,
}


def perplexity_trial(rng: np.random.Generator, shape: str, n: int, truth: float, seed: int) -> str:
    tokens = np.full(n, 511.0)
    loss = -math.log(truth) + SHAPES[shape](rng, n)
    return judge_perplexity(np.zeros(n), loss * tokens, tokens, threshold=0.98, seed=seed, draws=DRAWS).outcome


def accuracy_trial(rng: np.random.Generator, differ: float, n: int, truth: float, seed: int) -> str:
    """Of all items a share `differ` is answered rightly by one model only; their balance gives the true recovery."""
    accuracy = 0.7
    lost = (differ + accuracy * (1 - truth)) / 2
    won = differ - lost
    cells = rng.multinomial(n, [accuracy - lost, lost, won, 1 - accuracy - won])
    reference = np.repeat([True, True, False, False], cells)
    candidate = np.repeat([True, False, True, False], cells)
    options = {"chance": 0.25, "threshold": 0.98, "seed": seed, "draws": DRAWS}
    return judge_accuracy("simulated", reference, candidate, **options).outcome  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--plot", type=Path)
    o = parser.parse_args()
    error = math.sqrt(0.05 * 0.95 / o.trials)
    print(f"{o.trials} trials a row, {DRAWS} bootstrap draws; standard error of a 5 % share: {error:.1%}")
    print("| scores | n | true recovery | PASS | FAIL | INCONCLUSIVE |\n|---|---|---|---|---|---|")
    passed: dict[str, dict[float, list[tuple[int, float]]]] = {}
    cases = [(f"perplexity, {s}", WINDOWS, perplexity_trial, s) for s in SHAPES]
    cases += [(f"accuracy, {d:.0%} differ", ITEMS, accuracy_trial, d) for d in (0.05, 0.1)]  # type: ignore[misc]
    for label, sizes, trial, kind in cases:
        for truth in TRUTHS:
            for n in sizes:
                rng = np.random.Generator(np.random.PCG64([n, round(truth * 1000), len(label)]))
                found = Counter(trial(rng, kind, n, truth, seed) for seed in range(o.trials))  # type: ignore[arg-type]
                shares = [found[k] / o.trials for k in ("PASS", "FAIL", "INCONCLUSIVE")]
                passed.setdefault(label, {}).setdefault(truth, []).append((n, shares[0]))
                print(f"| {label} | {n} | {truth} | " + " | ".join(f"{s:.1%}" for s in shares) + " |", flush=True)
    if o.plot:
        draw(passed, o.plot)


def draw(passed: dict[str, dict[float, list[tuple[int, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.rcParams.update({"svg.hashsalt": "coverage", "font.size": 9})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots(1, len(passed), sharey=True)
    for axis, (label, by_truth) in zip(axes, passed.items(), strict=True):
        for truth, color in zip(TRUTHS, ("#d55e00", "#555555", "#0072b2"), strict=True):
            axis.plot(*zip(*by_truth[truth], strict=True), "o-", color=color, label=f"true recovery {truth:.0%}")
        axis.axhline(0.05, color="#555555", linestyle=":", linewidth=1)
        axis.set_xscale("log")
        axis.set_title(label)
        axis.set_xlabel("items" if label.startswith("accuracy") else "windows")
    axes[0].set_ylabel("share of PASS at a gate of 98 %")
    axes[0].legend(fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
