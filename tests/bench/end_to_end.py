"""What learning scales and norms through the whole model adds to `best`, at several rates, lengths and row counts.

    python tests/bench/end_to_end.py MODEL [--seeds 0 --rates 3e-4 1e-3 --updates 200 400 --own 0 512 --dtypes bfloat16]

A seed is a piece of the calibration text (`texts.py`). Its blocks are quantized once, as `best` does it; every row
of the table then learns from there and is judged as it is in memory, on windows 0 to 99 of each text and on the model's
own answers to ARC questions: those are for choosing. `rivals.py` reports on others. `--own`: rows sampled from the
model beside those of `best`. Finished rows are kept in `--work`, so the same command goes on; the last lines are the
table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" if (ROOT.parent / "shared").exists() else ROOT / "shared"
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import texts  # noqa: E402
from metrics import conversations  # noqa: E402
from metrics.perplexity import losses, perplexity, windows  # noqa: E402

from compress import stage  # noqa: E402
from compress.block import BlockResult  # noqa: E402
from compress.checkpoint import Checkpoint  # noqa: E402
from compress.formats import stored  # noqa: E402
from compress.losses.heads import proven_head  # noqa: E402
from compress.model import StreamedModel  # noqa: E402
from compress.quantize.awq_stage import AwqRequest, awq_stage  # noqa: E402
from compress.quantize.end_to_end import EndToEndOptions, Lessons, lessons, train  # noqa: E402
from compress.quantize.end_to_end_stage import student_of  # noqa: E402
from compress.sampling import load_model_float32, sample_from_model  # noqa: E402
from compress.scheme import Scheme  # noqa: E402
from compress.stage import DTYPES, rows_of  # noqa: E402
from compress.tell import Tell  # noqa: E402
from compress.tokens import load_tokenizer  # noqa: E402
from compress.workspace import resolve  # noqa: E402

TOGETHER = 256  # rows sampled at once

Row = dict[str, Any]


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def blocks_made(options: argparse.Namespace, seed: int) -> tuple[Path, torch.Tensor]:
    """The artifact of `best` without the step, and the rows that it was calibrated on."""
    out, ids = options.work / f"best-{seed}", options.work / f"best-{seed}.pt"
    text = texts.write_seed(options.text, seed, options.samples, options.seq_len, options.model, options.work)
    request = AwqRequest(
        source=resolve(str(options.model)), out=out, scheme=Scheme(group_size=options.group_size), effort="best",
        calib=str(text.text), samples=options.samples, seq_len=options.seq_len, seed=seed, device=options.device,
        dtype=options.dtypes[0], tune_steps=options.tune_steps, end_to_end=0, force=True,
    )  # fmt: skip
    if not ids.exists():
        started = time.monotonic()
        job = request.job()
        rows = rows_of(job, StreamedModel.open(options.model, device=options.device), Tell())
        stage.run(awq_stage(request), replace(job, rows=rows), Tell())
        log(f"seed {seed}: best without it in {time.monotonic() - started:.0f} s, {len(rows.ids_NT)} rows")
        torch.save(rows.ids_NT, ids)
    return out, torch.load(ids)


def own_rows(options: argparse.Namespace, seed: int, count: int) -> torch.Tensor:
    """More rows of the model's own, behind those that `best` samples."""
    path = options.work / f"own-{seed}-{count}.pt"
    if not path.exists():
        lm, encode = load_model_float32(options.model, options.device), load_tokenizer(options.model)
        torch.save(
            sample_from_model(
                lm, encode, num_samples=count, seq_len=options.seq_len, seed=seed, batch_size=TOGETHER,
                first_row=options.samples, chat=True,
            ),
            path,
        )  # fmt: skip
    found: torch.Tensor = torch.load(path)
    return found


def parts(artifact: Path) -> tuple[list[BlockResult], dict[str, torch.Tensor]]:
    """An artifact's blocks, and what lies outside them."""
    checkpoint, model = Checkpoint.open(artifact), StreamedModel.open(artifact)
    layers, blocks, inside = stored(checkpoint), [], set[str]()
    for index, block in enumerate(model.blocks):
        prefix = model.block_prefix(index)
        names = [n.removesuffix(".weight") for n in block.state_dict() if n.endswith(".weight")]
        quantized = {name: layers.weight(prefix + name) for name in names if prefix + name in layers}
        dense = {n: prefix + n for n in block.state_dict() if n.removesuffix(".weight") not in quantized}
        inside |= {name for name in checkpoint.names() if name.startswith(prefix)}
        blocks.append(BlockResult(quantized=quantized, dense={n: checkpoint.tensor(s) for n, s in dense.items()}))
    return blocks, {name: checkpoint.tensor(name) for name in checkpoint.names() if name not in inside}


def learned(
    options: argparse.Namespace, artifact: Path, ids: torch.Tensor, setting: Row
) -> tuple[torch.nn.Module, Row]:
    """The artifact's model after learning (0 updates: as it is), and what that took."""
    dtype = DTYPES[setting["dtype"]]
    opened = StreamedModel.open(options.model, device=options.device)
    opened.load_whole()
    taught: Lessons = lessons(
        opened.base, proven_head(opened.model, opened.base, options.model), ids, setting["rows"], dtype
    )
    student = student_of(opened, *parts(artifact))
    started = time.monotonic()
    found = train(
        student,
        taught,
        EndToEndOptions(
            updates=setting["updates"],
            rows=setting["rows"],
            rate=setting["rate"],
            code_rate=setting["codes"],
            dtype=dtype,
        ),
    )
    memory = torch.cuda.max_memory_allocated() / 1e9 if options.device != "cpu" else 0.0
    said = {"seconds": time.monotonic() - started, "held_out": found.divergences, "gigabytes": memory}
    return opened.model.eval(), said


