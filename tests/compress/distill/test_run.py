"""`compress distill` and `compress teach` from start to end on small models: artifacts, refusals, signals."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import calibration_data
from compress import distributed
from compress.artifact import read_manifest
from compress.distill import memory, models
from compress.distill.data import Mix
from compress.distill.engine import EngineOptions
from compress.distill.memory import Needs
from compress.distill.request import DistillOutcome, DistillRequest
from compress.distill.run import Prepared, distill
from compress.distill.teach import TeachRequest, teach
from compress.distill.train import Diverged, Stopped, Worse
from compress.errors import ArtifactError, CompressError, ConfigError, UnsupportedError
from compress.tell import Heard
from compress.workspace import resolve

Pair = tuple[Path, Path]
Prose = Callable[..., Path]


def request(pair: Pair, out: Path, *data: Path | str, mix: str | None = None, **more: Any) -> DistillRequest:
    options: dict[str, Any] = {
        "tokens": 6 * 8 * 24, "seq_len": 24, "batch": 8, "micro_batch": 4, "checkpoint_steps": 2, "rate": 1e-3, **more,
    }  # fmt: skip
    return DistillRequest(
        teacher=resolve(str(options.pop("teacher", pair[0]))),
        student=resolve(str(options.pop("student", pair[1]))),
        data=Mix.of([str(d) for d in data], mix),
        out=out,
        **options,
    )


def curve(outcome: DistillOutcome) -> list[float]:
    lines = (outcome.out / "training.csv").read_text().splitlines()
    return [float(line.split(",")[2]) for line in lines[1:]]


def test_an_ordinary_folder_with_its_lineage(tmp_path: Path, pair: Pair, prose: Prose) -> None:
    """It loads with transformers, is nearer to the teacher than before, and says what it was made of."""
    from transformers import AutoModelForCausalLM

    told = Heard()
    outcome = distill(request(pair, tmp_path / "out", prose(120), epochs=2, tokens=24 * 8 * 24), tell=told)
    losses = curve(outcome)
    assert len(losses) == 24 and sum(losses[-4:]) < 0.8 * sum(losses[:4])
    model = AutoModelForCausalLM.from_pretrained(outcome.out)
    assert model.dtype == torch.float16 and model.config.num_hidden_layers == 2
    manifest = read_manifest(outcome.out)
    assert manifest is not None
    record = manifest.record
    assert record["stage"] == "distill" and record["tokens"] == 24 * 8 * 24 and record["steps"] == 24
    assert (tmp_path / "out" / record["parent"]["path"]).resolve() == pair[1]
    assert (tmp_path / "out" / record["teacher"]["path"]).resolve() == pair[0]
    assert record["data"]["num_rows"] == 96 and record["data"]["sources"][0]["num_documents"] > 10
    assert record["options"]["seed"] == 0 and record["options"]["epochs"] == 2
    assert [e for e in told.events if e[0] == "start"] == [("start", "step", 24)]
    assert outcome.verified == len(list(model.state_dict())) - 1  # the output matrix is tied


def test_trained_text_is_not_judged_on(tmp_path: Path, pair: Pair, prose: Prose) -> None:
    """Neither what it was trained on nor what it was watched on: both are texts that chose its weights."""
    from evaluators.evaluate import evaluate
    from evaluators.request import EvaluationRequest

    out = distill(request(pair, tmp_path / "out", prose(60), watch=str(prose(20, 3)), watch_tokens=240)).out
    for text in (prose(60), prose(20, 3)):
        with pytest.raises(ConfigError, match="text that .* was calibrated on"):
            evaluate(EvaluationRequest(candidate=out, reference=pair[0], data=str(text), context=32))


def test_cross_entropy_needs_no_teacher(tmp_path: Path, pair: Pair, prose: Prose) -> None:
    outcome = distill(request(pair, tmp_path / "out", prose(60), loss="cross-entropy"))
    assert outcome.record["teacher_held_as"] is None
    assert (
        outcome.record["flops_per_token"] < distill(request(pair, tmp_path / "kl", prose(60))).record["flops_per_token"]
    )
    assert all(r["divergence"] == 0 and r["loss"] == r["cross_entropy"] for r in outcome.record["curve"])


def test_a_quantized_teacher_held_as_codes(tmp_path: Path, pair: Pair, prose: Prose) -> None:
    """INT8 weights teach what float32 ones do."""
    exact = distill(request(pair, tmp_path / "exact", prose(60)))
    held = distill(request(pair, tmp_path / "held", prose(60), teacher_dtype="w8a16"))
    assert held.record["teacher_held_as"] == "w8a16"
    for a, b in zip(curve(exact), curve(held), strict=True):
        assert a != b and abs(a - b) < 0.02 * a


def test_text_that_the_teacher_writes(tmp_path: Path, pair: Pair, prose: Prose) -> None:
    out = request(pair, tmp_path / "out", prose(60), "self", mix="2,1")
    sources = distill(out).record["data"]["sources"]
    assert [(s["source"], s["num_rows"]) for s in sources] == [(f"file:{prose(60)}", 32), ("self", 16)]


# ---- the cache ---------------------------------------------------------------------------------------


def taught(pair: Pair, out: Path, text: Path, **more: Any) -> TeachRequest:
    options: dict[str, Any] = {"tokens": 48 * 24, "seq_len": 24, **more}
    teacher = resolve(str(options.pop("teacher", pair[0])))
    return TeachRequest(teacher=teacher, out=out, data=Mix.of([str(text)], None), **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, pair: Pair, prose: Prose) -> Path:
    out = tmp_path_factory.mktemp("cache") / "taught"
    assert teach(taught(pair, out, prose(60))).token_bytes == 44
    return out


def test_learning_from_a_cache(tmp_path: Path, pair: Pair, prose: Prose, cache: Path) -> None:
    """Nearly the loss that the teacher itself gives on the same rows, without loading it; the rows may be named."""
    live = distill(request(pair, tmp_path / "live", prose(60), teacher_dtype="float32"))
    cached = distill(request(pair, tmp_path / "cached", cache=cache))
    assert cached.record["teacher_held_as"] is None
    assert cached.record["data"]["sha256"] == live.record["data"]["sha256"]
    exact, sampled = curve(live), curve(cached)
    assert exact != sampled and abs(sum(exact) - sum(sampled)) < 0.3 * sum(exact)  # few tokens of a nearly flat teacher
    again = distill(request(pair, tmp_path / "again", prose(60), cache=cache))
    assert curve(again) == curve(cached)


def test_a_cache_is_the_same_in_any_parts(tmp_path: Path, pair: Pair, prose: Prose, cache: Path) -> None:
    """Passes of other sizes change no draw; a second run of the same makes the same bytes."""
    teach(taught(pair, tmp_path / "again", prose(60), micro_batch=5))
    for path in sorted(cache.iterdir()):
        if path.name != "compress.json":
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_other_caches_are_refused(tmp_path: Path, pair: Pair, prose: Prose, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds the word of .*teacher .* and the teacher is .*student"):
        distill(request(pair, tmp_path / "a", cache=cache, teacher=pair[1]))
    with pytest.raises(ConfigError, match="was made of another text than --data"):
        distill(request(pair, tmp_path / "b", prose(60, 7), cache=cache))
    with pytest.raises(ConfigError, match="was made with --temperature 1.0 and 2.0 is asked for"):
        distill(request(pair, tmp_path / "c", cache=cache, temperature=2.0))
    with pytest.raises(ConfigError, match="from which only forward KL is unbiased"):
        distill(request(pair, tmp_path / "d", cache=cache, loss="jsd"))
    with pytest.raises(ConfigError, match="--hidden-loss needs the teacher itself"):
        distill(request(pair, tmp_path / "e", cache=cache, hidden=1.0))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in cache.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    part = damaged / "part-00000.bin"
    part.write_bytes(part.read_bytes()[:-1] + b"\1")
    with pytest.raises(ArtifactError, match=r"part-00000\.bin: its content is not what was written"):
        distill(request(pair, tmp_path / "f", cache=damaged))
    assert not [p for p in tmp_path.iterdir() if p.name in "abcdef"]


# ---- refusals before the first step ------------------------------------------------------------------


def test_vocabularies_that_differ(tmp_path: Path, pair: Pair, prose: Prose) -> None:
    """Which id, and what it is to each."""
    other = tmp_path / "other"
    other.mkdir()
    for path in pair[1].iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    by_id = {i: t for t, i in vocab.items()}
    vocab[by_id[700]], vocab[by_id[900]] = 900, 700
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"different vocabularies .* id 700 is .* to the student and .* to the teacher"
    ):
        distill(request(pair, tmp_path / "out", prose(60), student=other))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"tokens": 10**6},
            r"and 10000\d\d of it are asked for; pass --tokens \d+, more text, or --epochs \d+ to read",
        ),
        ({"tokens": 100}, "100 tokens are less than one update of 8 rows of 24; pass --tokens 192 or more"),
        ({"micro_batch": 3}, "--micro-batch 3 does not divide the 8 rows"),
        ({"loss": "cross-entropy", "hidden": 1.0}, "--loss cross-entropy trains on the text alone"),
        ({"compress_gradients": 2}, "--compress-gradients is for several processes and one runs"),
        ({"engine": "deepspeed"}, "--engine deepspeed shares a student out to several processes and one runs; start"),
        ({"lora": 4}, r'needs peft, which is not installed; pip install "compress-toolkit\[distill\]"'),
    ],
)
def test_refused_in_one_sentence(tmp_path: Path, pair: Pair, prose: Prose, more: dict[str, Any], message: str) -> None:
    if "lora" in more and __import__("importlib").util.find_spec("peft"):
        pytest.skip("peft is installed")
    with pytest.raises(CompressError, match=message) as caught:
        distill(request(pair, tmp_path / "out", prose(60), **more))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_deepspeed_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "running", lambda: True)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        UnsupportedError, match=r'not installed; pip install "compress-toolkit\[deepspeed\]", or use --eng'
    ):
        EngineOptions(engine="deepspeed", device="cuda").resolved(2)


def test_hidden_states_of_other_widths(
    tmp_path: Path, pair: Pair, prose: Prose, build_model: Callable[..., Path]
) -> None:
    narrow = build_model(hidden_size=16, num_hidden_layers=1)
    with pytest.raises(ConfigError, match="the student's have 16, the teacher's 32; leave it out"):
        distill(request(pair, tmp_path / "out", prose(60), student=narrow, hidden=0.5))


def needs(**changes: Any) -> Needs:
    values: dict[str, Any] = {
        "trained": 10**9, "frozen": 0, "compute_bytes": 2, "teacher_parameters": 3 * 10**9, "teacher_bytes": 2,
        "tokens": 16_384, "token_bytes": 2e6, "kept_bytes": 2e5, "checkpointing": False, "shares": 1, "on_gpu": True,
        **changes,
    }  # fmt: skip
    return Needs(**values)


@pytest.mark.parametrize(
    ("free", "way"),
    [
        (30, r"--micro-batch 1 needs \d+\.\d\d GB and fits"),
        (27.5, r"--micro-batch 1 --checkpointing needs \d+\.\d\d GB and fits"),
        (25.5, r"--micro-batch 1 --checkpointing --teacher-dtype w8a16 needs"),
        (23, r"--micro-batch 1 --checkpointing --cache FOLDER \(made by compress teach\) needs"),
        (9, r"--micro-batch 1 --checkpointing --cache FOLDER --lora 16 needs"),
        (2, r"even .* needs \d\.\d\d GB: use a smaller student"),
    ],
)
def test_memory_that_is_too_small_names_what_fits(free: float, way: str) -> None:
    mine = needs()
    lora = needs(trained=2 * 10**7, frozen=10**9)
    others = memory.ways_out(mine, seq_len=512, lora=lora, may_cache=True)
    memory.require(mine, mine.total(), others)
    with pytest.raises(ConfigError, match=rf"predicted to need 6\d\.\d\d GB .* and {free:.2f} GB are free; {way}"):
        memory.require(mine, int(free * 1e9), others)


def test_shares_need_what_is_gathered(pair: Pair) -> None:
    """Of a billion parameters, four processes hold a quarter with its gradient and moments, and a tenth whole."""
    alone = needs(teacher_parameters=0, tokens=0)
    shared = needs(teacher_parameters=0, tokens=0, shares=4, gathered=10**8)
    assert alone.total() == pytest.approx(1.1 * (16 + 2) * 1e9)
    assert shared.total() == pytest.approx(1.1 * (16 / 4 + (2 + 2 + 4) / 10) * 1e9)
    taught = needs(trained=0, tokens=0, teacher_parameters=4 * 10**9, teacher_gathered=10**8, shares=4)
    assert taught.total() == pytest.approx(1.1 * 2 * 1.1e9)
    loaded = models.load(pair[0], dtype=torch.float32)
    blocks = [models.num_parameters(b) for b in loaded.blocks]
    assert len(blocks) == 3
    assert models.gathered_parameters(loaded) == models.num_parameters(loaded.model) - blocks[0]


def test_activations_are_measured(pair: Pair) -> None:
    """A token's share on 64 tokens predicts what three times as many leave."""
    loaded = models.load(pair[0], dtype=torch.float32)
    loaded.model.requires_grad_(True)
    whole, kept = memory.probe(loaded.model, loaded.base, 3, loaded.hidden_size, torch.float32)
    parameters = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    seen: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        out = loaded.base(input_ids=torch.arange(96).repeat(2, 1), use_cache=False).last_hidden_state
    assert 0.9 * sum(seen.values()) < 192 * whole < 1.15 * sum(seen.values())
    assert kept < whole and out.requires_grad


