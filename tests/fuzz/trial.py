"""One trial: damage a copy, run the commands on it, and say how each took it.

    clear      refused: one line `error: ...`, exit code 1 (2 to 4 for usage and gates)
    same       taken, and what was computed is what transformers computes from the same folder
    traceback  an exception that nobody foresaw
    silent     taken, but transformers refuses the folder, or computes something else

`hang` and `memory` are for the process that waits for this one.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import damage
import torch
from torch import Tensor

# The error of the logits of an artifact of 4-bit codes, relative, on the undamaged folders: 0.1 to 0.2.
QUANTIZED_ERROR = 0.6
Found = dict[str, Any]


def run(root: Path, kind: str, seed: int) -> Found:
    """One trial of `kind` in `root / work`, which is left as it was used: {damage, outcome, detail}."""
    rng = random.Random(f"{kind} {seed}")
    work = root / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        return KINDS[kind](root, work, rng)


def commanded(*args: Any) -> tuple[str, str, str]:
    """Outcome, last error line and stdout of one command, run in this process."""
    from click.testing import CliRunner

    from compress.cli.main import main

    found = CliRunner().invoke(main, [str(a) for a in args])
    lines = found.stderr.strip().splitlines()
    last = lines[-1] if lines else ""
    if found.exit_code == 70 or found.exception is not None and not isinstance(found.exception, SystemExit):
        return "traceback", f"{last} {found.exception!r}"[:600], found.stdout
    if found.exit_code == 0:
        return "taken", "", found.stdout
    if "Traceback" in found.output:
        return "traceback", last, found.stdout
    one_line = last.startswith(("error: ", "Error: ")) and len([x for x in lines if x.startswith("error: ")]) <= 1
    gate = found.exit_code in (3, 4)
    return ("clear" if one_line or gate else "traceback"), last[:600], found.stdout


# ---- model folders -------------------------------------------------------------------------------------


def folders(root: Path, work: Path, rng: random.Random) -> Found:
    names = list(bases.MODELS)
    folder = work / "m"
    shutil.copytree(root / rng.choice(names), folder)
    said = damage.damage(rng, folder, [root / n for n in names])
    if rng.random() < 0.15:
        said += "; " + damage.damage(rng, folder, [root / n for n in names])
    return {"damage": said, **judged(folder, root / "text.txt", work)}


def artifacts(root: Path, work: Path, rng: random.Random) -> Found:
    """The artifact is damaged; what it was made from is not."""
    folder = work / "a"
    shutil.copytree(root / "awq", folder)
    said = damage.damage(rng, folder, [root / n for n in ("llama", "qwen3-tied")])
    text = root / "other.txt"
    whole = _logits_of(lambda: streamed_logits(root / "awq", text))
    outcomes = [commanded("inspect", folder, "--json"), commanded(*evaluate_args(folder, root / "llama", text))]
    outcomes.append(commanded("export", folder, "--target", "a100", "--format", "hf", "-o", work / "hf"))
    worst = _worst(outcomes)
    if outcomes[1][0] == "taken":
        same, detail = _equal(_logits_of(lambda: streamed_logits(folder, text)), whole, 1e-5)
        if not same:
            return {"damage": said, "outcome": "silent", "detail": f"evaluated, but not the artifact: {detail}"}
    return {"damage": said, **worst}


def judged(folder: Path, text: Path, work: Path) -> Found:
    """A model folder through inspect, evaluate and awq."""
    outcomes = [commanded("inspect", folder, "--json"), commanded(*evaluate_args(folder, folder, text))]
    theirs: Callable[[], Tensor] = lambda: transformers_logits(folder, text)  # noqa: E731
    if outcomes[1][0] == "taken":
        want = _logits_of(theirs)
        same, detail = _equal(_logits_of(lambda: streamed_logits(folder, text)), want, 1e-4)
        if not same:
            return {"outcome": "silent", "detail": f"evaluated, but {detail}"}
    made = commanded("awq", folder, "-o", work / "out", *bases.tiny_awq(text))
    outcomes.append(made)
    if made[0] == "taken":
        want = _logits_of(theirs)
        ours = _logits_of(lambda: streamed_logits(work / "out", text))
        same, detail = _equal(ours, want, QUANTIZED_ERROR)
        if not same:  # a damaged model may double any error on its way to the logits: then rounding shows the same
            nearest = _logits_of(lambda: transformers_logits(folder, text, rounded=True))
            assert isinstance(nearest, Tensor) and isinstance(want, Tensor)
            same = _equal(ours, want, 1.5 * float((nearest - want).norm() / want.norm()))[0]
        if not same:
            return {"outcome": "silent", "detail": f"quantized, but {detail}"}
    return _worst(outcomes)


def evaluate_args(candidate: Path, reference: Path, data: Path) -> tuple[Any, ...]:
    sizes = ("--context", 16, "--max-tokens", 64, "--no-cache", "--json", "--device", "cpu")
    return ("evaluate", candidate, "--reference", reference, "--data", data, *sizes)


def _worst(outcomes: list[tuple[str, str, str]]) -> Found:
    """The worst of several commands' outcomes; `same` when all took the folder."""
    for outcome in ("traceback", "clear"):
        for found, detail, _ in outcomes:
            if found == outcome:
                return {"outcome": outcome, "detail": detail}
    return {"outcome": "same", "detail": ""}


