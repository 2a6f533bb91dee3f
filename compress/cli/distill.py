"""`compress distill`: options, progress and the closing summary. The work is in `compress.distill.run`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli.help import Command
from compress.cli.lessons import lessons
from compress.cli.next import judge
from compress.cli.progress import Shown, peak_memory_bytes, seconds_text
from compress.cli.start_codes import check_scheme, is_quantized, start_of
from compress.errors import ConfigError
from compress.tell import SILENT

if TYPE_CHECKING:
    from compress.distill.request import DistillOutcome, DistillRequest
    from compress.distill.run import Prepared
    from compress.workspace import Source


class Sent(click.ParamType):  # type: ignore[type-arg]
    """How gradients are sent: a rank, 1 or more, or `bf16`."""

    name = "rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "bf16":
            return "bf16"
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither a rank, such as 4, nor bf16", param, ctx)
        return int(value)


@click.command("distill", cls=Command)
@click.option("--teacher", metavar="MODEL", help="Whom to learn from [default: the student's original].")
@click.option("--student", metavar="MODEL", help="Who learns [default: the newest pruned artifact; with --scheme "
              "the --teacher].")  # fmt: skip
@click.option("--epochs", type=click.IntRange(1), default=1, show_default=True, help="How often each row is read.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Rows an update.")
@click.option(
    "--loss",
    type=click.Choice(["forward-kl", "reverse-kl", "jsd", "cross-entropy"]),
    default="forward-kl",
    show_default=True,
    help="Distance from the teacher's predictions; cross-entropy: the text alone, without a teacher.",
)
@click.option("--beta", type=click.FloatRange(0.01, 0.99), default=0.5, show_default=True, help="The teacher's in jsd.")
@click.option("--ce", type=click.FloatRange(0), default=0.0, show_default=True, help="Weight of cross-entropy beside.")
@click.option(
    "--hidden-loss", "hidden", type=click.FloatRange(0), default=0.0, show_default=True,
    help="Weight of the distance of hidden states, block by block (equal widths only).",
)  # fmt: skip
@click.option(
    "--lr", "rate", type=click.FloatRange(0, min_open=True), help="Peak rate [default: 3e-4; with --scheme 1e-3]."
)
@click.option("--warmup", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Share of rising rate.")
@click.option("--weight-decay", type=click.FloatRange(0), default=0.0, show_default=True, help="Of matrices.")
@click.option("--clip", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="Gradient norm.")
@click.option("--lora", type=click.IntRange(1), metavar="RANK", help="Train thin matrices, merged at the end (peft).")
@click.option("--scheme", metavar="w4a16|w8a16|w8a8", help="Train a quantized student's codes and scales; one that is "
              "not is quantized first.")  # fmt: skip
@click.option("--cache", type=click.Path(path_type=Path), help="The teacher's word, written by `compress teach`.")
@click.option("--on-policy", type=click.FloatRange(0, 1), default=0.0, show_default=True, metavar="SHARE",
              help="Updates on text that the student writes.")  # fmt: skip
@click.option(
    "--watch", metavar="TEXT", help="A second text: the weights best on it are kept; ends when it gets worse."
)
@click.option("--watch-tokens", type=click.IntRange(2), default=32_768, show_default=True, help="Tokens of it.")
@click.option("--watch-every", type=click.IntRange(1), help="Updates between looks [default: a tenth of the run].")
@click.option("--patience", type=click.IntRange(1), default=3, show_default=True, help="Worse looks that end the run.")
@click.option("--engine", type=click.Choice(["auto", "ddp", "fsdp", "deepspeed"]), default="auto", show_default=True,
              help="Of several processes (torchrun): copies, shares (FSDP2), or DeepSpeed ZeRO-3.")  # fmt: skip
@click.option("--compress-gradients", type=Sent(), metavar="RANK|bf16",
              help="Between processes (ddp): PowerSGD of this rank, or half of the bits.")  # fmt: skip
@click.option(
    "--checkpointing", is_flag=True, help="Recompute blocks in the backward pass: less memory, a third slower."
)
@click.option(
    "--compile/--no-compile", default=None, help="Compile blocks (not deepspeed's) and losses [default: on a GPU]."
)
@click.option("--checkpoint-minutes", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True,
              help="Minutes from one checkpoint to the next.")  # fmt: skip
@click.option("--checkpoint-steps", type=click.IntRange(0), default=0, help="And every so many updates.")
@click.option("--report", type=click.Path(path_type=Path), help="Folder for training.csv with speeds, and loss.svg.")
@click.option("--tensorboard", is_flag=True, help="TensorBoard files in the --report folder too.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to make [default: artifacts/NAME-distilled]."
)
@lessons(
    tokens="Tokens to train on [default: all of the text].",
    seed="Of the order of rows and of sampling.",
    dtype="Of matrix products (auto: bfloat16 on a GPU); master weights are float32.",
    resume="Go on from the last checkpoint.",
)
def command(
    teacher: str | None,
    student: str | None,
    report: Path | None,
    tensorboard: bool,
    as_json: bool,
    **rest: Any,
) -> None:
    """Train a student to predict what its teacher predicts.

    The result is an ordinary Hugging Face folder with a manifest. SIGTERM or Ctrl-C writes a checkpoint; the same
    command goes on from there and ends with the same bytes (on a CPU). Several processes: torchrun --nproc-per-node N
    -m compress distill ...
    """
    started = time.monotonic()
    from compress import output
    from compress.devices import described
    from compress.distill import prepare
    from compress.distill.run import distill

    if rest["out"] is not None:  # before a model is fetched
        output.check(rest["out"], {}, force=rest["force"])
    if rest["scheme"] is not None:
        check_scheme(rest["scheme"])
    learner = student_of(student, rest["scheme"], teacher)
    master = teacher_of(teacher, learner, rest["scheme"])
    if not rest["data"] and rest["cache"] is None:
        raise ConfigError("no text to learn on; pass --data FILE, --data hf:DATASET, --data self or --cache FOLDER")
    if tensorboard and report is None:
        raise ConfigError("--tensorboard writes into the --report folder; pass --report FOLDER as well")
    first = int(os.environ.get("RANK", "0")) == 0  # of those that torchrun started
    with _Steps(quiet=as_json or not first) as shown:
        if rest["scheme"] is not None:
            prepare.refuse(request_of(learner, master, **rest))
            learner = start_of(learner, tell=shown if first else SILENT, **rest)
        request = request_of(learner, master, **rest)
        if first:
            shown.say(f"student: {learner.said}\nteacher: {master.said}")
            shown.say(f"computed on: {described(request.device)}, {request.dtype}")
        run = _Run(request, shown, report if first else None, tensorboard)
        outcome = distill(request, tell=shown if first else SILENT, heard=run.heard, describe=run.describe)
        run.finish(outcome)
    if not first:
        return
    if as_json:
        print(json.dumps(_as_json(outcome, run, time.monotonic() - started), indent=2))
    else:
        _print_summary(outcome, run, outcome.notes, time.monotonic() - started)


def request_of(
    student: Source,
    teacher: Source,
    *,
    data: tuple[str, ...],
    mix: str | None,
    out: Path | None,
    device: str,
    dtype: str,
    scheme: str | None,
    rate: float | None,
    compile: bool | None,
    **rest: Any,
) -> DistillRequest:
    """What was asked for, with what follows from the rest where nothing was said."""
    from compress.devices import pick_device, pick_dtype
    from compress.distill.data import Mix
    from compress.distill.request import DistillRequest
    from compress.workspace import WORKSPACE

    device = pick_device(device)
    usual = 3e-4 if scheme is None else 1e-3
    return DistillRequest(
        teacher=teacher,
        student=student,
        out=out or WORKSPACE / f"{student.name}-distilled",
        data=Mix.of(data, mix),
        device=device,
        dtype=pick_dtype(dtype, device),
        scheme=scheme,
        rate=usual if rate is None else rate,
        compile=device.startswith("cuda") if compile is None else compile,
        **rest,
    )


def student_of(asked: str | None, scheme: str | None, teacher: str | None) -> Source:
    """The model named, or the workspace's newest pruned artifact.

    With a scheme: the teacher named, which is to be quantized, or the newest quantized artifact.
    """
    from compress.artifact import read_manifest
    from compress.files import read_json
    from compress.workspace import holds_weights, resolve

    def is_meant(folder: Path) -> bool:
        manifest = read_manifest(folder)
        if manifest is None or not holds_weights(folder):
            return False
        if scheme is not None:
            return bool(manifest.record["stage"] != "export") and "quantization_config" in read_json(
                folder / "config.json"
            )
        return bool(manifest.record["stage"] == "prune")

    if asked is None and scheme is not None and teacher is not None:
        return resolve(teacher)
    found = resolve(asked, accept=is_meant)
    if asked is None and read_manifest(found.path) is None:
        kind = "pruned" if scheme is None else "quantized"
        raise ConfigError(f"there is no {kind} artifact in the workspace to train; pass --student MODEL")
    return found


def teacher_of(asked: str | None, student: Source, scheme: str | None = None) -> Source:
    """The model named, or the student's original: itself, where its codes are yet to be made."""
    from compress.artifact import parent_path, read_manifest
    from compress.workspace import resolve

    if asked is not None:
        return resolve(asked)
    if scheme is not None and not is_quantized(student.path):
        return student
    manifest = read_manifest(student.path)
    if manifest is None:
        raise ConfigError(f"{student.path} has no manifest that names its original; pass --teacher MODEL")
    return resolve(str(parent_path(manifest.root, student.path)))


