"""One evaluation from end to end: verdicts that are known, guards, cache, an ONNX candidate, reports and the page."""

import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.quantize.int8_stage import Int8Request, quantize_int8
from compress.runtime.ort import OnnxRunner
from compress.scheme import Scheme
from compress.tell import Heard
from compress.workspace import resolve
from evaluators import cache, evaluate, memory
from evaluators.report import to_json, to_junit, to_markdown, to_text
from evaluators.request import EvaluationRequest
from evaluators.results import Report
from evaluators.subject import hold_cache
from evaluators.written import write_reports


def steps(heard: Heard, what: str) -> list[str]:
    """What was told to be going on inside a stage."""
    return [event[2] for event in heard.events if event[0] == "step" and event[2].startswith(what)]


@pytest.fixture
def pair(in_workspace: Path) -> tuple[Path, Path]:
    """A tiny model and its quantized artifact."""
    return in_workspace / "model", in_workspace / "artifacts" / "small"


@pytest.fixture(scope="module")
def other_text(small_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The words of the calibration text in another order, so that no passage of it is among them."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    words = (small_workspace / "calib.txt").read_text(encoding="utf-8").split()
    random.Random(0).shuffle(words)
    path.write_text("\n".join(" ".join(words[i : i + 14]) for i in range(0, len(words), 14)), encoding="utf-8")
    return path


def ask(candidate: Path, reference: Path, data: Path, **options: Any) -> EvaluationRequest:
    chosen = {"threshold": 0.98, "context": 64, "max_tokens": 1024, **options}
    return EvaluationRequest(candidate=candidate, reference=reference, data=str(data), **chosen)


@pytest.fixture(scope="module")
def report(small_workspace: Path, other_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    rows = [{"query": f"Question: {i}", "choices": ["yes", "no <b>"], "gold": i % 2} for i in range(12)]
    task = tmp_path_factory.mktemp("tasks") / "task.jsonl"
    task.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    candidate, reference = small_workspace / "artifacts" / "small", small_workspace / "model"
    return evaluate.evaluate(ask(candidate, reference, other_text, tasks=(f"odd<&|name={task}",), limit=10))


def test_itself_passes_with_exactly_one(pair: tuple[Path, Path], other_text: Path) -> None:
    found = evaluate.evaluate(ask(pair[0], pair[0], other_text))
    (verdict,) = found.verdicts
    assert (found.outcome, verdict.recovery.value, verdict.recovery.lower) == ("PASS", 1.0, 1.0)
    assert found.kl_histogram is None and all(b.mse == 0 for b in found.blocks)


def test_round_to_nearest_of_the_reference_model_fails(reference_model: Path, tmp_path: Path) -> None:
    """Known from the whole text: 94.3 %, far below 98 %."""
    import calibration_data
    from compress import numerics
    from compress.linear import linears
    from compress.model import StreamedModel

    folder = tmp_path / "rtn"
    shutil.copytree(reference_model, folder)
    from safetensors.torch import load_file, save_file

    tensors = {k: v.float() for k, v in load_file(reference_model / "model.safetensors").items()}
    for index, block in enumerate((model := StreamedModel.open(reference_model)).blocks):
        for name in linears(block):
            key = f"{model.block_prefix(index)}{name}.weight"
            tensors[key] = numerics.round_to_nearest(tensors[key], Scheme())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data = calibration_data.default_evaluation()
    found = evaluate.evaluate(ask(folder, reference_model, data, context=256, max_tokens=256 * 24, min_context=1))
    assert found.outcome == "FAIL" and found.verdicts[0].recovery.upper < 0.98
    assert found.blocks[0].snr_db is not None and found.blocks[-1].snr_db is not None
    assert found.blocks[0].snr_db > found.blocks[-1].snr_db


def test_calibration_text_is_refused(pair: tuple[Path, Path], calib_text: Path) -> None:
    with pytest.raises(ConfigError, match="is the text that .* was calibrated on"):
        evaluate.evaluate(ask(pair[1], pair[0], calib_text))


def test_a_limit_without_a_task_is_refused(tmp_path: Path) -> None:
    """It would be left aside in silence: it counts no windows of text."""
    with pytest.raises(ConfigError, match="--limit 2 counts items of tasks, and neither .* --max-tokens"):
        ask(tmp_path, tmp_path, tmp_path, limit=2)


def test_other_tokenizer_and_other_vocabulary_are_refused(build_model: Any, other_text: Path) -> None:
    a, b = build_model(name="a"), build_model(name="b", vocab_size=4100)
    with pytest.raises(ConfigError, match="vocabulary of 4100 and .* one of 4096"):
        evaluate.evaluate(ask(b, a, other_text))
    c = build_model(name="c")
    tokenizer = json.loads((c / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (c / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ConfigError, match="different tokenizers"):
        evaluate.evaluate(ask(c, a, other_text))


def test_second_candidate_reads_the_reference_from_the_cache(
    pair: tuple[Path, Path], other_text: Path, tmp_path: Path
) -> None:
    request = ask(pair[1], pair[0], other_text, cache_folder=tmp_path / "cache")
    plain = evaluate.evaluate(replace(request, cache_folder=None))
    first, second, third = Heard(), Heard(), Heard()
    assert to_json(evaluate.evaluate(request, first)) == to_json(plain)
    assert to_json(evaluate.evaluate(request, second)) == to_json(plain)
    assert steps(first, "reference") == ["reference, block 1 of 2", "reference, block 2 of 2"]
    assert steps(second, "reference") == ["reference, read back"], "nothing is computed"
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])  # damaged: computed anew, the same again
    assert to_json(evaluate.evaluate(request, third)) == to_json(plain) and len(steps(third, "reference")) == 2


def test_cache_key_knows_what_matters(pair: tuple[Path, Path], other_text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    evaluate.evaluate(ask(pair[1], pair[0], other_text, cache_folder=folder))
    evaluate.evaluate(ask(pair[1], pair[0], other_text, cache_folder=folder, max_tokens=960))
    evaluate.evaluate(ask(pair[1], pair[0], other_text, cache_folder=folder, min_context=9))
    assert len(list(folder.iterdir())) == 3
    assert cache.default_folder().parts[-2:] == ("compress-toolkit", "evaluate")


def test_onnx_candidate(pair: tuple[Path, Path], other_text: Path, tmp_path: Path) -> None:
    """The same weights through ONNX Runtime: next to nothing differs, and what cannot be shown is said."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
            return logits

    folder = tmp_path / "onnx"
    folder.mkdir()
    ids = torch.zeros(1, 8, dtype=torch.int64)
    torch.onnx.export(
        Logits(), (ids,), folder / "model.onnx", dynamo=True, input_names=["input_ids"], output_names=["logits"],
        dynamic_shapes={"input_ids": {1: torch.export.Dim("length", min=2, max=256)}}, verbose=False,
    )  # fmt: skip
    found = evaluate.evaluate(ask(folder, pair[0], other_text, context=32))
    value = {m.name: m.value for m in found.metrics}
    assert found.candidate.runtime == "onnxruntime" and found.outcome == "PASS"
    assert abs(value["kl_mean"]) < 1e-6 and value["top1_agreement"] == pytest.approx(1.0)
    assert found.blocks == [] and any("error by depth is not available" in n for n in found.notes)


def test_engines_and_empty_folders_are_refused(pair: tuple[Path, Path], other_text: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ArtifactError, match="one .onnx graph is needed, found none"):
        evaluate.evaluate(ask(empty, pair[0], other_text))


def test_evaluations_lie_beside_the_artifact_one_a_text(pair: tuple[Path, Path], report: Report) -> None:
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in pair[1].iterdir()}
    assert memory.remember(pair[1], report) is None and memory.remember(pair[1], report) is None
    (kept,) = memory.recalled(pair[1])
    assert kept["outcome"] == report.outcome and len(list(memory.reports_folder(pair[1]).iterdir())) == 1
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in pair[1].iterdir()} == before
    memory.remember(pair[0], report)
    assert not memory.reports_folder(pair[0]).exists(), "a folder that no stage made is no artifact"
    near, notes = memory.others(replace(report, candidate=replace(report.candidate, path="elsewhere")), pair[1].parent)
    assert [o["path"] for o in near] == ["small"] and not notes


def test_json_has_no_nan_and_every_field(report: Report) -> None:
    value = json.loads(to_json(report), parse_constant=lambda c: pytest.fail(c))
    assert value["schema"] == 1 and value["gate"]["rule"] == "bounds"
    assert set(value) == {"schema", *Report.__dataclass_fields__}
    assert [v["metric"] for v in value["verdicts"]] == ["perplexity", "odd<&|name"]


def test_junit_shows_each_gated_metric(report: Report) -> None:
    suite = ElementTree.fromstring(to_junit(report)).find("testsuite")
    assert suite is not None
    cases = {c.get("name"): c for c in suite}
    assert list(cases) == ["perplexity", "odd<&|name"]
    for verdict in report.verdicts:
        tags = [child.tag for child in cases[verdict.metric]]
        assert ("failure" in tags) == (verdict.outcome == "FAIL")
        assert ("error" in tags) == (verdict.outcome == "INCONCLUSIVE")
    assert suite.get("tests") == "2"


def test_markdown_rows_hold_together(report: Report) -> None:
    text = to_markdown(report)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} <= {6, 7}
    assert "odd&lt;&\\|name" in text and "<&" not in text
    assert report.verdicts[0].outcome in to_text(report)


class Strict(HTMLParser):
    VOID = {"meta", "br", "hr", "img", "link", "input", "use", "path", "stop", "line", "rect", "circle"}

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag


def test_page_is_whole_and_alone(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files, note = write_reports(report, tmp_path / "report")
    assert [f.name for f in files] == ["report.json", "junit.xml", "summary.md", "index.html"] and note is None
    page = files[-1].read_text(encoding="utf-8")
    parser = Strict()
    parser.feed(page)
    assert parser.stack == [] and len(parser.ids) == len(set(parser.ids))
    assert all(link.startswith("#") for link in parser.links), "the page asks for something outside itself"
    assert page.count("<svg") == 6 and "Not available" not in page
    assert "Quality kept" in page and "of the original" in page and "not measured here" in page
    for name in ("KL divergence, 99.9 %", "negative log-likelihood", "perplexity, share kept"):
        assert f"<td>{name}</td>" in page, name
    assert "<td>kl_" not in page and "<td>nats/token" not in page, "names and units are for people"
    assert "<script" not in page and "odd&lt;&amp;|name" in page
    again, _ = write_reports(report, tmp_path / "again")
    assert again[-1].read_bytes() == files[-1].read_bytes()


def test_page_in_chromium(report: Report, tmp_path: Path) -> None:
    """Nothing sticks out on a narrow screen, and nothing is fetched."""
    pytest.importorskip("matplotlib")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("CHROMIUM ABSENT: install it to check the page as a browser shows it")
    files, _ = write_reports(report, tmp_path / "report")
    probe = "<script>document.title=[innerWidth,document.documentElement.scrollWidth].join()</script></body>"
    page = tmp_path / "probe.html"
    page.write_text(files[-1].read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    out = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=520,900", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found = re.search(r"<title>(\d+),(\d+)</title>", out.stdout)
    assert found is not None and int(found[2]) <= int(found[1])


def test_a_model_is_judged_with_an_int8_cache(pair: tuple[Path, Path], other_text: Path, tmp_path: Path) -> None:
    """The original against itself: only the cache differs, so all that is lost is the cache's, and little of it."""
    original, quantized = pair
    plain = evaluate.evaluate(ask(original, original, other_text))
    found = evaluate.evaluate(ask(original, original, other_text, kv_cache="int8"))
    values = {m.name: m.value for m in found.metrics}
    assert 0 < values["kl_mean"] < 1e-2 and {m.name: m.value for m in plain.metrics}["kl_mean"] == 0
    assert (plain.candidate.kv_cache, found.candidate.kv_cache) == (None, "int8_per_token_head")
    assert found.reference.kv_cache is None and any("of the candidate were rounded to INT8" in n for n in found.notes)
    request = Int8Request(
        source=resolve(str(original)), out=tmp_path / "int8", calib=str(other_text), samples=2, seq_len=64,
        effort="fast", scheme="w8a16", kv_cache="int8",
    )  # fmt: skip
    made = quantize_int8(request).out
    text = tmp_path / "third.txt"
    text.write_text(" ".join(sorted(other_text.read_text().split())))
    by_itself, without, asked = (
        evaluate.evaluate(ask(made, original, text, kv_cache=kv)) for kv in (None, "none", "int8")
    )
    assert by_itself.metrics == asked.metrics and by_itself.candidate == asked.candidate
    assert without.candidate.kv_cache is None and without.metrics != asked.metrics
    for report in (by_itself, without, asked):
        assert memory.remember(made, report) is None
    assert [r.get("kv_cache") for r in memory.recalled(made)].count("int8_per_token_head") == 1
    assert len(memory.recalled(made)) == 2


def test_a_graph_has_a_cache_of_its_own(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    with pytest.raises(UnsupportedError, match="--kv-cache int8: .* is a graph with a cache of its own"):
        hold_cache(OnnxRunner.__new__(OnnxRunner), folder, "int8")
    assert hold_cache(OnnxRunner.__new__(OnnxRunner), folder, None) is None
