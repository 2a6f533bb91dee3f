"""Scales and norms learned through the whole model: gradients, what is judged is what is written, kills, refusals."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from compress import numerics
from compress.calibration_rows import read_rows
from compress.checkpoint import Checkpoint
from compress.errors import ConfigError
from compress.files import file_sha256
from compress.model import StreamedModel
from compress.quantize import end_to_end, end_to_end_stage
from compress.quantize.awq_stage import AwqRequest, quantize_awq, request_from_record
from compress.quantize.end_to_end import held_out, offset_of
from compress.quantized import QuantizedWeight
from compress.sampling import sample_from_model
from compress.scheme import Scheme
from compress.stage import Outcome
from compress.tell import Heard, Tell
from compress.workspace import resolve

G32 = Scheme(group_size=32)


@pytest.fixture
def request_of(calib_text: Path, tmp_path: Path) -> Any:
    def make(model: Path, out: str = "out", **changes: Any) -> AwqRequest:
        options: dict[str, Any] = {"calib": str(calib_text), "samples": 20, "seq_len": 32, "effort": "fast", **changes}
        return AwqRequest(source=resolve(str(model)), out=tmp_path / out, scheme=G32, **options)

    return make


@pytest.fixture
def quantize(request_of: Any) -> Any:
    def run(model: Path, out: str = "out", tell: Tell | None = None, **changes: Any) -> Outcome:
        return quantize_awq(request_of(model, out, **changes), tell or Tell())

    return run


def contents(folder: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in sorted(folder.iterdir())}


@pytest.fixture
def quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates at which a few updates are seen, in codes too."""
    options = partial(end_to_end_stage.EndToEndOptions, rate=0.01, code_rate=0.03)
    monkeypatch.setattr(end_to_end_stage, "EndToEndOptions", options)


@torch.no_grad()
def plain_divergence(original: Path, artifact: Path, ids: torch.Tensor) -> float:
    """Mean KL of whole logits, both models streamed from their folders."""
    logits = []
    for folder in (original, artifact):
        model = StreamedModel.open(folder)
        hidden = model.embed(ids)
        for i in range(model.num_blocks):
            model.load_block(i)
            hidden = model.run_block(i, hidden)
            model.release_block(i)
        logits.append(model.head(hidden).double().log_softmax(-1))
    return float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())


# ---- what is learned ---------------------------------------------------------------------------------------


def halves(weight: QuantizedWeight) -> list[QuantizedWeight]:
    """Two linears of an input that have a weight's first two rows, and the others."""
    names = ("codes_OI", "scale_OG", "zero_point_OG")
    return [
        QuantizedWeight(**{n: getattr(weight, n)[rows] for n in names}, scheme=weight.scheme)
        for rows in (slice(2), slice(2, None))
    ]


@given(seed=st.integers(0, 2**16), symmetric=st.booleans())
@settings(max_examples=20, deadline=None)
def test_gradients_are_the_formulas(seed: int, symmetric: bool) -> None:
    """Beside autograd on the formula with scales that are not rounded: half a float16 step each of 8 terms apart."""
    g = torch.Generator().manual_seed(seed)
    scheme = Scheme(group_size=8, symmetric=symmetric)
    codes = torch.randint(0, 16, (6, 24), generator=g)
    zero = torch.full((6, 3), 8) if symmetric else torch.randint(0, 16, (6, 3), generator=g)
    scale = (torch.rand(6, 3, generator=g) + 0.1).half()
    log = 0.1 * torch.randn(6, 3, generator=g)
    outer = torch.randn(6, 24, generator=g)
    weight = QuantizedWeight(
        codes_OI=codes.to(torch.uint8), scale_OG=scale, zero_point_OG=zero.to(torch.uint8), scheme=scheme
    )
    stack = end_to_end._Linears(["a", "b"], halves(weight), torch.device("cpu"), codes=True)
    stack.log.data.copy_(log)
    theirs, real = (x.clone().requires_grad_() for x in (log, codes.float()))
    made = stack.made()
    (made * outer).sum().backward()
    ours, latent = stack.log, stack.codes_OI
    formula = numerics.dequantize(numerics.to_groups(real, scheme), scale.float() * theirs.exp(), zero.float()).flatten(
        1
    )
    (formula * outer).sum().backward()
    assert torch.equal(made, torch.cat([part.dequantize() for part in stack.as_stored()]))
    assert latent.grad is not None and real.grad is not None
    assert torch.allclose(latent.grad, real.grad, rtol=2**-10)
    assert torch.allclose(made, formula, rtol=2**-11, atol=1e-6)
    assert ours.grad is not None and theirs.grad is not None
    largest = float(formula.detach().abs().max() * outer.abs().max())
    assert float((ours.grad - theirs.grad).abs().max()) <= 8 * 2**-11 * largest


