"""The driver from artifact to published folder: what it makes, refuses, quantizes again, and leaves after a crash."""

import importlib
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import calibration_data
from compress.artifact import Manifest, parent_path, read_manifest, write_manifest
from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.files import file_sha256, read_json
from compress.formats import awq_gemm, stored
from compress.scheme import Scheme
from compress.tell import SILENT, Heard
from compress.workspace import is_judgeable, is_model, resolve
from exporters.answer import LAYOUTS
from exporters.export import FORMATS, ExportOutcome, ExportRequest, export, load_format
from exporters.reader import Layout
from exporters.sizing.predict import MOST_SEQUENCES, DoesNotFit
from exporters.sizing.targets import TARGETS

G32 = Scheme(group_size=32)
# A format whose reader has no zero points, like TensorRT's. It writes what `hf` writes, so what it writes is checked.
SYMMETRIC_READER = """
import os, signal
from compress.errors import ArtifactError
from exporters.hf import write as hf
from exporters.reader import Layout, Written

LAYOUT = Layout(num_bits=(4,), group_sizes=(128, 32), symmetric=True)

def write(job):
    job.say(f"artifact {job.artifact.name}")
    (job.staged / "half").write_text("half of a file")
    if job.options.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if job.options.get("silent"):
        return Written(record={}, parts={"half": 14})
    if job.options.get("fail"):
        raise ArtifactError("what was written does not compute what the artifact says")
    (job.staged / "half").unlink()
    return hf.write(job)
"""