class _Steps(Shown):
    """Steps of a training run take seconds: without a terminal they get a line now and then."""

    LINE_SECONDS = 15.0


class _Run:
    """Speeds and curve of one run, as the command line shows them."""

    def __init__(self, request: DistillRequest, shown: Shown, folder: Path | None, tensorboard: bool) -> None:
        from compress.distill.report import RunReport

        self.request, self.shown = request, shown
        self.report = RunReport(folder, tensorboard=tensorboard) if folder is not None else None
        self.meter: Any = None

    def heard(self, record: dict[str, float], ready: Prepared) -> None:
        if self.meter is None:
            self.meter = ready.meter()
        self.meter.step()
        if self.report is not None:
            self.report.record(record, self.meter)

    def describe(self, record: dict[str, float]) -> str:
        return f"loss {record['loss']:.4f}{self.meter.text() if self.meter is not None else ''}"

    def finish(self, outcome: DistillOutcome) -> None:
        if self.report is not None:
            watch = outcome.record["watch"]
            per_step = outcome.record["tokens"] / max(1, outcome.record["steps"])
            looks = [{**w, "tokens": w["step"] * per_step} for w in watch["looks"]] if watch else []
            files = self.report.finish(outcome.record["curve"], looks)
            self.shown.note(f"wrote {', '.join(str(f) for f in files)}")