def test_codes_that_are_learned_are_rounded_and_stay_codes() -> None:
    weight = QuantizedWeight(
        codes_OI=torch.tensor([[0, 15, 7, 8, 3, 3, 3, 3]], dtype=torch.uint8), scale_OG=torch.ones(1, 1).half(),
        zero_point_OG=torch.full((1, 1), 8, dtype=torch.uint8), scheme=Scheme(group_size=8),
    )  # fmt: skip
    stack = end_to_end._Linears(["only"], [weight], torch.device("cpu"), codes=True)
    moved = stack.codes_OI
    moved.data += torch.tensor([-0.7, 0.7, 0.4, 0.6, -0.4, -0.6, 0, 0])
    (found,) = stack.as_stored()
    assert found.codes_OI.tolist() == [[0, 15, 7, 9, 3, 2, 3, 3]]
    made = stack.made()
    assert torch.equal(made, found.dequantize())
    made.sum().backward()
    assert moved.grad is not None and moved.grad.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]  # none beyond the range


def test_norms_that_multiply_by_one_plus_weight_are_told_apart() -> None:
    layer = nn.LayerNorm(8)
    nn.init.normal_(layer.bias)
    llama, gemma = LlamaRMSNorm(8), GemmaRMSNorm(8)
    for norm, offset in ((llama, 0.0), (gemma, 1.0), (layer, 0.0)):
        nn.init.normal_(norm.weight)
        kept = norm.weight.clone()
        assert offset_of(norm) == offset
        assert torch.equal(norm.weight, kept)


def test_held_out_rows_are_of_both_kinds() -> None:
    """Rows of the text first, then the model's own, of which every other one may be a conversation."""
    rows = held_out(256)
    assert len(rows) == 17 and sum(i < 128 for i in rows) == 8
    assert {i % 2 for i in rows if i >= 128} == {0, 1}
    assert held_out(2) == [1]


# ---- from folder to folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPTNeoX"])
def test_divergence_falls_and_what_is_judged_is_what_is_written(
    family: str, build_model: Any, quantize: Any, quicker: None
) -> None:
    """The reported figures are those of the two artifacts, read back block by block; zero points stay, as do
    embeddings."""
    changes = {"head_dim": None, "num_key_value_heads": None} if family == "GPTNeoX" else {}
    folder = build_model(family, **changes)
    before, told = quantize(folder, "before"), Heard()
    after = quantize(folder, "after", told, end_to_end=40)
    report = after.record["end_to_end"]
    assert report["kept"] and report["held_out_rows"] == 1 and after.record["options"]["end_to_end"] == 40
    assert ("start", "update through the whole model", 40) in told.events and ("step", 40, "") in told.events
    rows = rows_of(folder, after)[held_out(20)]
    assert plain_divergence(folder, before.out, rows) == pytest.approx(report["held_out_kl"], rel=1e-3, abs=5e-7)
    assert plain_divergence(folder, after.out, rows) == pytest.approx(report["held_out_kl_learned"], rel=1e-3, abs=5e-7)
    a, b = (load_file(made.out / "model.safetensors") for made in (before, after))
    assert a.keys() == b.keys()
    changed = {name for name in a if not torch.equal(a[name], b[name])}
    allowed = {name for name in a if name.endswith(".scales") or a[name].ndim == 1 and name.endswith("norm.weight")}
    allowed |= {name for name in a if a[name].ndim == 1 and name.endswith("layernorm.weight")}
    assert changed <= allowed | {name for name in a if name.endswith(".qweight")}
    assert any(name.endswith(".qweight") for name in changed)
    assert sum(name.endswith(".scales") for name in changed) == sum(name.endswith(".scales") for name in a)
    final = [name for name in allowed if "layers." not in name]
    assert len(final) == 1 and set(final) <= changed


