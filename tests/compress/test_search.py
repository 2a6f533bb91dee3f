"""The search for the smallest artifact that passes: which one is tried next, and whole runs, killed and taken up."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import search as module
from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.files import file_sha256
from compress.formats import stored
from compress.model import StreamedModel
from compress.plan import LayerPlan, LayerScheme
from compress.quantize.auto_stage import AutoRequest
from compress.quantize.choices import Choices
from compress.quantize.lint import lint
from compress.quantize.menu import Menu
from compress.scheme import Scheme
from compress.search import Goal, Judged, Tried, best_of, next_choice, search
from compress.tell import Heard
from compress.workspace import resolve
from evaluators import model_card
from exporters.hf import vllm_rules
from exporters.hf import write as hf_write
from exporters.hf.write import unpacked_nowhere
from exporters.sizing.inventory import inventory

# ---- which one next ------------------------------------------------------------------------------------


def choices(spread: int = 7) -> Choices:
    """Of a model of 48 sets of linears, which differ in what they cost."""
    layers = {f"model.layers.{i}.mlp.down_proj": (1024, 2048) for i in range(48)}
    sets = []
    for i, name in enumerate(layers):
        weight = 1e-3 * (1 + i * 29 % spread)
        kl = {"w4g128": weight, "w4g64": 0.85 * weight, "w4g32": 0.7 * weight, "w8g128-sym": 0.005 * weight}
        sets.append({"block": i, "layers": [name], "kl": {**kl, "float16": 0.0}})
    plan = LayerPlan.uniform(layers, LayerScheme(weight=Scheme()))
    return Choices(Menu(), plan, {"sets": sets}, layers, 10_000_000)


def looked_for(found: Choices, goal: Goal, kappa: float, noise: float) -> list[Tried]:
    """A search whose artifacts diverge by a constant times what is predicted, and lose that and a margin."""
    tried: list[Tried] = []
    while len(tried) < goal.tries:
        choice = next_choice(found, goal, tried)
        if choice is None:
            break
        kl = kappa * choice.kl
        lower = math.exp(-kl - noise * math.sqrt(kl))
        judged = Judged(passes=lower >= (goal.gate or 1), recovery=math.exp(-kl), lower=lower, upper=1.0, kl=kl)
        size = choice.num_bytes
        tried.append(Tried(choice=choice, budget=size, num_bytes=size, folder=Path(), judged=judged))
    return tried


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 3), st.floats(0, 0.03), st.sampled_from([0.95, 0.97, 0.98, 0.99]))
def test_a_few_tries_find_nearly_the_smallest_that_passes(kappa: float, noise: float, gate: float) -> None:
    found = choices()
    goal = Goal(gate=gate, tries=4)
    tried = looked_for(found, goal, kappa, noise)
    best = best_of(tried)
    assert best.judged is not None and best.judged.passes
    # the smallest that passes, by trying all sizes
    allowed = -math.log(gate)
    limit = ((-noise + math.sqrt(noise**2 + 4 * allowed)) / 2) ** 2 / kappa
    smallest = found.smallest_below(limit).num_bytes
    assert best.num_bytes <= 1.04 * smallest, (best.num_bytes, smallest, [t.num_bytes for t in tried])


def test_nothing_is_made_twice_and_nothing_above_the_bytes_allowed() -> None:
    found = choices()
    goal = Goal(gate=0.98, most=found.within(found.least + 500_000).num_bytes, tries=6)
    tried = looked_for(found, goal, 1.0, 0.01)
    sizes = [one.num_bytes for one in tried]
    assert len(set(sizes)) == len(sizes) and max(sizes) <= (goal.most or 0)
    assert not any(one.judged and one.judged.passes for one in tried), "there is no room for one that passes"
    assert best_of(tried).num_bytes == max(sizes)


def test_without_a_gate_the_best_within_the_bytes_is_made_once() -> None:
    found = choices()
    goal = Goal(gate=None, most=found.least + 3_000_000)
    choice = next_choice(found, goal, [])
    assert choice is not None and choice.num_bytes <= (goal.most or 0)
    assert choice.kl < min(c.kl for c in found.uniform().values() if c.num_bytes <= choice.num_bytes)


def test_float16_alone_is_no_artifact(request_for: AutoRequest) -> None:
    assert next_choice(choices(), Goal(gate=1 - 1e-12), []) is None
    with pytest.raises(ConfigError, match="nothing but float16 is predicted to keep so much"):
        search(request_for, Goal(gate=1 - 1e-12), lambda folder: pytest.fail("nothing is made"))
    with pytest.raises(ConfigError, match="within 9.00 MB everything may stay in float16"):
        search(request_for, Goal(gate=None, most=9_000_000), None)


def test_goals_that_are_none() -> None:
    with pytest.raises(ConfigError, match="nothing is asked for"):
        Goal(gate=None)
    with pytest.raises(ConfigError, match="--gate 1.5 is not between"):
        Goal(gate=1.5)


# ---- whole runs ----------------------------------------------------------------------------------------


@pytest.fixture
def request_for(build_model: Any, calib_text: Path, tmp_path: Path) -> AutoRequest:
    source = resolve(str(build_model(intermediate_size=256)))
    return AutoRequest(source=source, out=tmp_path / "made" / "auto", calib=str(calib_text), samples=12, seq_len=64)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in sorted(folder.iterdir())}


def budget_of(request: AutoRequest, share: float) -> int:
    """Bytes between everything in the fewest bits and everything in 8."""
    from compress.quantize.auto_stage import base_plan
    from compress.quantize.choices import bytes_outside
    from compress.quantize.menu import num_bytes
    from compress.stage import shapes_of

    model = StreamedModel.open(request.source.path)
    shapes = shapes_of(model, base_plan(request, model))
    least, most = (
        sum(num_bytes(request.menu.options(s[1])[i], s) for s in shapes.values()) for i in (0, -2)
    )  # fmt: skip
    return round(bytes_outside(model, set(shapes)) + least + share * (most - least))


def test_a_mixed_artifact_is_within_its_bytes_and_says_what_each_layer_is(request_for: AutoRequest) -> None:
    budget = budget_of(request_for, 0.5)
    found = search(request_for, Goal(gate=None, most=budget), None)
    assert found.best is not None and found.choices is not None
    assert found.best.num_bytes == found.best.choice.num_bytes <= budget, "predicted to the byte"
    checkpoint = Checkpoint.open(found.out)
    config = checkpoint.config["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    assert len(config["config_groups"]) > 1
    assert "transformers 5.23 does not load" in found.notes[-1]
    read = stored(checkpoint).plan
    assert dict(read) == {n: found.best.choice.plan[n] for n in sorted(found.best.choice.plan.quantized)}
    for prefix in ("model.layers.0", "model.layers.1"):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({read.get(f"{prefix}.{name}") for name in names}) == 1
    assert sorted(p.name for p in found.out.parent.iterdir()) == ["auto"], "no scratch, no artifact that lost"
    record = found.record
    assert record["stage"] == "auto" and record["parent"]["path"] == "../../model"
    assert [one["chosen"] for one in record["choice"]["sets"]] == list(found.best.choice.labels)
    again = search(replace(request_for, force=True), Goal(gate=None, most=budget), None)
    assert again.record == record


def test_one_scheme_is_a_plain_awq_folder(request_for: AutoRequest) -> None:
    request = replace(request_for, menu=Menu(int4=(32,), int8=False))
    found = search(request, Goal(gate=None, most=budget_of(request_for, 0.4)), None)
    config = Checkpoint.open(found.out).config["quantization_config"]
    assert config["quant_method"] == "awq" and config["group_size"] == 32
    assert len(config["modules_to_not_convert"]) > 1, "some were left in float16"
    assert found.best is not None and found.best.num_bytes <= found.best.choice.num_bytes


class Killed(Exception):
    """Stands for a kill: nothing of the run goes on."""


def test_a_killed_search_goes_on_and_ends_with_the_same_bytes(
    request_for: AutoRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the first artifact is judged, and again while the second is made."""
    goal = Goal(gate=0.98, tries=3)
    kappa = 40.0  # small random models diverge by little

    def judge(folder: Path) -> Judged:
        record = json.loads((folder / "compress.json").read_text())["lineage"][0]
        lower = math.exp(-kappa * record["choice"]["predicted_kl"])
        return Judged(passes=lower >= 0.98, recovery=lower, lower=lower, upper=lower, kl=0.0)

    whole = search(request_for, goal, judge)
    wanted = contents(whole.out)
    assert len(whole.tried) > 1 and whole.best is not None
    assert whole.best.judged is not None and whole.best.judged.passes

    def dies(*_: Any) -> Any:
        raise Killed

    request = replace(request_for, out=request_for.out.with_name("again"))
    with pytest.raises(Killed):
        search(request, goal, dies)
    measured: list[int] = []
    monkeypatch.setattr(module, "measure", lambda *a: measured.append(1))
    run = module.stage.run
    made: list[Path] = []

    def dies_at_second(stage: Any, job: Any, tell: Any) -> Any:
        made.append(job.out)
        raise Killed

    monkeypatch.setattr(module.stage, "run", dies_at_second)
    with pytest.raises(Killed):
        search(request, goal, judge)
    assert len(made) == 1 and made[0].name == f"try-{whole.tried[1].choice.num_bytes}", "the first was there already"
    monkeypatch.setattr(module.stage, "run", run)
    heard = Heard()
    found = search(request, goal, judge, heard)
    assert not measured, "what was measured is kept"
    assert [t.num_bytes for t in found.tried] == [t.num_bytes for t in whole.tried]
    assert contents(found.out) == wanted
    assert sorted(p.name for p in found.out.parent.iterdir()) == ["again", "auto"]