@pytest.fixture
def symmetric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """FORMATS with an `edge` of our own, in a module of its own."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "symmetric_reader.py").write_text(SYMMETRIC_READER)
    monkeypatch.syspath_prepend(str(folder))
    return {**FORMATS, "edge": "symmetric_reader"}


@pytest.fixture
def artifact(in_workspace: Path) -> Path:
    """A small asymmetric AWQ artifact in a workspace."""
    return in_workspace / "artifacts" / "small"


def run(artifact: Path, out: str, target: str = "a100", **changes: Any) -> ExportOutcome:
    formats, tell = changes.pop("formats", FORMATS), changes.pop("tell", SILENT)
    request = ExportRequest(source=resolve(str(artifact)), target=TARGETS[target], out=artifact.parent / out, **changes)
    return export(request, formats=formats, tell=tell)


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def rewritten(path: Path, old: str, new: str) -> None:
    """A manifest with other words, signed as our own code signs it."""
    value = json.loads(path.read_text().replace(old, new))
    write_manifest(path.parent, Manifest(lineage=value["lineage"], reports=[]))


def test_hf_export_is_the_artifact_with_a_manifest(artifact: Path) -> None:
    outcome = run(artifact, "small-a100-hf", context=128, batch=4)
    made = contents(outcome.out)
    original = contents(artifact)
    assert "# small, hf for a100" in (outcome.out / "README.md").read_text() and outcome.verb == "serve it"
    assert shlex.split(outcome.command)[:3] == ["vllm", "serve", str(outcome.out)]
    assert "--max-num-seqs=4" in outcome.command
    assert any("max-num-seqs=4, as --batch says" in note for note in outcome.notes)
    for name in set(original) - {"compress.json"}:
        assert made[name] == original[name]
    manifest = read_manifest(outcome.out)
    assert manifest is not None
    record = manifest.record
    assert (record["stage"], record["format"], record["target"]) == ("export", "hf", "a100")
    assert record["options"] == {"context": 128, "batch": 4}
    assert record["files"] == {k: v for k, v in made.items() if k != "compress.json"}
    assert record["parent"] == {"path": "../small", "sha256": Checkpoint.open(artifact).content_sha256()}
    assert [r["stage"] for r in manifest.lineage] == ["export", "awq"]
    assert record["requantized_from"] is None
    assert not list(artifact.parent.glob(".*"))
    # size honesty: the parts are the files' bytes, and the ratio is to what the parameters would take
    size = sum((outcome.out / n).stat().st_size for n in made if "/" not in n and n != "compress.json")
    assert abs(outcome.total_bytes - size) < 20_000, "all but safetensors headers"
    parameters = sum(p.numel() for p in _dense(artifact))
    assert outcome.fp16_bytes == 2 * parameters and outcome.fp32_bytes == 4 * parameters
    assert record["ratio_to_fp16"] == pytest.approx(2 * parameters / outcome.total_bytes, abs=1e-4)


def test_sequences_come_from_the_sizing(artifact: Path) -> None:
    """As many as fit, and one more would not; never a silent 1."""
    outcome = run(artifact, "unasked", context=128)
    assert outcome.record["options"]["batch"] == MOST_SEQUENCES == outcome.sizing.plan.batch
    (config,) = (outcome.out / "serve" / "triton").rglob("model.json")
    assert json.loads(config.read_text())["max_num_seqs"] == MOST_SEQUENCES
    (note,) = [n for n in outcome.notes if "max-num-seqs" in n]
    assert f"max-num-seqs={MOST_SEQUENCES}: the most that is asked for unasked" in note and "--batch N" in note


def _dense(artifact: Path) -> list[torch.Tensor]:
    from compress.model import StreamedModel

    return [p for _, p in StreamedModel.open(artifact).model.named_parameters()]


def test_same_bytes_twice_and_an_unquantized_folder(artifact: Path, build_model: Any) -> None:
    first = contents(run(artifact, "one").out)
    assert contents(run(artifact, "two").out) == first
    assert contents(run(artifact, "one", force=True).out) == first
    folder = build_model("Qwen3", name="artifacts/plain")
    outcome = run(folder, "plain-hf")
    assert contents(outcome.out)["model.safetensors"] == contents(folder)["model.safetensors"]
    assert "quantization_config" not in read_json(outcome.out / "config.json")
    manifest = read_manifest(outcome.out)
    assert manifest is not None and manifest.root["path"] == "../plain"


def codes_of(folder: Path) -> Scheme | None:
    return stored(Checkpoint.open(folder)).exact_plan().only().weight


def test_symmetric_reader_gets_the_recipe_run_again(artifact: Path, symmetric: dict[str, str]) -> None:
    tell = Heard()
    outcome = run(artifact, "small-orin", "orin", formats=symmetric, tell=tell)
    again = artifact.parent / "for-export" / "small-sym"
    assert outcome.requantized == again and len(tell.finished) == 2
    assert any("needs w4g32-sym codes" in line and "its recipe runs again" in line for line in tell.said)
    assert codes_of(artifact) == G32
    assert codes_of(outcome.out) == Scheme(group_size=32, symmetric=True)
    first, second = read_manifest(artifact), read_manifest(again)
    assert first is not None and second is not None
    same = ("samples", "seq_len", "seed", "skip", "smooth", "effort")
    assert all(first.record["options"][k] == second.record["options"][k] for k in same)
    assert first.record["calibration"]["sha256"] == second.record["calibration"]["sha256"]
    assert first.record["parent"]["sha256"] == second.record["parent"]["sha256"]
    assert parent_path(first.record["parent"], artifact) == parent_path(second.record["parent"], again)
    manifest = read_manifest(outcome.out)
    assert manifest is not None
    assert (
        manifest.record["requantized_from"] == "../small"
        and manifest.record["parent"]["path"] == "../for-export/small-sym"
    )
    assert [r["stage"] for r in manifest.lineage] == ["export", "awq"]
    # the layer that the user left in float16 stays so
    assert "model.layers.0.mlp.down_proj.weight" in Checkpoint.open(outcome.out)
    # once made it is used again, and the same codes come from a direct run
    tell = Heard()
    assert run(artifact, "second", "orin", formats=symmetric, tell=tell).requantized == again
    assert not tell.finished and any("used as it is" in line for line in tell.said)
    direct = contents(again)
    shutil.rmtree(again)
    run(artifact, "third", "orin", formats=symmetric)
    assert contents(again) == direct
    # a symmetric artifact is taken as it is
    assert run(again, "fourth", "orin", formats=symmetric).requantized is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="A CUDA DEVICE: the recipe can run where it was recorded")
def test_a_recipe_recorded_on_a_gpu_runs_without_one(artifact: Path, symmetric: dict[str, str]) -> None:
    expected = contents(run(artifact, "here", "orin", formats=symmetric).out)
    again = artifact.parent / "for-export" / "small-sym"
    made_here = contents(again)
    path = artifact / "compress.json"
    rewritten(path, '"device": "cpu"', '"device": "cuda"')
    tell = Heard()
    run(artifact, "reused", "orin", formats=symmetric, tell=tell)
    assert any("used as it is" in line for line in tell.said), "sums in another order make no other recipe"
    shutil.rmtree(again)
    found = contents(run(artifact, "there", "orin", formats=symmetric, tell=tell).out)
    assert any("was run on cuda, which is not there; it runs on cpu" in line for line in tell.said)
    assert contents(again) == made_here and found["model.safetensors"] == expected["model.safetensors"]


def test_a_killed_requantization_goes_on(artifact: Path, symmetric: dict[str, str]) -> None:
    class Killed(Exception):
        pass

    class Stop(Heard):
        def step(self, done: int | None = None, *args: Any, **kwargs: Any) -> None:
            if done is not None:
                raise Killed

    with pytest.raises(Killed):
        run(artifact, "out", "orin", formats=symmetric, tell=Stop())
    assert not (artifact.parent / "out").exists() and not (artifact.parent / "for-export" / "small-sym").exists()
    tell = Heard()
    run(artifact, "out", "orin", formats=symmetric, tell=tell)
    assert [step["resumed"] for step in tell.finished] == [True, False]


def test_requantization_is_refused_with_the_command_that_helps(
    artifact: Path, symmetric: dict[str, str], calib_text: Path, tmp_path: Path
) -> None:
    def refused(kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            run(artifact, "out", "orin", formats=symmetric)
        assert not (artifact.parent / "out").exists() and not (artifact.parent / "for-export" / "small-sym").exists()

    text = calib_text.read_text()
    calib_text.write_text(text[200:])
    refused(ArtifactError, r"is not the text that .*small was calibrated on; .*--bits 4 --group-size 32 --sym")
    calib_text.write_text(text)
    calib_text.rename(tmp_path / "elsewhere.txt")
    refused(ArtifactError, r"was calibrated on .*calib.txt, which is not there any more; put it back")
    (tmp_path / "elsewhere.txt").rename(calib_text)
    model = tmp_path / "model"
    config = (model / "config.json").read_bytes()
    (model / "config.json").write_bytes(config.replace(b'"bos_token_id": 0', b'"bos_token_id": 1'))
    refused(ArtifactError, r"has changed since .* was made from it; .*compress awq .* --bits 4 --group-size 32 --sym")
    (model / "config.json").write_bytes(config)
    model.rename(tmp_path / "moved")
    refused(ArtifactError, "its parent ../../model is gone; fetch that model and run `compress awq MODEL --bits 4")
    (tmp_path / "moved").rename(model)
    rewritten(artifact / "compress.json", '"effort"', '"unheard_of"')
    refused(ArtifactError, "records option unheard_of, which this version cannot run again")
    (artifact / "compress.json").unlink()
    refused(ArtifactError, "has no compress.json that says how to make them; quantize its original")


def test_an_artifact_of_another_recipe_in_the_way(artifact: Path, symmetric: dict[str, str]) -> None:
    shutil.copytree(artifact, artifact.parent / "for-export" / "small-sym")
    with pytest.raises(ConfigError, match="small-sym exists and was made by another recipe"):
        run(artifact, "out", "orin", formats=symmetric)
    # the same options, but other text
    shutil.rmtree(artifact.parent / "for-export" / "small-sym")
    run(artifact, "out", "orin", formats=symmetric)
    path = artifact.parent / "for-export" / "small-sym" / "compress.json"
    manifest = read_manifest(artifact)
    assert manifest is not None
    rewritten(path, manifest.record["calibration"]["sha256"], "0" * 64)
    with pytest.raises(ConfigError, match="small-sym exists and was made by another recipe"):
        run(artifact, "again", "orin", formats=symmetric)


def test_a_failed_write_leaves_nothing(artifact: Path, symmetric: dict[str, str]) -> None:
    made = run(artifact, "out", "orin", formats=symmetric).out
    before = contents(made)
    with pytest.raises(ArtifactError, match="does not compute what the artifact says"):
        run(artifact, "out", "orin", formats=symmetric, force=True, options={"fail": True})
    assert contents(made) == before and not list(artifact.parent.glob(".*"))
    with pytest.raises(ArtifactError):
        run(artifact, "new", "orin", formats=symmetric, options={"fail": True})
    with pytest.raises(ArtifactError, match="does not say what it verified"):
        run(artifact, "new", "orin", formats=symmetric, options={"silent": True})
    assert not (artifact.parent / "new").exists()


KILLED = """
from pathlib import Path
from compress.workspace import resolve
from exporters.export import ExportRequest, FORMATS, export
from exporters.sizing.targets import TARGETS
import transformers, compress.quantize.awq_stage
transformers.AutoTokenizer, transformers.LlamaForCausalLM
artifact, out, modules = sys.argv[1:]
sys.path.insert(0, modules)
def work():
    request = ExportRequest(
        source=resolve(artifact), target=TARGETS["orin"], out=Path(out), options={"die": True}
    )
    export(request, formats={**FORMATS, "edge": "symmetric_reader"})
