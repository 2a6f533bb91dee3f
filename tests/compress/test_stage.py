"""The driver with stages of its own: one that leaves blocks out, one that writes INT8 in both layouts."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import assemble, numerics, output, stage
from compress.artifact import read_manifest
from compress.block import BlockDone, BlockResult, LoadedBlock
from compress.calibration_rows import Text
from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, UnsupportedError
from compress.files import file_sha256, read_json
from compress.formats import compressed_tensors, stored
from compress.linear import linears, weight_OI
from compress.model import StreamedModel
from compress.plan import ActivationScheme, LayerPlan, LayerScheme
from compress.quantized import QuantizedWeight, StaticInput
from compress.scheme import Scheme
from compress.stage import Job, Outcome, Stage, names_of, run
from compress.statistics import Wanted
from compress.tell import Heard
from compress.workspace import resolve

Build = Callable[..., Path]
W8 = Scheme(num_bits=8, group_size=-1, symmetric=True)
W8A8 = LayerScheme(weight=W8, input=ActivationScheme(dynamic=False))
W8A16 = LayerScheme(weight=W8)


def nothing_recorded(done: Sequence[BlockDone], plan: LayerPlan) -> dict[str, Any]:
    return {"reports": [step.report for step in done]}


def shorter(keep: list[int]) -> Stage:
    """Leaves out every block but those to keep."""

    def block(loaded: LoadedBlock, plan: LayerPlan) -> BlockResult:
        dense = {name: value.clone() for name, value in loaded.module.state_dict().items()}
        return BlockResult(quantized={}, dense=dense, report={"was": loaded.index})

    return Stage(
        name="shorten",
        options={"keep": keep},
        plan=lambda model: LayerPlan.dense([*names_of(model)[0], *names_of(model)[1]]),
        block=block,
        config=lambda model, plan: {**model.checkpoint.config, "num_hidden_layers": len(keep)},
        record=nothing_recorded,
        blocks=lambda model: keep,
    )


def int8() -> Stage:
    """Rounds to nearest; down projections keep their inputs, all others quantize them by the ranges seen."""

    def plan(model: StreamedModel) -> LayerPlan:
        outside, inside = names_of(model)
        quantized = LayerPlan.uniform(inside, W8A8).with_layers("down_proj", W8A16)
        return LayerPlan({**LayerPlan.dense(outside), **quantized})

    def block(loaded: LoadedBlock, plan: LayerPlan) -> BlockResult:
        result = BlockResult(quantized={}, dense={}, report={"layers": len(linears(loaded.module))})
        for group, statistics in zip(loaded.groups, loaded.statistics, strict=True):
            for name in group.layers:
                w_OGg = numerics.to_groups(weight_OI(loaded.module.get_submodule(name)).float(), W8)
                scale, zero = numerics.scale_and_zero(*numerics.range_of(w_OGg), W8)
                codes = numerics.quantize(w_OGg, scale, zero, W8)
                result.quantized[name] = QuantizedWeight.from_parts(codes, scale, zero, W8, torch.float32)
                if plan[loaded.prefix + name].input is not None:
                    amax = statistics.amax_I.amax().reshape(1)
                    middle = torch.tensor([128], dtype=torch.uint8)
                    result.inputs[name] = StaticInput(scale=amax / 127, zero_point=middle)
        taken = {f"{name}.weight" for name in result.quantized}
        state = loaded.module.state_dict()
        result.dense.update({name: value.clone() for name, value in state.items() if name not in taken})
        return result

    return Stage(
        name="int8",
        options={},
        format=compressed_tensors,
        paths=2,
        wants=Wanted(ranges=True),
        plan=plan,
        block=block,
        config=lambda model, plan: dict(model.checkpoint.config),
        record=nothing_recorded,
    )


class Killed(Exception):
    pass


class Kill(Heard):
    """Ends the run after its first block."""

    def step(self, done: int | None = None, *args: Any, **kwargs: Any) -> None:
        if done == 1:
            raise Killed


@pytest.fixture
def made(calib_text: Path, tmp_path: Path) -> Callable[..., Outcome]:
    def make(stage: Stage, model: Path, tell: Heard | None = None) -> Outcome:
        text = Text(calib=str(calib_text), samples=4, seq_len=64)
        return run(stage, Job(source=resolve(str(model)), out=tmp_path / stage.name, text=text), tell or Heard())

    return make


@torch.no_grad()
def logits(folder: Path, blocks: list[int] | None = None) -> torch.Tensor:
    ids = torch.randint(0, 4096, (1, 16), generator=torch.Generator().manual_seed(0))
    model = StreamedModel.open(folder)
    hidden = model.embed(ids)
    for index in range(model.num_blocks) if blocks is None else blocks:
        model.load_block(index)
        hidden = model.run_block(index, hidden)
        model.release_block(index)
    return model.head(hidden)


def test_the_first_block_waits_for_what_is_made_ready_meanwhile(build_model: Build, made: Any) -> None:
    happened = []

    def warm(device: torch.device) -> None:
        time.sleep(1)  # longer than the text takes
        happened.append(f"warm for the {device.type}")

    def block(loaded: LoadedBlock, plan: LayerPlan) -> BlockResult:
        happened.append(f"block {loaded.index}")
        return plain.block(loaded, plan)

    plain = shorter([0, 1])
    made(replace(plain, warm=warm, block=block), build_model())
    assert happened == ["warm for the cpu", "block 0", "block 1"]


def test_what_cannot_be_made_ready_ends_the_run(build_model: Build, made: Any, tmp_path: Path) -> None:
    def warm(device: torch.device) -> None:
        raise UnsupportedError("no compiler")

    with pytest.raises(UnsupportedError, match="no compiler"):
        made(replace(shorter([0, 1]), warm=warm), build_model())
    assert not (tmp_path / "shorten").exists()


def test_a_stage_that_leaves_blocks_out_makes_an_ordinary_model(build_model: Build, made: Any) -> None:
    model = build_model(num_hidden_layers=3)
    outcome = made(shorter([0, 2]), model)
    assert torch.equal(logits(outcome.out), logits(model, [0, 2]))
    names = Checkpoint.open(outcome.out).names()
    assert any(name.startswith("model.layers.1.") for name in names)
    assert not any(name.startswith("model.layers.2.") for name in names)
    manifest = read_manifest(outcome.out)
    assert manifest is not None and manifest.record["format"] == "dense"
    assert manifest.record["reports"] == [{"was": 0}, {"was": 2}]
    assert all(".layers.2." not in name for name in manifest.record["plan"]["layers"])
    assert outcome.verified == len(names)


def test_a_stage_writes_both_layouts_of_compressed_tensors(build_model: Build, made: Any) -> None:
    model = build_model()
    tell = Heard()
    outcome = made(int8(), model, tell)
    folder = stored(Checkpoint.open(outcome.out))
    assert {folder.scheme(layer) for layer in folder.layers if layer.endswith("down_proj")} == {W8A16}
    assert {folder.scheme(layer) for layer in folder.layers if not layer.endswith("down_proj")} == {W8A8}
    assert folder.checkpoint.config["quantization_config"]["format"] == "mixed-precision"
    assert all(folder.static(layer) is not None for layer in folder.layers if not layer.endswith("down_proj"))
    record = outcome.record
    assert LayerPlan.from_json(record["plan"]).quantized == tuple(
        name for name in LayerPlan.from_json(record["plan"]) if "layers" in name
    )
    change = float((logits(outcome.out) - logits(model)).norm() / logits(model).norm())
    assert 1e-4 < change < 0.1, change
    assert ("start", "block", 2) in tell.events and len(tell.finished) == 2


def test_a_killed_stage_takes_its_static_inputs_up_again(build_model: Build, made: Any, tmp_path: Path) -> None:
    model = build_model()
    whole = made(int8(), model).out
    expected = {name: Checkpoint.open(whole).tensor(name) for name in Checkpoint.open(whole).names()}

    whole.rename(tmp_path / "whole")
    with pytest.raises(Killed):
        made(int8(), model, Kill())
    outcome = made(int8(), model)
    assert outcome.resumed == 1
    found = Checkpoint.open(outcome.out)
    assert all(torch.equal(found.tensor(name), value) for name, value in expected.items())


# ---- files are read back while later blocks are computed ----------------------------------------------


@pytest.fixture
def hashed_last(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every artifact is of several shards. The files that are read when all blocks are there."""
    monkeypatch.setattr(assemble, "MAX_SHARD_BYTES", 100_000)
    names: list[str] = []
    hashes = assemble.file_hashes

    def noted(folder: Path, wanted: Sequence[str]) -> dict[str, str]:
        names.extend(wanted)
        return hashes(folder, wanted)

    monkeypatch.setattr(assemble, "file_hashes", noted)
    return names


