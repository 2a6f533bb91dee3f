"""Pruned folders as transformers loads them: shapes, what they compute, and what the manifest says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.artifact import read_manifest
from compress.errors import CompressError, ConfigError, UnsupportedError
from compress.files import file_sha256
from compress.prune.decide import Asked
from compress.prune.prune_stage import PruneRequest, prune
from compress.stage import Outcome
from compress.workspace import resolve

Build = Callable[..., Path]


@pytest.fixture
def calib_text(tmp_path: Path) -> Path:
    """Text of 40 rows of 64 tokens and more: 35 to fit on, 5 to judge on."""
    words = "the old house stood by the river and nobody had lived there for many years since the war".split()
    lines = [" ".join(words[(i * 7 + j * j + i * i * j) % len(words)] for j in range(14)) for i in range(200)]
    path = tmp_path / "calib.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run(folder: Path, out: Path, calib: Path, **changes: Any) -> Outcome:
    options = {"samples": 40, "seq_len": 64, "self_samples": 0}
    options |= {k: changes.pop(k) for k in list(changes) if k in ("repair", "max_kl", "self_samples", "watch")}
    request = PruneRequest(
        source=resolve(str(folder)), out=out, asked=Asked(**changes), calib=str(calib), force=True, **options
    )
    return prune(request)


@torch.no_grad()
def logits(folder: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: Tensor = model(ids, use_cache=False).logits.float()
    return found


def calibration_ids(folder: Path, calib: Path) -> Tensor:
    """The first 40 rows of 64 tokens."""
    from compress import calibration
    from compress.tokens import load_tokenizer

    found = calibration.load(
        str(calib), load_tokenizer(folder), num_samples=40, seq_len=64, seed=0, model=folder, is_reference=False,
        vocab_size=4096,
    )  # fmt: skip
    return found.ids_NT


def held_out_ids(folder: Path, calib: Path) -> Tensor:
    """The rows that nothing is fitted to: the last 5 of 40."""
    return calibration_ids(folder, calib)[35:]


CUTS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, int]]] = [
    ("Llama", {}, {"depth": "1"}, {"num_hidden_layers": 3}),
    ("Llama", {}, {"intermediate": "0.25"}, {"intermediate_size": 96}),
    ("Llama", {"attention_bias": True, "mlp_bias": True}, {"heads": "0.5"}, {"num_attention_heads": 2}),
    ("Llama", {}, {"kv_heads": "0.5"}, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ("Llama", {"tie_word_embeddings": True}, {"hidden": "0.5"}, {"hidden_size": 32, "head_dim": 16}),
    (  # hidden sizes that the old number of heads does not divide, and transformers would refuse
        "Llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
        {"hidden": "32", "heads": "2"},
        {"hidden_size": 64, "num_attention_heads": 4},
    ),
    ("Qwen2", {}, {"depth": "0.25", "intermediate": "0.5"}, {"num_hidden_layers": 3, "intermediate_size": 64}),
    ("Qwen3", {}, {"heads": "0.5", "hidden": "0.5"}, {"num_attention_heads": 2, "hidden_size": 32}),
    ("Gemma3Text", {}, {"depth": "1", "intermediate": "0.25", "heads": "0.5"}, {"num_hidden_layers": 3}),
    ("Phi3", {"drop": ("head_dim",)}, {"intermediate": "0.5"}, {"intermediate_size": 64}),
    ("GPTNeoX", {"drop": ("head_dim", "num_key_value_heads")}, {"depth": "1", "intermediate": "0.5"}, {}),
    ("Olmo2", {"drop": ("head_dim",)}, {"intermediate": "0.5"}, {"intermediate_size": 64}),
]


@pytest.mark.parametrize(("family", "changes", "asked", "config"), CUTS)
def test_what_was_pruned_loads_and_computes_what_was_measured(
    build_model: Build, calib_text: Path, tmp_path: Path, family: str, changes: dict[str, Any], asked: dict[str, Any],
    config: dict[str, int],
) -> None:  # fmt: skip
    folder = build_model(family, num_hidden_layers=4, **changes)
    outcome = run(folder, tmp_path / "out", calib_text, **asked)
    written = json.loads((outcome.out / "config.json").read_text())
    assert {key: written[key] for key in config} == config
    record = outcome.record
    count = record["parameters"]
    assert count["after"] < count["before"]
    ids = held_out_ids(folder, calib_text)
    log_p, log_q = (logits(f, ids).double().log_softmax(-1) for f in (folder, outcome.out))
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert record["divergence"]["held_out"] == pytest.approx(divergence, rel=2e-3)
    from safetensors import safe_open

    with safe_open(outcome.out / "model.safetensors", "pt") as f:
        assert sum(f.get_tensor(name).numel() for name in f.keys()) == count["after"]  # noqa: SIM118


def test_without_repair_what_stays_is_bitwise_what_it_was(build_model: Build, calib_text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = build_model(num_hidden_layers=3)
    outcome = run(folder, tmp_path / "out", calib_text, depth="1", repair=False)
    old, new = load_file(folder / "model.safetensors"), load_file(outcome.out / "model.safetensors")
    kept = outcome.record["kept_blocks"]
    for name, value in new.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(kept[int(parts[2])])
        assert torch.equal(value, old[".".join(parts)]), name


def test_refitting_lowers_the_divergence(build_model: Build, calib_text: Path, tmp_path: Path) -> None:
    folder = build_model(num_hidden_layers=3)
    found = [
        run(folder, tmp_path / f"out{repair}", calib_text, intermediate="0.5", repair=repair).record["divergence"]
        for repair in (True, False)
    ]
    assert found[0]["held_out"] < 0.9 * found[1]["held_out"]


def test_killed_at_every_block_it_ends_with_the_same_bytes(
    build_model: Build, calib_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.prune import decide, prune_stage

    folder = build_model(num_hidden_layers=4)
    asked = {"depth": "1", "intermediate": "0.25", "heads": "0.5"}
    whole = run(folder, tmp_path / "whole", calib_text, **asked)
    block, measure, measured, left = prune_stage._block, decide.measure_depth, [], [1]

    def killed(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return block(*args)

    def counted(*args: Any, **kwargs: Any) -> Any:
        measured.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(prune_stage, "_block", killed)
    monkeypatch.setattr(decide, "measure_depth", counted)
    for _ in range(2):
        left[0] = 1
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out", calib_text, **asked)
    left[0] = 9
    again = run(folder, tmp_path / "out", calib_text, **asked)
    assert again.resumed == 2 and len(measured) == 1
    for name in ("model.safetensors", "config.json"):
        assert file_sha256(whole.out / name) == file_sha256(again.out / name)


def test_each_kind_of_text_judges_and_the_watched_one_is_not_fitted_to(
    build_model: Build, calib_text: Path, tmp_path: Path
) -> None:
    """The text, what the model writes itself, and a watched text; their mean is what is held against bounds."""
    from safetensors.torch import load_file

    folder = build_model(num_hidden_layers=3)
    other = tmp_path / "other.txt"
    other.write_text("Nine ships sailed; 41 came home. " * 200, encoding="utf-8")
    asked = {"intermediate": "0.5", "self_samples": 16}
    plain = run(folder, tmp_path / "plain", calib_text, **asked)
    watched = run(folder, tmp_path / "watched", calib_text, **asked, watch=str(other))
    found = watched.record["divergence"]
    assert list(found["by_text"]) == ["text", "own", "watched"]
    assert found["held_out"] == pytest.approx(sum(found["by_text"].values()) / 3)
    assert {k: found["by_text"][k] for k in ("text", "own")} == pytest.approx(plain.record["divergence"]["by_text"])
    one, two = (load_file(outcome.out / "model.safetensors") for outcome in (plain, watched))
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = watched.record["calibration"]
    manifest = read_manifest(watched.out)
    assert manifest is not None and manifest.record["calibration"] == rows
    assert rows["num_sampled_from_model"] == 16 and rows["watched"]["path"].endswith("other.txt")
    ids = calibration_ids(folder, other)[: rows["watched"]["num_samples"]]
    log_p, log_q = (logits(f, ids).double().log_softmax(-1) for f in (folder, watched.out))
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert found["by_text"]["watched"] == pytest.approx(divergence, rel=2e-3)


def test_a_watched_text_decides_as_well(build_model: Build, calib_text: Path, tmp_path: Path) -> None:
    """What is judged for a goal is judged on every kind, and the mean decides."""
    folder = build_model(num_hidden_layers=3)
    asked = {"params": 580_000, "candidates": 2, "self_samples": 8}
    outcome = run(folder, tmp_path / "out", calib_text, **asked, watch=str(calib_text))
    tried = outcome.record["search"]["tried"]
    for one in tried:
        assert list(one["by_text"]) == ["text", "own", "watched"]
        assert one["divergence"] == pytest.approx(sum(one["by_text"].values()) / 3)
    best = min(tried, key=lambda one: one["divergence"])
    assert best["shape"] == outcome.record["shape"]["after"]


def test_a_goal_is_met_by_the_best_of_those_judged(build_model: Build, calib_text: Path, tmp_path: Path) -> None:
    folder = build_model(num_hidden_layers=4)
    outcome = run(folder, tmp_path / "out", calib_text, params=600_000, candidates=3)
    search = outcome.record["search"]
    assert outcome.record["parameters"]["after"] <= 600_000 and 2 <= len(search["tried"]) <= 3
    best = min(search["tried"], key=lambda one: one["divergence"])
    assert best["shape"] == outcome.record["shape"]["after"]
    assert [one["predicted"] for one in search["tried"]] == sorted(one["predicted"] for one in search["tried"])


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "neither an amount nor a goal"),
    ({"depth": "1", "params": 10**5}, "both amounts and a goal"),
    ({"depth": "4"}, "at least one must stay"),
    ({"depth": "x"}, "--depth x is neither a share"),
    ({"depth": "0"}, "nothing would go"),
    ({"heads": "0.3"}, "which 2 key-value heads do not divide; choose from 0.5"),
    ({"intermediate": "0.01"}, "is all of it"),
    ({"params": 1000}, "no shape meets --params 1k: the smallest that is tried"),
    ({"bytes": 1}, "no shape meets --bytes 1: the smallest that is tried"),
    ({"params": 10**9}, "as it is; nothing need go"),
]


@pytest.mark.parametrize(("asked", "words"), BAD)
def test_bad_requests_are_one_sentence_before_any_work(
    build_model: Build, calib_text: Path, tmp_path: Path, asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")) as caught:
        run(build_model(num_hidden_layers=4), tmp_path / "out", calib_text, **asked)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_what_cannot_be_pruned_is_refused(build_model: Build, calib_text: Path, tmp_path: Path) -> None:
    folder = build_model(num_hidden_layers=3)
    pruned = run(folder, tmp_path / "out", calib_text, depth="1").out
    refusals: list[tuple[Path, dict[str, Any], str]] = [
        (pruned, {"depth": "1"}, "is pruned already"),
        (build_model("Gemma3Text", name="g"), {"hidden": "0.5"}, "follows from the hidden size"),
        (build_model("Olmo2", name="o", drop=("head_dim",)), {"heads": "0.5"}, "widths are not found"),
        (
            build_model("GPT2", name="2", drop=("head_dim", "num_key_value_heads")),
            {"heads": "0.5"},
            "attn.scaling follows from it",
        ),
    ]
    for model, asked, words in refusals:
        with pytest.raises(UnsupportedError, match=words):
            run(model, tmp_path / "again", calib_text, **asked)


def test_the_user_is_told_what_must_come_next(build_model: Build, calib_text: Path, tmp_path: Path) -> None:
    folder = build_model(num_hidden_layers=3)
    outcome = run(folder, tmp_path / "out", calib_text, depth="1", max_kl=1e-9)
    assert "gate a task that generates" in outcome.notes[-2] and "compress distill" in outcome.notes[-1]
    manifest = read_manifest(outcome.out)
    assert manifest is not None and manifest.record["removed_blocks"] == outcome.record["removed_blocks"]
    with pytest.raises(CompressError, match="exists already"):
        prune(
            replace(
                PruneRequest(source=resolve(str(folder)), out=outcome.out, asked=Asked(depth="1")),
                calib=str(calib_text),
            )
        )


@pytest.mark.parametrize("goal", ["params", "bytes"])
def test_the_way_out_of_a_goal_that_nothing_meets_works_when_typed(
    build_model: Build, calib_text: Path, tmp_path: Path, goal: str
) -> None:
    from compress.model import StreamedModel
    from compress.prune.search import size_of

    model = StreamedModel.open(build_model(num_hidden_layers=3))
    with pytest.raises(ConfigError) as caught:
        Asked(**{goal: 1}).check(model)
    option, size = str(caught.value).partition("ask for ")[2].partition(",")[0].split()
    assert option == f"--{goal}"
    Asked(**{goal: size_of(size, option)}).check(model)


def test_texts_are_refused_before_anything_is_sampled(build_model: Build, calib_text: Path, tmp_path: Path) -> None:
    folder = build_model(num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"watched file gone.txt does not exist; pass --watch FILE"):
        run(folder, tmp_path / "out", calib_text, depth="1", watch="gone.txt", self_samples=10**6)
    with pytest.raises(ConfigError, match="--self-samples adds to a text"):
        run(folder, tmp_path / "out", Path("self"), depth="1", self_samples=10**6)