"""


def test_a_kill_in_the_middle_leaves_no_out(
    artifact: Path, symmetric: dict[str, str], forks: Any, tmp_path: Path
) -> None:
    out = artifact.parent / "out"
    runs = forks(KILLED, artifact, out, tmp_path / "modules")
    runs.start()
    assert runs.code() == -9
    (scratch,) = artifact.parent.glob(".out.*.partial")
    assert not out.exists() and (scratch / "final" / "half").exists()
    assert not is_model(scratch)
    made = run(artifact, "out", "orin", formats=symmetric)
    assert any(str(scratch) in note for note in made.notes), "an export with other options is not this one's to remove"
    assert not (made.out / "half").exists()
    shutil.rmtree(made.out)
    runs.start()
    assert runs.code() == -9 and [*artifact.parent.glob(".out.*.partial")] == [scratch], "the command finds it again"


# ---- refusals ----------------------------------------------------------------------------------------


def test_refusals_come_before_any_work(artifact: Path) -> None:
    with pytest.raises(UnsupportedError, match="the readers of lambda take onnx; choose"):
        run(artifact, "out", "lambda", format="hf")
    with pytest.raises(ConfigError, match="there is no such format; known are hf, onnx"):
        run(artifact, "out", format="gguf")
    with pytest.raises(ConfigError, match="--context 4096: small was made for at most 256 tokens"):
        run(artifact, "out", context=4096)
    with pytest.raises(DoesNotFit, match="this would fit: --batch"):
        run(artifact, "out", batch=10**8)
    made = run(artifact, "out").out
    with pytest.raises(ConfigError, match="out exists already; pass --force"):
        run(artifact, "out")
    with pytest.raises(ConfigError, match=r"is an export already; pass the artifact .* made from, .*/artifacts/small$"):
        run(made, "again")
    assert sorted(p.name for p in artifact.parent.iterdir()) == ["out", "small"]


def test_a_missing_format_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wants_more.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r'needs a_package_that_nobody_has, .*pip install "compress-toolkit\[onnx\]"'):
        load_format("onnx", {"onnx": "wants_more"})
    with pytest.raises(UnsupportedError, match="this installation does not include it"):
        load_format("onnx", {"onnx": "exporters.not_there"})


def test_each_format_is_a_module_with_what_the_driver_asks_for() -> None:
    """They are imported by name, so no type checker looks."""
    pytest.importorskip("onnxscript")
    assert FORMATS.keys() == LAYOUTS.keys()
    for name, path in FORMATS.items():
        module = importlib.import_module(path)
        assert isinstance(module.LAYOUT, Layout) and callable(module.write), name


@pytest.mark.parametrize(
    ("layout", "scheme", "wanted"),
    [
        (Layout(symmetric=True), Scheme(), Scheme(symmetric=True)),
        (Layout(symmetric=True), Scheme(symmetric=True), None),
        (Layout(), Scheme(group_size=16), None),
        (Layout(group_sizes=(128, 32)), Scheme(group_size=32), None),
        (Layout(group_sizes=(128, 32)), Scheme(group_size=64, symmetric=True), Scheme(symmetric=True)),
        (Layout(), Scheme(num_bits=8), Scheme(num_bits=4)),
    ],
)
def test_the_smallest_change_that_fits(layout: Layout, scheme: Scheme, wanted: Scheme | None) -> None:
    assert layout.wants(scheme) == wanted


def test_the_exact_plan_reads_the_zero_points(artifact: Path) -> None:
    """AutoAWQ's config says zero_point either way, so one wrong zero point must show."""
    from safetensors.torch import load_file, save_file

    path = artifact / "model.safetensors"
    tensors = load_file(path)
    eights = awq_gemm.pack_columns(torch.full((1, 8), 8))
    names = [n for n in tensors if n.endswith(".qzeros")]
    for name in names:
        tensors[name] = eights.expand_as(tensors[name]).contiguous()
    save_file(tensors, path)
    assert codes_of(artifact) == Scheme(group_size=32, symmetric=True)
    tensors[names[-1]][-1, -1] += 1
    save_file(tensors, path)
    assert codes_of(artifact) == G32