def test_no_shard_is_read_when_all_blocks_are_there(
    build_model: Build, made: Any, hashed_last: list[str], tmp_path: Path
) -> None:
    """Also of those that a killed run left; hashes, counts and bytes are those of the files."""
    model = build_model()
    whole = made(int8(), model)
    assert whole.verified > 20 and not [name for name in hashed_last if name.endswith(".safetensors")]
    files = weights_of(whole.out)
    manifest = read_manifest(whole.out)
    assert len(files) > 3 and manifest is not None and manifest.files is not None
    assert {name: manifest.files[name] for name in files} == files
    whole.out.rename(tmp_path / "whole")
    with pytest.raises(Killed):
        made(int8(), model, Kill())
    again = made(int8(), model)
    assert (again.resumed, again.verified) == (1, whole.verified)
    assert weights_of(again.out) == files and not [name for name in hashed_last if name.endswith(".safetensors")]


def test_a_shard_that_changed_since_it_was_read_back_is_read_again(
    build_model: Build, made: Any, hashed_last: list[str], tmp_path: Path
) -> None:
    class Damage(Heard):
        def step(self, done: int | None = None, *args: Any, **kwargs: Any) -> None:
            if done == 2:
                (path,) = tmp_path.glob(".int8.*.partial/block-00000.safetensors")
                with open(path, "r+b") as f:
                    f.seek(-1, 2)
                    last = f.read(1)
                    f.seek(-1, 2)
                    f.write(bytes([last[0] ^ 1]))

    with pytest.raises(ArtifactError, match="differs from what was computed"):
        made(int8(), build_model(), Damage())
    assert not (tmp_path / "int8").exists()


