"""`compress evaluate`: an artifact against its original, the reports, and the gate's exit code."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli.help import Command
from compress.cli.progress import Shown
from compress.errors import ConfigError, GateFailed, reason

if TYPE_CHECKING:
    from compress.workspace import Source
    from evaluators.request import EvaluationRequest
    from evaluators.results import Report


@click.command("evaluate", cls=Command)
@click.argument("candidate", required=False)
@click.option("--reference", metavar="MODEL", help="What to compare with [default: the original in the manifest].")
@click.option(
    "--data",
    metavar="TEXT",
    help="Evaluation text: a .txt, .jsonl or .parquet file, hf:DATASET[:SPLIT[:COLUMN]], or `self` (windows sampled "
    "from the original). Default: the bundled held-out text, for the bundled model only.",
)
@click.option("--tasks", multiple=True, metavar="[NAME=]FILE.jsonl", help="Tasks, LAMBADA or multiple-choice layout.")
@click.option("--lm-eval", multiple=True, metavar="TASK", help="A task of lm-evaluation-harness (extra `eval`).")
@click.option("--limit", type=click.IntRange(1), help="Use the first N items of each task.")
@click.option("--gate", type=click.FloatRange(0, 1), help="Least recovery to pass, such as 0.98. Without: no gate.")
@click.option(
    "--gate-on",
    type=click.Choice(["bounds", "point"]),
    default="bounds",
    show_default=True,
    help="Judge the interval's bounds, or (naively) the point alone.",
)
@click.option(
    "--confidence", type=click.FloatRange(0.5, 0.999), default=0.95, show_default=True, help="Of each of the bounds."
)
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, help="Tokens in a window.")
@click.option("--stride", type=click.IntRange(1), help="Tokens from window to window [default: the context].")
@click.option("--min-context", type=click.IntRange(1), help="Score from this position of a window on.")
@click.option(
    "--bos",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Begin-of-text token before each window; auto: as the tokenizer does.",
)
@click.option(
    "--kv-cache",
    type=click.Choice(["int8", "none"]),
    help="Keys and values of the candidate as vLLM's int8_per_token_head holds them, or as floats [default: as its "
    "folder says].",
)
@click.option("--max-tokens", type=click.IntRange(2), default=102_400, show_default=True, help="Tokens to read.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Folder for report.json, junit.xml, summary.md, index.html.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda[:N]; auto: a GPU if there is one.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Arithmetic of both models.",
)
@click.option(
    "--cache", "cache_folder", type=click.Path(path_type=Path), help="Where the reference's results are kept."
)
@click.option("--no-cache", is_flag=True, help="Keep nothing and read nothing kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as one JSON object.")
def command(
    candidate: str | None,
    reference: str | None,
    data: str | None,
    gate: float | None,
    gate_on: str,
    report: Path | None,
    cache_folder: Path | None,
    no_cache: bool,
    as_json: bool,
    device: str,
    **rest: Any,
) -> None:
    """Judge CANDIDATE against its original on the same tokens: perplexity, divergence, tasks, error by depth.

    With --gate the exit code is 0 for PASS, 3 for FAIL, 4 for INCONCLUSIVE (the data cannot tell). Gated are perplexity
    and every task given: recovery is the original's perplexity over the candidate's, or the candidate's accuracy over
    the original's, and its bounds come from a paired bootstrap.
    """
    from compress.devices import described, pick_device
    from compress.workspace import is_candidate, judged_as, resolve

    asked = {"--report": report, "--cache": None if no_cache else cache_folder}
    places = {flag: place for flag, place in asked.items() if place is not None}
    made = [place for flag, place in places.items() if _check_writable(place, flag)]
    device = pick_device(device)
    named = resolve(candidate, accept=is_candidate)
    source = judged_as(named)
    original = original_of(source, reference, found=candidate is None)
    data = text_for(original, data)
    _refuse_places(places, made, {"the candidate": source.path, "the reference": original})
    if not as_json:
        said = f"candidate: {source.said}\nreference: {original}\ncomputed on: {described(device)}"
        print(said, file=sys.stderr)
    from evaluators import cache
    from evaluators.request import EvaluationRequest

    request = EvaluationRequest(
        candidate=source.path,
        asked=named.path,
        reference=original,
        data=data,
        threshold=gate,
        rule="point" if gate_on == "point" else "bounds",
        device=device,
        cache_folder=None if no_cache else cache_folder or cache.default_folder(),
        **rest,
    )
    _judge(request, report, as_json)


def _judge(request: EvaluationRequest, report: Path | None, as_json: bool) -> None:
    """Evaluate, print, write the reports, remember the result, and exit as the gate says."""
    from evaluators import evaluate, memory
    from evaluators.report import to_json, to_text

    with Shown(quiet=as_json) as shown:
        found = evaluate.evaluate(request, shown)
    print(to_json(found).decode().rstrip() if as_json else to_text(found))
    unwritten = None if report is None else _write(found, report)
    if unkept := memory.remember(request.candidate, found):
        print(f"note: {unkept}", file=sys.stderr)
    _exit(found, unwritten)


def _refuse_places(places: Mapping[str, Path], made: Sequence[Path], models: Mapping[str, Path]) -> None:
    """ConfigError for folders to write into, by their option, that lie in what is judged or hold what is not ours.

    made: those that had to be made, and are removed again.
    """
    from compress.output import check_apart
    from evaluators.written import refuse_strangers

    for flag, place in places.items():
        try:
            check_apart(place, models, flag)
        except ConfigError:
            for folder in made:
                folder.rmdir()  # ours, and empty
            raise
    if "--report" in places:
        refuse_strangers(places["--report"])


def _check_writable(folder: Path, flag: str) -> bool:
    """ConfigError, before any work, when nothing can be written into the folder. Whether it had to be made."""
    import tempfile

    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ConfigError(f"{flag} {folder} cannot be written to ({reason(e)}); pass another folder") from e
    return made


def _write(found: Report, folder: Path) -> ConfigError | None:
    """Write the reports; why not, if they cannot be written: the verdict stands all the same."""
    from compress.workspace import WORKSPACE
    from evaluators import memory
    from evaluators.written import write_reports

    others, notes = memory.others(found, WORKSPACE)
    for line in notes:
        print(f"note: {line}", file=sys.stderr)
    try:
        files, note = write_reports(found, folder, others)
    except ConfigError as e:
        return e
    except OSError as e:
        return ConfigError(f"the report could not be written to {folder} ({reason(e)}); what was found stands above")
    print(f"wrote {', '.join(str(f) for f in files)}", file=sys.stderr)
    if note:
        print(note, file=sys.stderr)
    return None


def text_for(original: Path, data: str | None) -> str:
    """The text to judge on: the one asked for, or the bundled one for the bundled model; ConfigError for others."""
    import calibration_data
    from compress.workspace import is_reference

    if data is None and not is_reference(original):
        raise ConfigError(
            "no --data: the bundled evaluation text fits the bundled reference model only; pass --data FILE.txt (or "
            ".jsonl, .parquet), --data hf:DATASET:SPLIT:COLUMN, or --data self (windows sampled from the original)"
        )
    return data or str(calibration_data.default_evaluation())


def original_of(source: Source, reference: str | None, *, found: bool = False) -> Path:
    """What a candidate is judged against. found: nobody named the candidate."""
    from compress.artifact import parent_path, read_manifest
    from compress.workspace import resolve

    if reference is not None:
        return resolve(reference).path
    manifest = read_manifest(source.path)
    if manifest is None and found and source.is_reference:
        raise ConfigError(
            "nothing made in ./artifacts can be judged; make something, as with `compress awq --bits 4`, or name a "
            "folder"
        )
    if manifest is None:
        raise ConfigError(f"{source.path} has no manifest that names its original; pass --reference MODEL")
    return parent_path(manifest.root, source.path)


def _exit(report: Report, unwritten: ConfigError | None) -> None:
    """The exit code is the gate's; without a gate, a report that could not be written is an error."""
    from evaluators.gate import EXIT_CODES

    if unwritten is not None and report.outcome is None:
        raise unwritten
    if unwritten is not None:
        print(f"error: {unwritten}", file=sys.stderr)
    if report.outcome is None or not EXIT_CODES[report.outcome]:
        return
    decisive = next(v for v in report.verdicts if v.outcome == report.outcome)
    more = " (--data, --max-tokens, --limit)" if report.outcome == "INCONCLUSIVE" else ""
    said = f"gate {decisive.threshold:.1%}: {decisive.metric}: {decisive.reason}{more}"
    raise GateFailed(said, EXIT_CODES[report.outcome])