def test_stages_pick_sensibly(artifact: Path) -> None:
    workspace = artifact.parent
    made = run(artifact, "small-a100-hf").out
    os.utime(made / "compress.json", ns=(2**62, 2**62))
    assert resolve(None, accept=is_model, workspace=workspace).path == artifact, "export and awq go on from artifacts"
    assert resolve(None, accept=is_judgeable, workspace=workspace).path == made, "evaluate judges exports too"
    graph = workspace / "graph"
    graph.mkdir()
    shutil.copy(made / "compress.json", graph)
    os.utime(graph / "compress.json", ns=(2**62 + 1, 2**62 + 1))
    assert resolve(None, accept=is_judgeable, workspace=workspace).path == made
    (graph / "model.onnx").touch()
    assert resolve(None, accept=is_judgeable, workspace=workspace).path == graph


def test_an_hf_export_hashes_the_weights_once_and_opens_them_little(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once when the artifact is checked; the copy is a link to it. `tests/bench/export_bytes.py` has the bytes."""
    hashed: list[str] = []
    opened: list[Path] = []
    plain_open = Checkpoint.open.__func__  # type: ignore[attr-defined]

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return file_sha256(path)

    def open_counted(cls: type[Checkpoint], path: Path) -> Checkpoint:
        opened.extend([path] if path != calibration_data.reference_model() else [])  # whose lineage it is
        return plain_open(cls, path)  # type: ignore[no-any-return]

    for module in ("compress.artifact", "exporters.hf.write"):
        monkeypatch.setattr(f"{module}.file_sha256", counting)
    monkeypatch.setattr(Checkpoint, "open", classmethod(open_counted))
    outcome = run(artifact, "counted")
    assert hashed.count("model.safetensors") == 1
    assert len(opened) <= 4, opened
    monkeypatch.undo()
    manifest = read_manifest(outcome.out)
    assert manifest is not None and manifest.files is not None
    assert manifest.files["model.safetensors"] == file_sha256(artifact / "model.safetensors")
    assert set(manifest.files) == {name for name in contents(outcome.out) if name != "compress.json"}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_what_the_driver_asks_for(name: str) -> None:
    """`onnx-trt` once had no LAYOUT, and every export of it was an AttributeError."""
    if name in ("onnx", "onnx-trt"):
        pytest.importorskip("onnxruntime")
    module = load_format(name)
    assert module.LAYOUT is LAYOUTS[name] and callable(module.write)