# ---- the model is hashed while its blocks are computed -------------------------------------------------


@pytest.fixture
def large(build_model: Build, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose files all count as large, so that none is read before the blocks."""
    monkeypatch.setattr("compress.stage.SMALL_BYTES", 0)
    return build_model(num_hidden_layers=3)


@pytest.fixture
def slow_hash(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hashing the model waits for this event, or for the end of the test."""
    event = threading.Event()
    hash_files = stage._content

    def waits(*args: Any) -> str:
        if threading.current_thread() is not threading.main_thread():
            event.wait(60)
        return hash_files(*args)

    monkeypatch.setattr(stage, "_content", waits)
    yield event
    event.set()


def weights_of(folder: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in sorted(folder.glob("*.safetensors"))}


def rewrite(model: Path) -> None:
    """Other weights in the same file, of the same size and time of change."""
    path = model / "model.safetensors"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-2000:] = data[-4000:-2000]
    with open(path, "r+b") as f:
        f.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_hash_found_beside_the_blocks_is_the_models(large: Path, made: Any) -> None:
    outcome = made(shorter([0, 2]), large)
    assert outcome.record["parent"]["sha256"] == Checkpoint.open(large).content_sha256()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("changed", [True, False])
def test_killed_before_or_after_the_hash_is_known(
    known: bool, changed: bool, large: Path, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is gone on from is of the same bytes, and what cannot be shown to be is computed again, and said."""
    if not known:  # killed, so that nothing of it is written: not even when the thread ends
        monkeypatch.setattr(stage, "_settle", lambda ready, begun: "")
        monkeypatch.setattr(output.Run, "discard", lambda self: None)
    with pytest.raises(Killed):
        made(shorter([0, 2]), large, Kill())
    monkeypatch.undo()
    monkeypatch.setattr("compress.stage.SMALL_BYTES", 0)
    (scratch,) = tmp_path.glob(".shorten.*.partial")
    assert (scratch / "block-00000.json").is_file() and ("content" in read_json(scratch / "run.json")) == known
    if changed:
        rewrite(large)
    tell = Heard()
    outcome = made(shorter([0, 2]), large, tell)
    assert outcome.resumed == (known and not changed)
    said = [event[1] for event in tell.events if event[0] == "say"]
    assert any("killed before the model's hash was known" in line for line in said) == (not known)
    assert any(f"{scratch} holds an unfinished run" in note for note in outcome.notes) == (known and changed)
    assert outcome.record["parent"]["sha256"] == Checkpoint.open(large).content_sha256()
    found = weights_of(outcome.out)
    shutil.rmtree(outcome.out)
    assert weights_of(made(shorter([0, 2]), large).out) == found


def test_a_model_that_changes_is_noticed_at_the_next_block(
    large: Path, made: Any, slow_hash: threading.Event, tmp_path: Path
) -> None:
    """Also before its hash is known: then the blocks are not of the bytes that are hashed, and nothing is kept."""

    class Change(Heard):
        def step(self, done: int | None = None, *args: Any, **kwargs: Any) -> None:
            if done is not None:
                steps.append(done)
                (large / "model.safetensors").touch()
                slow_hash.set()

    steps: list[int] = []
    with pytest.raises(ArtifactError, match="was changed while it was read"):
        made(shorter([0, 1, 2]), large, Change())
    assert steps == [1]
    assert not list(tmp_path.glob("*shorten*"))


def test_a_damaged_artifact_is_refused_when_its_hash_is_known(large: Path, made: Any, tmp_path: Path) -> None:
    parent = made(shorter([0, 1, 2]), large).out.rename(tmp_path / "parent")
    rewrite(parent)
    with pytest.raises(ArtifactError, match="model.safetensors is not what was published"):
        made(shorter([0, 2]), parent)
    assert not list(tmp_path.glob("*shorten*"))