def test_what_cannot_be_is_refused_before_work(request_for: AutoRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="0.10 MB are too few: the smallest that can be chosen takes"):
        search(request_for, Goal(gate=None, most=100_000), None)
    with pytest.raises(ConfigError, match="a gate needs a text to judge on"):
        search(request_for, Goal(gate=0.98), None)
    with pytest.raises(ConfigError, match="bits are chosen for fast and balanced"):
        replace(request_for, effort="best")
    with pytest.raises(ConfigError, match="calibration rows are too few to measure"):
        search(replace(request_for, samples=2), Goal(gate=None, most=budget_of(request_for, 0.5)), None)
    goal = Goal(gate=None, most=budget_of(request_for, 0.5))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="measures the model in one process, and 2 were started"):
        search(request_for, goal, None)
    assert not request_for.out.parent.exists() or not list(request_for.out.parent.glob("auto"))


def test_the_lint_sees_what_readers_would_take_otherwise(request_for: AutoRequest) -> None:
    found = search(request_for, Goal(gate=None, most=budget_of(request_for, 0.5)), None)
    checkpoint = Checkpoint.open(found.out)
    plan = LayerPlan.from_json(found.record["plan"])
    fused = [one["layers"] for one in found.record["choice"]["sets"]]
    lint(checkpoint, plan, fused)
    groups = checkpoint.config["quantization_config"]["config_groups"]
    names = groups["group_0"]["targets"]

    def with_groups(**changed: Any) -> Checkpoint:
        config = {**checkpoint.config["quantization_config"], "config_groups": {**groups, **changed}}
        return replace(checkpoint, config={**checkpoint.config, "quantization_config": config})

    several = {**groups["group_0"], "targets": [*names, groups["group_1"]["targets"][0]]}
    for wrong in (with_groups(group_0=several), with_groups(group_0={**groups["group_0"], "targets": ["Linear"]})):
        with pytest.raises(ArtifactError):
            lint(wrong, plan, fused)
    with pytest.raises(ArtifactError, match="are one matrix in engines and have several schemes"):
        lint(checkpoint, plan, [[names[0], groups["group_1"]["targets"][0]]])


IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    model = StreamedModel.open(folder)
    hidden = model.embed(IDS)
    for index in range(model.num_blocks):
        model.load_block(index)
        hidden = model.run_block(index, hidden)
        model.release_block(index)
    return model.head(hidden)


@torch.no_grad()
def transformers_logits(folder: Path) -> torch.Tensor:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits
    return logits


def test_transformers_computes_a_symmetric_mix_as_we_do(request_for: AutoRequest) -> None:
    request = replace(request_for, menu=Menu(symmetric=True))
    found = search(request, Goal(gate=None, most=budget_of(request, 0.5)), None)
    torch.testing.assert_close(logits_of(found.out), transformers_logits(found.out), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_mix_with_zero_points_as_a_transformers_model(request_for: AutoRequest) -> None:
    """compressed-tensors 0.20 makes room for unpacked zero points on the meta device. If this fails since it has been
    mended, the note, `--sym`'s help and the troubleshooting page say something that is no longer so."""
    import compress

    found = search(request_for, Goal(gate=None, most=budget_of(request_for, 0.5)), None)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers_logits(found.out)
    assert unpacked_nowhere(stored(Checkpoint.open(found.out))), "an export says to load it as the next line does"
    model = compress.load_model(found.out, device="cpu", dtype="float32")
    torch.testing.assert_close(model(IDS).logits, logits_of(found.out))
    assert model.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 27)


