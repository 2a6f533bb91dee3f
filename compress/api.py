"""The toolkit from Python: the same stages as the command line, each one call, with progress in a notebook or terminal.

    import compress

    made = compress.quantize_awq("meta-llama/Llama-3.2-1B", "out/awq", calib="notes.txt")
    report = compress.evaluate(made.out, data="held_out.txt", gate=0.98)
    print(report.outcome, {m.name: m.value for m in report.metrics})
    compress.export(made.out, target="orin")

Every error is a `compress.errors.CompressError` with one sentence. Pass `tell=compress.tell.SILENT` for silence, or a
`Tell` of your own to listen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError
from compress.tell import Tell

if TYPE_CHECKING:
    from compress.stage import Outcome
    from evaluators.results import Report
    from exporters.export import ExportOutcome

PathLike = str | os.PathLike[str]


def quantize_awq(
    model: PathLike | None = None,
    out: PathLike | None = None,
    *,
    num_bits: int = 4,
    group_size: int | None = None,
    symmetric: bool | None = None,
    effort: str = "balanced",
    calib: PathLike | None = None,
    samples: int = 128,
    seq_len: int = 512,
    self_samples: int | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    tell: Tell | None = None,
) -> Outcome:
    """Quantize a model's weights with AWQ scales, as `compress awq` does: to an AutoAWQ folder at 4 bits, at 8 to a
    compressed-tensors folder.

    model: a Hugging Face folder or hub id; None as on the command line: what the workspace was made from, else the
    bundled reference model. out: the folder to make, None for `artifacts/NAME-awq-w4g128`. group_size counts input
    channels that share a scale, None: the largest of 128, 64 and 32 that divides every layer's; symmetric None: at 8
    bits, not at 4; samples and seq_len count calibration rows and tokens a row; effort is fast, balanced or best. The
    outcome has the folder (`out`), the manifest's record with each layer's error, sizes in bytes, and notes.
    """
    from compress.devices import pick_device, pick_dtype
    from compress.quantize.awq_stage import AwqRequest, check_codes
    from compress.quantize.awq_stage import quantize_awq as run
    from compress.quantize.group_size import asked_scheme
    from compress.workspace import WORKSPACE, is_model, resolve

    symmetric = check_codes(num_bits, symmetric)
    asked, place = None if model is None else os.fspath(model), None if out is None else Path(out)
    source = resolve(asked, quantizable=True, accept=is_model, out=place, force=force)
    scheme, _ = asked_scheme(source.path, num_bits, group_size, symmetric, skip, trust_remote_code=trust_remote_code)
    device = pick_device(device)
    request = AwqRequest(
        source=source,
        out=place or WORKSPACE / f"{source.name}-awq-{scheme.label()}",
        scheme=scheme,
        calib=None if calib is None else os.fspath(calib),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        dtype=pick_dtype(dtype, device),
        device=device,
        skip=tuple(skip),
        effort=effort,
        self_samples=self_samples,
        force=force,
        resume=resume,
        trust_remote_code=trust_remote_code,
    )
    with _told(tell) as listener:
        return run(request, listener)


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
    with _told(tell) as listener:
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
    with _told(tell) as listener:
        return run(request, tell=listener)


@contextmanager
def _told(tell: Tell | None) -> Iterator[Tell]:
    """The listener asked for, or one that shows progress where the code runs."""
    if tell is not None:
        yield tell
        return
    from compress.cli.progress import Shown

    with Shown() as shown:
        yield shown
