"""A model card in Markdown: what an artifact is, how large, how close to its original, how it was made, how to run it.

Only what manifests and kept evaluations say; what was not measured is said to be so. Folders of the machine that made
it are named by their last part alone: a card is for others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from compress.artifact import BUNDLED, Manifest, parent_path, read_manifest
from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError
from compress.formats import stored
from compress.workspace import holds_weights, is_judgeable
from evaluators.memory import recalled

# Options that say how a run was done, and not what was made.
_HOW = ("device", "dtype", "resume", "force")
_TAGS = {"awq-gemm": "awq", "compressed-tensors": "compressed-tensors"}


def card(folder: Path) -> str:
    """The card of the artifact in a folder. ArtifactError where no manifest says what it is."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError(f"{folder} has no compress.json, so nothing is known of how it was made; name an artifact")
    name = folder.resolve().name
    origin = _original(manifest)
    parts = [
        _front(folder, manifest, origin),
        f"# {name}\n\n{_sentence(manifest, origin)}\n",
        _table(("", ""), _sizes(folder, manifest)),
        f"## Against the original\n\n{_judged(folder, manifest)}",
        f"## How it was made\n\n{_recipe(manifest)}",
        f"## Run it\n\n{_usage(name, manifest)}",
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _front(folder: Path, manifest: Manifest, origin: str) -> str:
    """The metadata that model hubs read."""
    record = manifest.record
    made = stored(Checkpoint.open(folder)).format if holds_weights(folder) else None
    tags = ["compress", record["stage"], *([_TAGS.get(made.NAME, made.NAME)] if made is not None else [])]
    library = "onnxruntime" if str(record.get("format", "")).startswith("onnx") else "transformers"
    lines = [f"tags: [{', '.join(dict.fromkeys(tags))}]", f"library_name: {library}", "pipeline_tag: text-generation"]
    if "/" in origin:
        lines.insert(0, f"base_model: {origin}")
    return "\n".join(["---", *lines, "---"])


def _original(manifest: Manifest) -> str:
    """`org/name` for a model of the hub's cache, else the folder's own name."""
    path = str(manifest.root["path"])
    if path == BUNDLED:
        return "the reference model of compress"
    hub = next((p for p in PurePath(path).parts if p.startswith("models--")), None)
    return "/".join(hub.split("--")[1:]) if hub else PurePath(path).name


def _sentence(manifest: Manifest, origin: str) -> str:
    stages = [str(record["stage"]) for record in reversed(manifest.lineage)]
    return f"Made from {origin} with `compress` ({' → '.join(stages)})."


def _sizes(folder: Path, manifest: Manifest) -> list[tuple[str, str]]:
    rows = []
    if holds_weights(folder):
        opened = stored(Checkpoint.open(folder))
        taken = opened.taken()
        tensors = opened.checkpoint.tensors
        size = sum(info.num_bytes for info in tensors.values())
        count = sum(math.prod(opened.shape(layer)) for layer in opened.layers)
        count += sum(math.prod(info.shape) for name, info in tensors.items() if name not in taken)
        rows += [
            ("weights", f"{size / 1e6:.2f} MB"),
            ("parameters", f"{count / 1e6:.2f} M"),
            ("bits a weight", f"{8 * size / count:.2f}, over everything that is stored"),
        ]
        if opened.layers:
            schemes = {s.label(): len(names) for s, names in opened.exact_plan().groups().items()}
            rows.append(("layers", ", ".join(f"{n} {label}" for label, n in schemes.items())))
    record = manifest.record
    if record["stage"] == "export":
        rows.append(("export", f"{record['format']} for {record['target']}, {record['bytes'] / 1e6:.2f} MB"))
        peak = record.get("sizing", {}).get("run_peak")
        if peak:
            rows.append(("memory there", f"{peak / 1e9:.2f} GB, predicted"))
    return rows


def _judged(folder: Path, manifest: Manifest) -> str:
    reports, through = recalled(folder), ""
    if not reports and manifest.record["stage"] == "export":
        parent = parent_path(manifest.record["parent"], folder)
        reports = recalled(parent)
        own = "" if is_judgeable(folder) else ", whose weights it holds"
        through = f"Measured on {parent.name}{own}. "
    if not reports:
        return "Not measured yet: `compress evaluate` does.\n"
    last = reports[-1]
    metrics, text = last["metrics"], last["text"]
    bounds = (last.get("recovery") or {}).get("perplexity")
    rows = [
        ("perplexity", _figure(metrics.get("perplexity"), ".3f")),
        ("recovery of perplexity", _recovery(metrics.get("perplexity_recovery"), bounds)),
        ("KL divergence, mean", _figure(metrics.get("kl_mean"), ".4g", " nats a token")),
        ("KL divergence, 99.9 %", _figure(metrics.get("kl_99.9"), ".4g", " nats a token")),
        ("same top token", _figure(metrics.get("top1_agreement"), ".2%")),
        *((f"accuracy, {n.removesuffix('_acc')}", _figure(v, ".2%")) for n, v in metrics.items() if n.endswith("_acc")),
    ]
    if last.get("outcome"):
        rows.append(("gate", f"{last['outcome']} at {last['gate']['threshold']:.1%}"))
    windows, context = text.get("num_windows"), text.get("context")
    said = f"{through}{text.get('num_tokens')} tokens of a text in {windows} windows of {context}, read by both models."
    return f"{_table(('against the original', ''), rows)}\n{said}\n"


def _figure(value: Any, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if isinstance(value, int | float) else "not kept"


def _recovery(value: Any, bounds: Mapping[str, float] | None) -> str:
    between = f" ({bounds['lower']:.2%} to {bounds['upper']:.2%})" if bounds else ""
    return _figure(value, ".2%") + between


def _recipe(manifest: Manifest) -> str:
    lines = []
    for number, record in enumerate(reversed(manifest.lineage), 1):
        options = {
            k: v for k, v in record.get("options", {}).items() if k not in _HOW and v not in (None, [], False, "")
        }
        said = ", ".join(f"{k} {_plain(v)}" for k, v in options.items())
        line = f"{number}. `{record['stage']}`{f': {said}' if said else ''}"
        text = record.get("calibration")
        if text:
            line += f"; calibrated on {text['num_samples']} x {text['seq_len']} tokens of {_place(text['source'])}"
            own, watched = text.get("num_sampled_from_model"), text.get("watched")
            line += f" and {own} rows of the model's own" if own else ""
            line += f"; judged on {_place(watched['source'])} as well" if watched else ""
        lines.append(line)
    versions = manifest.record.get("versions", {})
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join([*lines, *(["", f"Versions: {told}."] if told else [])]) + "\n"


def _plain(value: Any) -> str:
    """JSON on one line, paths by their last part."""
    if isinstance(value, str):
        return _place(value)
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return json.dumps(value, separators=(", ", ": "))


def _place(source: str) -> str:
    if source.startswith("hf:") or "/" not in source:
        return source.removeprefix("file:")
    return PurePath(source.removeprefix("file:")).name


def _usage(name: str, manifest: Manifest) -> str:
    record = manifest.record
    form = str(record.get("format", "")) if record["stage"] == "export" else "hf"
    ways = {
        "hf": f"    vllm serve {name}\n",
        "onnx": f'    python {name}/run.py "Once upon a time"    # onnxruntime, numpy, tokenizers\n',
        "edge": f"    sh {name}/build_engine.sh    # on the device\n",
    }
    own = ways.get(form, "")
    readers = next((r["readers"] for r in manifest.lineage if "readers" in r), None) if form == "hf" else None
    if readers is not None:
        needs = "; ".join(f"{reader} {version}" for reader, version in readers.items())
        own = f"The output matrix is in integers, which needs of a reader: {needs}.\n\n{own}"
    return f'{own}    compress generate {name} "Once upon a time"\n' if form != "edge" else own


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {a} | {b.replace('|', chr(92) + '|')} |" for a, b in rows)]) + "\n"