def _as_json(outcome: DistillOutcome, run: _Run, seconds: float) -> dict[str, Any]:
    return {
        "out": str(outcome.out),
        "wall_seconds": round(seconds, 3),
        "tokens_per_second": None if run.meter is None else run.meter.tokens_per_second,
        "mfu": None if run.meter is None else run.meter.mfu,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_bytes": _peak_gpu_bytes(),
        "tensors_verified": outcome.verified,
        "notes": [*outcome.notes, *run.shown.notes],
        "record": outcome.record,
    }


def _peak_gpu_bytes() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


def _print_summary(outcome: DistillOutcome, run: _Run, notes: list[str], seconds: float) -> None:
    record = outcome.record
    print(f"trained on {record['tokens']:,} tokens in {record['steps']} updates{run.meter.text() if run.meter else ''}")
    for look in record["watch"]["looks"] if record["watch"] else []:
        kept = "  <- kept" if look["step"] == record["kept_step"] else ""
        print(
            f"  step {look['step']:.0f}: watched text: divergence {look['divergence']:.4f}, perplexity "
            f"{look['perplexity']:.3f}{kept}"
        )
    sent = record["gradient_bytes"]
    if sent is not None:
        print(
            f"gradients: {sent['sent'] / 1e6:.1f} MB sent a process instead of {sent['uncompressed'] / 1e6:.1f} MB "
            f"({sent['uncompressed'] / max(1, sent['sent']):.1f} times less)"
        )
    for note in notes:
        print(note)
    size = sum(p.stat().st_size for p in outcome.out.glob("*.safetensors"))
    print(f"wrote {outcome.out}/  {size / 1e6:.1f} MB; verified {outcome.verified} tensors by reading them back")
    print(f"{seconds_text(seconds)}, peak memory {peak_memory_bytes() / 2**20:.0f} MiB")
    print(f"next: {judge(outcome.out, '--reference', run.request.teacher.path)}")