def judged(options: argparse.Namespace, lm: Any, original: Any, ids: dict[str, torch.Tensor], chats: Path) -> Row:
    found: Row = {name: losses(lm, original, ids_NT) for name, ids_NT in ids.items()}
    if chats.exists():
        found["chats"] = conversations.divergence(lm, original, chats)
    return found


def judges(options: argparse.Namespace) -> tuple[dict[str, torch.Tensor], Path]:
    """Windows of each text, and the file of conversations, made once."""
    pedia, chats = options.work / "pedia.txt", options.work / "chats.json"
    if not pedia.exists():
        with lzma.open(options.data / "wikipedia-train.jsonl.xz", "rt", encoding="utf-8") as file:
            articles = itertools.islice(file, options.articles)
            pedia.write_text("\n".join(json.loads(line)["text"] for line in articles), encoding="utf-8")
    if not chats.exists():
        conversations.write(options.model, options.data / "arc_easy.jsonl", options.chats, options.device, chats)
    files = {
        "wiki": options.data / "wikitext-2" / "wiki.test.raw", "novels": options.data / "novels-heldout.txt",
        "pedia": pedia,
    }  # fmt: skip
    encode = load_tokenizer(options.model)
    return {name: windows(encode, file, 0, options.windows) for name, file in files.items()}, chats


def line(name: str, row: Row, base: Row) -> str:
    cells = []
    for text in ("wiki", "novels", "pedia"):
        kl = row["judged"][text]["kl"]
        gap = perplexity(row["judged"][text]["nll"], base[text]["nll"]).gap
        cells.append(f"{gap:7.3f} {sum(kl) / len(kl):.4f}")
    chats = row["judged"].get("chats")
    cells.append(f"{sum(chats) / len(chats):.4f}" if chats else "     -")
    before, after = row["held_out"]
    took = f"{before:.4f} > {after:.4f} {row['seconds']:6.1f} s {row['gigabytes']:5.1f} GB"
    return f"{name:44} " + "   ".join(cells) + f"   {took}"


def settings_of(options: argparse.Namespace) -> list[Row]:
    swept = itertools.product(options.own, options.dtypes, options.rows, options.updates, options.codes, options.rates)
    names = ("own", "dtype", "rows", "updates", "codes", "rate")
    off = dict(zip(names, (0, options.dtypes[0], options.rows[0], 0, 0.0, 0.0), strict=True))
    return [off, *(dict(zip(names, values, strict=True)) for values in swept)]


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + options.deadline
    ids, chats = judges(options)
    original = load_model_float32(options.model, options.device)
    base = {name: losses(original, None, ids_NT) for name, ids_NT in ids.items()}
    table = [f"{'':44} " + "   ".join(f"{t + ' gap, KL':14}" for t in ids) + "   conversations   held out, learning"]
    for seed, setting in itertools.product(options.seeds, settings_of(options)):
        name = f"{seed} " + " ".join(f"{key}={value}" for key, value in setting.items())
        path = options.work / f"row-{name.replace(' ', '-')}.json"
        if not path.exists():
            if time.monotonic() > until:
                table.append(f"{name:44} not done: the time was up")
                continue
            artifact, rows = blocks_made(options, seed)
            if setting["own"]:
                rows = torch.cat([rows, own_rows(options, seed, setting["own"])])
            lm, said = learned(options, artifact, rows, setting)
            row = {"setting": setting, **said, "judged": judged(options, lm, original, ids, chats)}
            path.write_text(json.dumps(row))
            if options.out:
                (options.out / path.name).write_text(path.read_text())
        table.append(line(name, json.loads(path.read_text()), base))
        log(table[-1])
    print("\n".join(table))


def arguments() -> argparse.Namespace:
    out = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    out.add_argument("model", type=Path)
    out.add_argument("--data", type=Path, default=SHARED / "data")
    out.add_argument("--text", type=Path, help="calibration text [WikiText-2 valid]")
    out.add_argument("--device", default="cuda")
    out.add_argument("--group-size", type=int, default=64)
    out.add_argument("--samples", type=int, default=128)
    out.add_argument("--seq-len", type=int, default=512)
    out.add_argument("--tune-steps", type=int, default=200)
    out.add_argument("--seeds", type=int, nargs="+", default=[0])
    out.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    out.add_argument("--codes", type=float, nargs="+", default=[0.0], help="rates of codes, in steps of the grid")
    out.add_argument("--updates", type=int, nargs="+", default=[200, 400, 800])
    out.add_argument("--rows", type=int, nargs="+", default=[8])
    out.add_argument("--own", type=int, nargs="+", default=[0])
    out.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    out.add_argument("--windows", type=int, default=100)
    out.add_argument("--articles", type=int, default=100)
    out.add_argument("--chats", type=int, default=100)
    out.add_argument("--deadline", type=float, default=500)
    out.add_argument("--work", type=Path, default=Path("/tmp/end-to-end"))
    out.add_argument("--out", type=Path, help="a folder for copies of the rows")
    found = out.parse_args()
    found.text = found.text or found.data / "wikitext-2" / "wiki.valid.tokens.txt"
    return found


if __name__ == "__main__":
    main()