# ---- the output matrix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_output_matrix_is_chosen_for(symmetric: bool, request_for: AutoRequest) -> None:
    """Within bytes that leave no room for it in float16: in integers, named, read by us and by transformers."""
    menu = Menu(symmetric=symmetric, dense=False, lm_head=True)
    request = replace(request_for, menu=menu)
    found = search(request, Goal(gate=None, most=budget_of(request, 0.6)), None)
    assert found.best is not None and found.choices is not None
    assert found.best.num_bytes == found.best.choice.num_bytes, "predicted to the byte"
    last = found.record["choice"]["sets"][-1]
    assert last["layers"] == ["lm_head"] and last["block"] == 2
    assert last["kl"].keys() == found.record["choice"]["sets"][0]["kl"].keys()
    checkpoint = Checkpoint.open(found.out)
    assert "lm_head.weight" not in checkpoint and "lm_head.weight_packed" in checkpoint
    config = checkpoint.config["quantization_config"]
    assert any("lm_head" in group["targets"] for group in config["config_groups"].values())
    assert "lm_head" not in config["ignore"] and config["quant_method"] == "compressed-tensors"
    assert "March 2026" in found.record["readers"]["vllm"]
    assert any("output matrix is in integers, which needs of a reader: vllm" in note for note in found.notes)
    exported = vllm_rules.check(stored(checkpoint))
    assert any("lm_head is in integers, which needs of a reader: vllm pull request 37291" in note for note in exported)
    assert "The output matrix is in integers, which needs of a reader: vllm" in model_card.card(found.out)
    parts = hf_write._parts(stored(checkpoint))
    assert 0 < parts["lm_head"] < 4096 * 64 * 2 and parts["embedding"] == 4096 * 64 * 2
    assert inventory(stored(checkpoint)).packed == sum(
        math.prod(shape) for name, shape in found.choices.shapes.items() if name != "lm_head"
    )
    reported = next(layer for layer in found.record["layers"] if layer["layer"] == "lm_head")
    assert 0 < reported["error"] < reported["rtn_error"] < 0.1
    original = logits_of(request.source.path)
    assert float((logits_of(found.out) - original).norm() / original.norm()) < 0.3
    if symmetric:
        torch.testing.assert_close(logits_of(found.out), transformers_logits(found.out), rtol=1e-3, atol=1e-3)


def test_the_divergence_of_the_output_matrix_is_that_of_a_model_with_another(request_for: AutoRequest) -> None:
    """What is measured of it, against a model whose output matrix alone was rounded, by its own code."""
    from compress import numerics
    from compress.divergence import head_divergence

    model = StreamedModel.open(request_for.source.path)
    hidden = model.embed(IDS)
    for index in range(model.num_blocks):
        model.load_block(index)
        hidden = model.run_block(index, hidden)
        model.release_block(index)
    scheme = Scheme(group_size=32)
    changed = numerics.round_to_nearest(model.checkpoint.tensor("lm_head.weight").float(), scheme)
    normed = model.head_input(hidden)
    before, after = (
        (normed.double() @ w.double().t()).log_softmax(-1)
        for w in (model.checkpoint.tensor("lm_head.weight"), changed)
    )  # fmt: skip
    expected = float((before.exp() * (before - after)).sum(-1).mean())
    assert head_divergence(model, [hidden], changed) == pytest.approx(expected, rel=1e-3)


def test_one_scheme_with_the_output_matrix_names_it(request_for: AutoRequest) -> None:
    """Readers do not take an output matrix for a `Linear`; AutoAWQ's layout has no word for it."""
    request = replace(request_for, menu=Menu(int4=(32,), int8=False, dense=False, lm_head=True))
    found = search(request, Goal(gate=None, most=10_000_000), None)
    config = Checkpoint.open(found.out).config["quantization_config"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear", "lm_head"]]


def test_an_output_matrix_that_is_the_embedding_is_refused(build_model: Any, request_for: AutoRequest) -> None:
    source = resolve(str(build_model(intermediate_size=256, tie_word_embeddings=True)))
    request = replace(request_for, source=source, menu=Menu(lm_head=True))
    with pytest.raises(UnsupportedError, match="is its input embedding, which no reader takes in integers"):
        search(request, Goal(gate=None, most=1_000_000), None)


def test_a_search_with_the_output_matrix_goes_on_where_it_was(
    request_for: AutoRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the output matrix and what is assembled of it: read back, the same bytes."""
    request = replace(request_for, menu=Menu(dense=False, lm_head=True))
    goal = Goal(gate=None, most=budget_of(request, 0.6))
    wanted = contents(search(request, goal, None).out)

    def dies(*_: Any, **__: Any) -> Any:
        raise Killed

    again = replace(request, out=request.out.with_name("again"))
    monkeypatch.setattr(module.stage, "assemble", dies)
    with pytest.raises(Killed):
        search(again, goal, None)
    monkeypatch.undo()
    from compress.quantize import auto_stage

    monkeypatch.setattr(auto_stage, "quantize_head", dies)
    assert contents(search(again, goal, None).out) == wanted