def rows_of(folder: Path, made: Outcome) -> torch.Tensor:
    from compress.calibration_rows import Text

    text = made.record["calibration"]["source"].removeprefix("file:")
    return read_rows(Text(calib=text, samples=20, seq_len=32), StreamedModel.open(folder), is_reference=False).ids_NT


def test_same_bytes_twice_blocks_computed_again_or_not_and_none_without_updates(
    build_model: Any, quantize: Any, quicker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_model()
    plain = contents(quantize(folder, "plain").out)
    first = contents(quantize(folder, "one", end_to_end=3).out)
    assert contents(quantize(folder, "two", end_to_end=3).out) == first
    monkeypatch.setattr(end_to_end_stage, "KEPT_ON_CPU", 0)
    assert contents(quantize(folder, "three", end_to_end=3).out) == first
    none = contents(quantize(folder, "four", end_to_end=0).out)
    assert none["model.safetensors"] == plain["model.safetensors"] != first["model.safetensors"]


@pytest.mark.parametrize("at", ["while it learns", "before it has a name"])
def test_a_killed_run_ends_with_the_same_bytes(
    at: str, build_model: Any, quantize: Any, quicker: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    class Stops(Tell):
        def step(self, done: int | None = None, doing: str = "", **more: Any) -> None:
            if done == 2 and more == {}:
                raise Killed

    folder = build_model()
    expected = contents(quantize(folder, "whole", end_to_end=3).out)
    options = {"end_to_end": 3}
    if at == "while it learns":
        with pytest.raises(Killed):
            quantize(folder, "cut", Stops(), **options)
    else:
        with monkeypatch.context() as patched:
            patched.setattr("compress.stage.assemble", lambda *a, **k: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                quantize(folder, "cut", **options)
    assert not (tmp_path / "cut").exists()
    told = Heard()
    again = quantize(folder, "cut", told, **options)
    assert again.resumed == 2 and contents(again.out) == expected
    assert ("step", 3, "") in told.events or at == "before it has a name"
    assert any("learning codes" in text for text in told.said) == (at == "while it learns")


def test_what_an_earlier_process_learned_is_believed_only_whole(
    build_model: Any, quantize: Any, quicker: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_model()
    expected = contents(quantize(folder, "whole", end_to_end=3).out)
    with monkeypatch.context() as patched:
        patched.setattr("compress.stage.assemble", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, "cut", end_to_end=3)
    (found,) = [p for p in tmp_path.rglob("end-to-end/block-00001.safetensors")]
    data = bytearray(found.read_bytes())
    data[-1] ^= 1
    found.write_bytes(bytes(data))
    told = Heard()
    assert contents(quantize(folder, "cut", told, end_to_end=3).out) == expected
    assert any("learning codes" in text for text in told.said)


def test_what_does_not_help_on_held_out_rows_is_undone(
    build_model: Any, quantize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end_stage, "EndToEndOptions", partial(end_to_end_stage.EndToEndOptions, rate=3.0))
    folder = build_model()
    made = quantize(folder, "made", end_to_end=3)
    report = made.record["end_to_end"]
    assert not report["kept"] and report["held_out_kl_learned"] > report["held_out_kl"]
    plain = quantize(folder, "plain")
    assert contents(made.out)["model.safetensors"] == contents(plain.out)["model.safetensors"]


def test_own_rows_are_others_than_those_of_the_blocks(
    build_model: Any, quantize: Any, quicker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows to learn from and to be judged on; numbered behind all that the blocks may have been given."""
    folder, sampled = build_model(), []

    def remembered(*args: Any, **options: Any) -> torch.Tensor:
        sampled.append((options["first_row"], sample_from_model(*args, **options)))
        return sampled[-1][1]

    monkeypatch.setattr(end_to_end_stage, "sample_from_model", remembered)
    monkeypatch.setattr(AwqRequest, "own_rows", 10)
    made = quantize(folder, "made", end_to_end=3)
    report = made.record["end_to_end"]
    assert report["own_rows"] == 10 and report["held_out_rows"] == len(held_out(30)) == 2
    ((first, rows),) = sampled
    assert first == 20 and rows.shape == (10, 32)
    assert contents(quantize(folder, "again", end_to_end=3).out) == contents(made.out)


# ---- whether it is done ----------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit(
    build_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before any work; where memory went only later, the blocks are kept as they are, and that is said."""
    monkeypatch.setattr(end_to_end_stage, "available", lambda device: 1_000_000)
    folder = build_model()
    with pytest.raises(ConfigError, match="--end-to-end 5: .* need .* free; leave it out, or pass fewer --samples"):
        quantize(folder, end_to_end=5)
    assert not (tmp_path / "out").exists()
    free = iter((1 << 40, 1_000_000))
    monkeypatch.setattr(end_to_end_stage, "available", lambda device: next(free))
    made = quantize(folder, end_to_end=5)
    assert "predicted to need" in made.record["end_to_end"]["left_out"]
    assert any("were not learned through the whole model" in note for note in made.notes)


def test_what_is_done_unasked(build_model: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`best` at 4 bits on a GPU, for a model that is small enough; own rows where the user did not say how many."""
    folder = build_model()
    asked = request_of(folder, effort="best", device="cuda")
    assert (asked.updates, asked.own_rows) == (400, 512)
    assert asked.options()["end_to_end"] == 400
    for changes in ({"device": "cpu"}, {"effort": "balanced"}, {"end_to_end": 0}, {"scheme": Scheme(num_bits=8)}):
        other = replace(asked, **changes)
        assert other.updates == 0 and "end_to_end" not in other.options()
    assert replace(asked, self_samples=0).own_rows == 0 and replace(asked, self_samples=0).updates == 400
    assert replace(asked, device="cpu", end_to_end=7).updates == 7
    monkeypatch.setattr("compress.sampling.LARGEST_ON_GPU", 1000)
    assert (asked.updates, asked.own_rows) == (0, 0)


def test_what_does_not_fit_unasked_is_left_out(
    build_model: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked for it, so that there is no room for it stops nothing; it is said, and in the manifest."""
    monkeypatch.setattr(end_to_end_stage, "available", lambda device: 1_000_000)
    monkeypatch.setattr(AwqRequest, "updates", 5)
    made = quantize_awq(request_of(build_model()))
    assert "predicted to need" in made.record["end_to_end"]["left_out"]
    assert any("were not learned through the whole model" in note for note in made.notes)


def test_what_is_left_out_is_said(build_model: Any, quantize: Any) -> None:
    made = quantize(build_model(), end_to_end=3, samples=1)
    assert "one calibration row" in made.record["end_to_end"]["left_out"]
    assert any("were not learned through the whole model" in note for note in made.notes)


def test_bytes_predicted_hold_what_is_held(build_model: Any) -> None:
    """Four bytes a parameter at least; more with more text, and less once blocks are computed again."""
    model = StreamedModel.open(build_model())
    numbers = sum(info.num_bytes for info in Checkpoint.open(model.checkpoint.path).tensors.values())
    need = partial(end_to_end_stage.bytes_needed, model, 32)
    assert numbers < need(1000, 100) < need(2000, 100) < need(2000, 1000)
    end_to_end_stage.KEPT_ON_CPU, kept = 0, end_to_end_stage.KEPT_ON_CPU
    try:
        again = need(2000, 100_000)
    finally:
        end_to_end_stage.KEPT_ON_CPU = kept
    assert again < need(2000, 100_000)


def test_a_recorded_recipe_learns_again(build_model: Any, quantize: Any, tmp_path: Path, quicker: None) -> None:
    """As many updates as the manifest says; none where it says nothing of them, as manifests from before do."""
    folder = build_model()
    made = quantize(folder, "made", end_to_end=3)
    request = partial(request_from_record, folder=made.out, source=resolve(str(folder)), scheme=G32)
    assert contents(quantize_awq(request(made.record, out=tmp_path / "again")).out) == contents(made.out)
    plain = quantize(folder, "plain")
    assert "end_to_end" not in plain.record["options"] and "end_to_end" not in plain.record
    assert request(plain.record, out=tmp_path / "x").end_to_end == 0