# ---- interruptions -----------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path, pair: Pair, prose: Prose) -> None:
    def heard(record: dict[str, float], ready: object) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    watched: dict[str, Any] = {"watch": str(prose(9, 3)), "watch_tokens": 96, "watch_every": 2, "patience": 9}
    asked = request(pair, tmp_path / "out", prose(60), **watched)
    with pytest.raises(Stopped, match="stopped by SIGTERM at step 4 of 6, which is saved in .*step-00000004") as caught:
        distill(asked, heard=heard)
    assert caught.value.exit_code == 130 and signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "out").exists()
    told = Heard()
    distill(asked, tell=told)
    assert ("step", 4, "from the checkpoint at step 4") in told.events
    distill(request(pair, tmp_path / "whole", prose(60), **watched))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(
    tmp_path: Path, pair: Pair, prose: Prose
) -> None:
    def heard(record: dict[str, float], ready: Prepared) -> None:
        if record["step"] == 3:
            ready.student.model.get_input_embeddings().weight.data.fill_(torch.nan)  # type: ignore[operator]

    with pytest.raises(Diverged, match="loss nan, .*at step 4 .*the last good checkpoint is .*step-00000002; pass"):
        distill(request(pair, tmp_path / "out", prose(60)), heard=heard)
    scratch = next(tmp_path.glob(".out.*.partial"))
    assert [p.name for p in (scratch / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_never_a_checkpoint(tmp_path: Path, pair: Pair, prose: Prose) -> None:
    def heard(record: dict[str, float], ready: Prepared) -> None:
        ready.student.model.get_input_embeddings().weight.data[5] = torch.nan  # type: ignore[operator]

    asked = request(pair, tmp_path / "out", prose(60), checkpoint_steps=1)
    with pytest.raises(Diverged, match="the weights are not finite after step 1 .*no checkpoint was due yet"):
        distill(asked, heard=heard)


def stopped(asked: DistillRequest, at: int) -> Path:
    """The scratch folder of a run that a signal ended."""

    def heard(record: dict[str, float], ready: object) -> None:
        if record["step"] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        distill(asked, heard=heard)
    return next(asked.out.parent.glob(f".{asked.out.name}.*.partial"))


def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(
    tmp_path: Path, pair: Pair, prose: Prose
) -> None:
    asked = request(pair, tmp_path / "out", prose(60), checkpoint_steps=1)
    checkpoints = stopped(asked, 4) / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000004", "step-00000005"]
    newest = checkpoints / "step-00000005" / "rank-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\7")
    told = Heard()
    distill(asked, tell=told)
    assert any("step-00000005 is damaged (rank-00000.safetensors)" in note for note in told.notes)
    assert ("step", 4, "from the checkpoint at step 4") in told.events
    distill(request(pair, tmp_path / "whole", prose(60), checkpoint_steps=1))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_checkpoint_of_other_processes_or_text_is_refused(tmp_path: Path, pair: Pair, prose: Prose) -> None:
    text = tmp_path / "text.jsonl"
    text.write_bytes(prose(60).read_bytes())
    asked = request(pair, tmp_path / "out", text)
    scratch = stopped(asked, 3)
    whole = text.read_bytes()
    text.write_bytes(whole.replace(b"river", b"ocean"))
    with pytest.raises(ConfigError, match=r"text\.jsonl changed since the run began.*put it back, or pass --no-resume"):
        distill(asked)
    text.write_bytes(whole)
    facts = scratch / "checkpoints" / "step-00000004" / "checkpoint.json"
    facts.write_bytes(facts.read_bytes().replace(b'"processes": 1', b'"processes": 4'))
    with pytest.raises(ConfigError, match=r"was written by 4 processes and 1 run now; start 4 of them"):
        distill(asked)


def test_the_weights_best_on_the_watched_text_are_kept(tmp_path: Path, pair: Pair, prose: Prose) -> None:
    """Training on one sentence over and over: the watched text gets better, then worse, and the run ends early."""
    narrow = tmp_path / "narrow.jsonl"
    narrow.write_text(json.dumps({"text": "the old house stood by the river " * 200}) + "\n", encoding="utf-8")
    told = Heard()
    asked = request(
        pair, tmp_path / "out", narrow, epochs=40, tokens=40 * 8 * 24 * 4, rate=3e-3, watch=str(prose(30, 3)),
        watch_tokens=24 * 16, watch_every=4, patience=3,
    )  # fmt: skip
    record = distill(asked, tell=told).record
    looks = record["watch"]["looks"]
    best = min(looks, key=lambda w: w["divergence"])
    assert record["kept_step"] == best["step"] < record["steps"] < 160
    assert any("ended at step" in note for note in told.notes)
    assert record["watch"]["sources"][0]["source"].startswith("file:")


def test_a_run_that_only_harms_the_watched_text_is_no_artifact(tmp_path: Path, pair: Pair, prose: Prose) -> None:
    with pytest.raises(Worse, match="no step made the watched text better"):
        distill(request(pair, tmp_path / "out", prose(60), rate=1.0, watch=str(prose(9, 3)), watch_tokens=96))
    assert not (tmp_path / "out").exists()


# ---- quantization-aware ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Path:
    """The teacher at INT4, groups of 16, by our own quantizer."""
    from compress.cli.main import main

    out = tmp_path_factory.mktemp("quantized") / "awq"
    made = CliRunner().invoke(
        main,
        ["awq", str(pair[0]), "--group-size", "16", "--effort", "fast", "-o", str(out), "--device", "cpu",
         "--calib", str(calibration_data.default_calibration()), "--samples", "8", "--seq-len", "32"],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    return out


def test_codes_are_trained_and_written_in_the_same_format(
    tmp_path: Path, pair: Pair, prose: Prose, quantized: Path
) -> None:
    """Nearer to the original than before, the same tensors by name, dtype and shape; read by the streamed reader."""
    from compress.checkpoint import Checkpoint
    from compress.runtime.runner import Tokens
    from compress.runtime.streamed import TorchRunner

    asked = request(
        pair, tmp_path / "out", prose(120), student=quantized, scheme="w4a16", epochs=8, tokens=96 * 8 * 24, rate=2e-2
    )
    outcome = distill(asked)
    before, after = Checkpoint.open(quantized), Checkpoint.open(tmp_path / "out")
    assert {n: (i.dtype, i.shape) for n, i in before.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in after.tensors.items()
    }
    assert dict(after.config) == dict(before.config)
    assert outcome.record["format"] == "awq-gemm" and outcome.verified > 20
    layer = "model.layers.0.mlp.down_proj"
    assert not torch.equal(before.tensor(f"{layer}.qweight"), after.tensor(f"{layer}.qweight"))
    assert torch.equal(before.tensor(f"{layer}.qzeros"), after.tensor(f"{layer}.qzeros"))
    assert not torch.equal(before.tensor(f"{layer}.scales"), after.tensor(f"{layer}.scales"))
    text = [
        Tokens(
            ids_T=torch.tensor(models.load_tokenizer(pair[0])("the river had lived by the war since nobody").input_ids)
        )
    ]

    def log_probabilities(folder: Path) -> torch.Tensor:
        reading = TorchRunner.open(folder).read(text)
        return reading.logits(0, 0, len(text[0].ids_T)).log_softmax(-1)

    original, was, now = (log_probabilities(f) for f in (pair[0], quantized, tmp_path / "out"))
    divergence = [(original.exp() * (original - other)).sum(-1).mean() for other in (was, now)]
    assert divergence[1] < 0.85 * divergence[0]


def test_a_scheme_that_is_not_the_students(tmp_path: Path, pair: Pair, prose: Prose, quantized: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"is quantized \(w4a16\) and --scheme w8a8 is asked for; pass --scheme w4a16"
    ):
        distill(request(pair, tmp_path / "a", prose(60), student=quantized, scheme="w8a8"))
    with pytest.raises(ConfigError, match=r"is quantized \(w4a16\) and no --scheme is given"):
        distill(request(pair, tmp_path / "b", prose(60), student=quantized))
    with pytest.raises(ConfigError, match="--scheme w4a16 trains the codes of a quantized student and .* holds none"):
        distill(request(pair, tmp_path / "c", prose(60), scheme="w4a16"))
