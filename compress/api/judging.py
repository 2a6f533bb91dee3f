"""Judging and packaging from Python: `evaluate`, `export`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.api.calls import PathLike, told
from compress.errors import ConfigError
from compress.tell import Tell

if TYPE_CHECKING:
    from evaluators.results import Report
    from exporters.export import ExportOutcome


def evaluate(
    candidate: PathLike | None = None,
    reference: PathLike | None = None,
    *,
    data: PathLike | None = None,
    gate: float | None = None,
    tasks: Sequence[str] = (),
    context: int = 512,
    max_tokens: int = 102_400,
    device: str = "auto",
    tell: Tell | None = None,
) -> Report:
    """Judge an artifact against its original, as `compress evaluate` does.

    candidate: an artifact or export, None for the workspace's newest. reference: the original, None for the one that
    the artifact's manifest names. data: a text file or hf:DATASET, None for the bundled text where the original is
    the bundled model. gate: the share of accuracy to keep, such as 0.98; None measures without a verdict. The
    report's `outcome` is PASS, FAIL or INCONCLUSIVE; `evaluators.report` writes it as JSON, JUnit, Markdown and HTML.
    """
    import calibration_data
    from compress.artifact import parent_path, read_manifest
    from compress.devices import pick_device
    from compress.workspace import is_candidate, is_reference, judged_as, resolve
    from evaluators import cache
    from evaluators.evaluate import evaluate as run
    from evaluators.request import EvaluationRequest

    named = resolve(None if candidate is None else os.fspath(candidate), accept=is_candidate)
    source = judged_as(named)
    if reference is None:
        manifest = read_manifest(source.path)
        if manifest is None:
            raise ConfigError(f"{source.path} has no manifest that names its original; pass reference=MODEL")
        original = parent_path(manifest.root, source.path)
    else:
        original = resolve(os.fspath(reference)).path
    if data is None and not is_reference(original):
        raise ConfigError(
            'no data: the bundled evaluation text fits the bundled reference model only; pass data=FILE, or data="self"'
        )
    request = EvaluationRequest(
        candidate=source.path,
        asked=named.path,
        reference=original,
        data=str(calibration_data.default_evaluation()) if data is None else os.fspath(data),
        tasks=tuple(tasks),
        threshold=gate,
        context=context,
        max_tokens=max_tokens,
        device=pick_device(device),
        cache_folder=cache.default_folder(),
    )
    with told(tell) as listener:
        return run(request, listener)


def export(
    artifact: PathLike | None = None,
    *,
    target: str,
    format: str | None = None,
    out: PathLike | None = None,
    context: int | None = None,
    batch: int | None = None,
    force: bool = False,
    tell: Tell | None = None,
    **options: Any,
) -> ExportOutcome:
    """Turn an artifact into what a machine runs, as `compress export` does.

    target: a name of `compress targets`. format: hf, onnx, onnx-trt, tensorrt or edge, None for the target's first.
    context counts tokens, prompt and answer; batch, sequences at once: None for one, or with hf as many as fit.
    options: the format's own, such as `opset=21` for onnx-trt.
    """
    from compress.workspace import is_model, resolve
    from exporters.export import ExportRequest, target_named
    from exporters.export import export as run

    request = ExportRequest(
        source=resolve(None if artifact is None else os.fspath(artifact), accept=is_model),
        target=target_named(target),
        format=format,
        context=context,
        batch=batch,
        out=None if out is None else Path(out),
        force=force,
        options=options,
    )
    with told(tell) as listener:
        return run(request, tell=listener)
