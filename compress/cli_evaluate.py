"""`compress evaluate`: perplexity of an artifact and of its original on the same text, and the gate."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.errors import ConfigError, GateFailed
from compress.progress import Steps

if TYPE_CHECKING:
    from torch import Tensor

    from evaluators.perplexity import Scores


@click.command("evaluate")
@click.argument("candidate", required=False)
@click.option("--reference", metavar="MODEL", help="What to compare with [default: the original in the manifest].")
@click.option(
    "--data", metavar="TEXT", help="Evaluation text, as for `awq --calib`. Default: the bundled held-out text."
)
@click.option("--gate", type=click.FloatRange(0, 1), help="Least recovery to pass, such as 0.98. Without: no gate.")
@click.option("--confidence", type=click.FloatRange(0.5, 0.999), default=0.95, show_default=True)
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, help="Tokens in a window.")
@click.option("--max-tokens", type=click.IntRange(2), default=102_400, show_default=True, help="Tokens to read.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda[:N].")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(
    candidate: str | None,
    reference: str | None,
    data: str | None,
    gate: float | None,
    confidence: float,
    context: int,
    max_tokens: int,
    device: str,
    as_json: bool,
) -> None:
    """Compare CANDIDATE's perplexity with its original's, window by window.

    With --gate the exit code is 0 for PASS, 3 for FAIL, 4 for INCONCLUSIVE (the data cannot tell). Recovery is the
    original's perplexity over the candidate's; the interval is a paired bootstrap over windows.
    """
    import calibration_data
    from compress import calibration
    from compress.artifact import parent_path, read_manifest
    from compress.workspace import is_reference, resolve
    from evaluators.gate import EXIT_CODES, judge

    source = resolve(candidate)
    manifest = read_manifest(source.path)
    if reference is not None:
        original = resolve(reference).path
    elif manifest is not None:
        original = parent_path(manifest.root, source.path)
    else:
        raise ConfigError(f"{source.path} has no manifest that names its original; pass --reference MODEL")
    if data is None and not is_reference(original):
        raise ConfigError(
            "no --data: the bundled evaluation text fits the bundled reference model only; pass --data FILE"
        )
    tokenizer = calibration.load_tokenizer(original)
    text = calibration.load(
        data or str(calibration_data.default_evaluation()),
        tokenizer,
        num_samples=max(1, max_tokens // context),
        seq_len=context,
        seed=0,
        model=original,
        is_reference=False,
        vocab_size=10**9,
    )
    for record in manifest.lineage if manifest else []:
        used = record.get("calibration", {})
        if text.text_sha256 == used.get("text_sha256") or text.sha256 == used.get("sha256"):
            raise ConfigError(
                f"{text.source} is the text that {source.path} was calibrated on; pass other text with --data"
            )
    print(f"candidate: {source.said}\nreference: {original}\ntext: {text.source}", file=sys.stderr)
    before = _scores(original, text.ids_NT, device, "reference", as_json)
    after = _scores(source.path, text.ids_NT, device, "candidate", as_json)
    verdict = judge(
        before.nll_N.numpy(), after.nll_N.numpy(), threshold=gate if gate is not None else 0.0, confidence=confidence
    )
    result: dict[str, Any] = {
        "candidate": str(source.path),
        "reference": str(original),
        "text": text.source,
        "text_sha256": text.text_sha256,
        "context": context,
        "num_tokens": int(text.ids_NT.numel()),
        "perplexity_reference": before.perplexity,
        "perplexity_candidate": after.perplexity,
        "gate": gate,
        **asdict(verdict),
    }
    if gate is None:
        for key in ("outcome", "threshold", "windows_needed"):
            result.pop(key)
    print(json.dumps(result, indent=2) if as_json else _text(result))
    if gate is not None and EXIT_CODES[verdict.outcome]:
        raise GateFailed(_why(result), EXIT_CODES[verdict.outcome])


def _scores(path: Path, ids_NT: Tensor, device: str, what: str, quiet: bool) -> Scores:
    from compress.model import StreamedModel
    from evaluators.perplexity import window_nll

    model = StreamedModel.open(path, device=device)
    with Steps(f"{what} block", quiet=quiet) as steps:
        steps.start(model.num_blocks)
        return window_nll(model, ids_NT, on_block=lambda index: steps.step("done"))


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"perplexity  {result['perplexity_reference']:.3f} -> {result['perplexity_candidate']:.3f}  "
        f"({result['num_tokens']} tokens, context {result['context']})",
        f"recovery    {result['recovery']:.2%}  "
        f"(one-sided {result['confidence']:.0%} bounds {result['lower']:.2%} and {result['upper']:.2%}, "
        f"{result['num_windows']} paired windows)",
    ]
    if "outcome" in result:
        lines.append(f"gate {result['gate']:.1%}  {result['outcome']}")
    return "\n".join(lines)


def _why(result: dict[str, Any]) -> str:
    if result["outcome"] == "FAIL":
        return f"recovery is below {result['gate']:.1%}: at most {result['upper']:.2%} with this confidence"
    more = result["windows_needed"]
    hint = (
        f"about {more * result['context']} tokens would tell" if more else "the recovery is too near the gate to tell"
    )
    return f"the text cannot tell whether recovery is above {result['gate']:.1%}; {hint} (--data, --max-tokens)"
