"""A model card says what manifests and evaluations say, and where nothing was measured it says so."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from compress.artifact import Manifest, write_manifest
from compress.errors import ArtifactError
from evaluators import memory
from evaluators.model_card import card
from evaluators.results import Metric, Recovery, Report, Subject, Verdict


@pytest.fixture
def artifact(tmp_path: Path, reference_model: Path) -> Path:
    folder = tmp_path / "private" / "mine"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        os.link(reference_model / name, folder / name)
    hub = "/home/somebody/.cache/huggingface/hub/models--org--name/snapshots/0a"
    records = [
        {"stage": "distill", "options": {"data": ["/home/somebody/notes.txt"], "tokens": 7, "resume": True}},
        {"stage": "prune", "options": {"depth": "1"}, "calibration": {
            "source": "file:/home/somebody/calib.txt", "sha256": "", "num_samples": 4, "seq_len": 64}},
    ]  # fmt: skip
    lineage = [{**r, "parent": {"path": path, "sha256": ""}} for r, path in zip(records, ("../p", hub), strict=True)]
    write_manifest(folder, Manifest(lineage=lineage, reports=[]))
    return folder


def judged(artifact: Path) -> Report:
    one = Subject(
        path=str(artifact), sha256="", format="plain", runtime="torch", weight_bytes=1, num_parameters=1,
        bits_per_weight=16.0,
    )  # fmt: skip
    values = {"perplexity": 12.5, "kl_mean": 0.0123, "kl_99.9": 0.456, "top1_agreement": 0.91, "lambada_acc": 0.5}
    verdict = Verdict(
        metric="perplexity", outcome="PASS", recovery=Recovery(value=0.99, lower=0.985, upper=0.995), threshold=0.98,
        confidence=0.95, n=9, counted="tokens", needed=None, reason="",
    )  # fmt: skip
    metrics = [Metric(name=k, unit="", better="lower", value=v, n=9, counted="tokens") for k, v in values.items()]
    return Report(
        candidate=one, reference=replace(one, path="original"), text={"num_tokens": 9, "num_windows": 3, "context": 4},
        metrics=[*metrics, Metric(name="perplexity_recovery", unit="", better="higher", value=0.99, n=9, counted="x")],
        verdicts=[verdict], gate={"threshold": 0.98}, outcome="PASS", blocks=[], internals=[], kl_histogram=None,
        notes=[], versions={},
    )  # fmt: skip


def test_what_was_measured_and_how_it_was_made(artifact: Path) -> None:
    assert "Not measured yet: `compress evaluate` does." in card(artifact)
    assert memory.remember(artifact, judged(artifact)) is None
    text = card(artifact)
    assert text.startswith("---\nbase_model: org/name\ntags: [compress, distill]\n")
    for line in (
        "| recovery of perplexity | 99.00% (98.50% to 99.50%) |", "| KL divergence, mean | 0.0123 nats a token |",
        "| KL divergence, 99.9 % | 0.456 nats a token |", "| same top token | 91.00% |",
        "| accuracy, lambada | 50.00% |", "| gate | PASS at 98.0% |",
        "1. `prune`: depth 1; calibrated on 4 x 64 tokens of calib.txt", "2. `distill`: data notes.txt, tokens 7",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert "somebody" not in text and "private" not in text, "no folder of the machine is told"
    with safe_open(artifact / "model.safetensors", "pt") as f:  # type: ignore[no-untyped-call]
        numbers = sum(f.get_tensor(name).numel() for name in f.keys())
    assert f"| parameters | {numbers / 1e6:.2f} M |" in text and "| bits a weight | 16.00" in text
    assert not re.search(r"\bNone\b", text)


def test_what_has_no_manifest_has_no_card(reference_model: Path) -> None:
    with pytest.raises(ArtifactError, match="has no compress.json"):
        card(reference_model)