def _logits_of(make: Callable[[], Tensor]) -> Tensor | str:
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return make()
    except Exception as e:
        return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def _equal(ours: Tensor | str, want: Tensor | str, tolerance: float) -> tuple[bool, str]:
    if isinstance(ours, str):
        return False, f"it cannot be read again: {ours}"
    if isinstance(want, str):
        return False, f"transformers refuses it: {want}"
    if ours.shape != want.shape or not bool(torch.isfinite(want).all()):
        return False, f"logits {tuple(ours.shape)} against {tuple(want.shape)}, or not finite"
    error = float((ours - want).norm() / want.norm().clamp_min(1e-20))
    return error <= tolerance, f"logits differ from transformers' by {error:.2g}"


def _ids(folder: Path, text: Path, vocab_size: int) -> Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(text.read_text()[:2000], add_special_tokens=False).input_ids[:32]
    return torch.tensor(ids).view(2, -1).clamp(max=vocab_size - 1)


@torch.no_grad()
def transformers_logits(folder: Path, text: Path, rounded: bool = False) -> Tensor:
    """rounded: the blocks' matrices rounded to the nearest of 16 values in groups of 32, the plainest INT4."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    lacking = {**info, "unexpected_keys": ()}
    if any(lacking.values()):
        raise ValueError(f"loaded with { ({k: v for k, v in lacking.items() if v}) }")
    for name, p in model.named_parameters():
        if rounded and p.ndim == 2 and (".layers." in name or ".h." in name):
            groups = p.view(-1, 32)
            low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
            scale = ((high - low) / 15).clamp_min(1e-20)
            zero = (-low / scale).round()
            groups.copy_((((groups / scale).round() + zero).clamp(0, 15) - zero) * scale)
    ids = _ids(folder, text, model.get_input_embeddings().weight.shape[0])
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


@torch.no_grad()
def streamed_logits(folder: Path, text: Path) -> Tensor:
    from compress.model import StreamedModel

    model = StreamedModel.open(folder)
    hidden = model.embed(_ids(folder, text, model.vocab_size))
    for i in range(model.num_blocks):
        model.load_block(i)
        hidden = model.run_block(i, hidden)
        model.release_block(i)
    return model.head(hidden)


# ---- texts and graphs ----------------------------------------------------------------------------------


def texts(root: Path, work: Path, rng: random.Random) -> Found:
    """A calibration or evaluation text is damaged; what can still be read may be used."""
    folder = work / "t"
    folder.mkdir()
    source = rng.choice(sorted((root / "texts").iterdir()))
    shutil.copy(source, folder / source.name)
    said = damage.damage_text(rng, folder)
    path = next(iter(sorted(folder.iterdir())), folder / source.name)
    small = bases.tiny_awq(path)
    outcomes = [
        commanded(*evaluate_args(root / "llama", root / "llama", path)),
        commanded("awq", root / "llama", "-o", work / "out", *small),
    ]
    return {"damage": said, **_worst(outcomes)}


def graphs(root: Path, work: Path, rng: random.Random) -> Found:
    folder = work / "g"
    shutil.copytree(root / "graph", folder)
    way = rng.choice([damage.flip_bits, damage.cut, damage.odd_file, damage.spoil_json, damage.edit_json])
    said = way(rng, folder) or damage.flip_bits(rng, folder)
    outcome, detail, out = commanded(*evaluate_args(folder, root / "llama", root / "text.txt"))
    if outcome == "taken":
        found = {m["name"]: m["value"] for m in json.loads(out)["metrics"]}
        detail = f"kl_mean {found.get('kl_mean')}"
        # Bits of a weight are a weight; what must not be is a number where none was computed.
        outcome = "same" if found.get("perplexity") is not None else "silent"
    return {"damage": said, "outcome": outcome, "detail": detail}


KINDS: dict[str, Callable[[Path, Path, random.Random], Found]] = {
    "folders": folders,
    "artifacts": artifacts,
    "texts": texts,
    "graphs": graphs,
}
