"""`compress prune` beside other ways to the same size: depth, width, searched; with and without repair; one table.

    python tests/bench/prune.py [--model FOLDER] [--shares 0.1 0.2 0.3] [--rival PYTHON] [--cache FOLDER]

A size is that of the original without so many blocks as come nearest to a share of its parameters; width and search are
given the same size, width the nearest that multiples allow, search at most that many parameters. Beside them, nothing
refitted: the blocks of least influence, all at once (ShortGPT), blocks at random (three seeds), and with --rival, an
interpreter with tests/bench/quantizers/torchpruning.txt, Torch-Pruning by weights' norms and by Taylor expansion, of
the MLPs alone and as its own example for language models does it. All are given the same calibration rows: those of the
text and as many sampled from the model itself, which `compress prune` takes by default (--self-samples 0: the text
alone).

Every row is a folder that plain transformers loads; perplexity and KL from the original are over the first windows of
512 tokens of texts that nothing was chosen by, float32, without BOS. Rise: perplexity less the original's, and its
ratio to the rise of the one-shot removal. The last lines hold the rises against the targets. What matters most is
measured first, for all sizes, in the order of --shares; a row that would not be done within --deadline seconds, by how
long others took, is left out and named. Rows are kept in --cache, so that the same command goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(BENCH)]

from pool import RunFailed, environment, log, run_child  # noqa: E402

if TYPE_CHECKING:
    from compress.calibration_rows import Rows
    from compress.prune.prune_stage import PruneRequest

WINDOW = 512
SEEDS = (0, 1, 2)
RIVALS = {  # importance, scope
    "Torch-Pruning l2, MLP": ("l2", "mlp"),
    "Torch-Pruning Taylor, MLP": ("taylor", "mlp"),
    "Torch-Pruning l2, as its example": ("l2", "all"),
}
# What a row is expected to take before one of its kind was made, seconds; "searched" judges many shapes.
FIRST_TAKES = {"searched": 60.0}
# Rises over others, at most: what is divided by what, and the target.
TARGETS = (
    ("searched / one-shot influence", "searched", ("least influence, one shot",), 0.5),
    ("depth, repaired / not", "depth", ("depth, no repair",), 0.6),
    ("width, repaired / not", "width", ("width, no repair",), 0.6),
    ("searched, repaired / not", "searched", ("searched, no repair",), 0.6),
    ("searched / best of Torch-Pruning", "searched", tuple(RIVALS), 1.0),
)
Row = dict[str, Any]
Make = Callable[[Path], Row]


class Size(NamedTuple):
    """Blocks that a model of this size lacks, its parameters, and the intermediate width that comes nearest to it."""

    blocks: int
    parameters: int
    intermediate: int


class Bench:
    """The original, its texts, and the rows that were measured."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        from transformers import AutoTokenizer

        from compress.model import StreamedModel
        from compress.prune.shape import shape_of

        self.options, self.scratch = options, scratch
        self.until = math.inf if options.deadline is None else time.monotonic() + options.deadline
        self.took: dict[str, float] = {}
        self.left_out: list[str] = []
        self.encode = AutoTokenizer.from_pretrained(options.model)
        self.texts = {name: self.windows(path) for name, path in options.text}
        self.streamed = StreamedModel.open(options.model)
        self.shape = shape_of(self.streamed)
        self.original = load(options.model, options.device)
        self.base = {name: judge(self.original, None, w, options.device) for name, w in self.texts.items()}
        self.rows = calibration_rows(self)
        self.ids = scratch / "ids.npy"
        self.rows_NT = mingled(self.rows)  # of which some may take the first only
        self.settings = {
            "model": sha256(*sorted(options.model.glob("*.safetensors"))),
            "texts": {name: digest(windows) for name, windows in self.texts.items()},
            "calibration": digest(self.rows.ids_NT), "own": self.rows.num_own, "device": options.device,
            "dtype": options.dtype, "candidates": options.candidates,
        }  # fmt: skip

    def windows(self, path: Path) -> Tensor:
        lines = [line + "\n" for line in path.read_text(encoding="utf-8").split("\n")]
        ids = [i for line in self.encode(lines, add_special_tokens=False)["input_ids"] for i in line]
        return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)[: self.options.windows]

    def sizes(self) -> list[Size]:
        """One for each share, without repeats."""
        from dataclasses import replace

        from compress.prune.search import choices
        from compress.prune.shape import Counter

        counter, old = Counter(self.streamed), self.shape
        whole, block = counter.parameters(old), counter.parts(old)[1]
        out: dict[int, Size] = {}
        for share in self.options.shares:
            gone = max(1, round(share * whole / block))
            size = counter.parameters(replace(old, blocks=old.blocks - gone))
            widths = [s for s in choices(old)["intermediate"] if s != old]
            nearest = min(widths, key=lambda s: abs(counter.parameters(s) - size))
            out[gone] = Size(gone, size, nearest.intermediate)
        return list(out.values())

    def measured(self, name: str, code: str, make: Make) -> Row | None:
        """The row of this name: from the cache, or made now; None where it would not be done in time."""
        settings = {**self.settings, "code": code}
        path = self.options.cache / f"{name.replace(' ', '_').replace(',', '')}.json"
        if path.exists() and (row := json.loads(path.read_text()))["settings"] == settings:
            return dict(row)
        kind = name.rpartition(" -")[0]
        takes = self.took.get(kind, FIRST_TAKES.get(kind, 15.0))
        if time.monotonic() + takes > self.until:
            self.left_out.append(name)
            return None
        out = self.scratch / "out"
        shutil.rmtree(out, ignore_errors=True)
        started = time.monotonic()
        row = {"name": name, "settings": settings}
        try:
            row |= make(out)
            row["seconds"] = time.monotonic() - started
            row |= self.judged(out)
        except (RunFailed, OSError, RuntimeError, ValueError) as e:  # a rival that fails is a row as well
            if not name.startswith("Torch-Pruning"):
                raise
            if time.monotonic() > self.until:  # stopped by us: no row
                self.left_out.append(name)
                return None
            row["failed"] = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        self.took[kind] = time.monotonic() - started
        shutil.rmtree(out, ignore_errors=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(row))
        temporary.replace(path)
        log(line(row, None))
        return row

    def judged(self, folder: Path) -> Row:
        """Parameters of the folder as transformers loads it; of each text the NLL and KL of each window."""
        model = load(folder, self.options.device)
        count = sum({id(p): p.numel() for p in model.parameters()}.values())
        texts = {n: judge(model, self.original, w, self.options.device) for n, w in self.texts.items()}
        found = {
            name: {
                "ppl": math.exp(statistics.mean(t["nll"])),
                "base": math.exp(statistics.mean(self.base[name]["nll"])),
                "kl": statistics.mean(t["kl"]),
                "kl_error": statistics.stdev(t["kl"]) / len(t["kl"]) ** 0.5,
            }
            for name, t in texts.items()
        }
        return {"parameters": count, "texts": found}


# ---- what is measured ----------------------------------------------------------------------------------


def load(folder: Path, device: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    return model


@torch.inference_mode()
def judge(model: nn.Module, original: nn.Module | None, windows: Tensor, device: str) -> dict[str, list[float]]:
    """Of each window the mean NLL of its predicted tokens, and the mean KL from the original's predictions."""
    out: dict[str, list[float]] = {"nll": [], "kl": []}
    for batch in windows.split(8 if device.startswith("cuda") else 2):
        ids = batch.to(device)
        log_q = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        out["nll"] += (-log_q.gather(2, ids[:, 1:, None])).mean((1, 2)).tolist()
        if original is not None:
            log_p = original(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            out["kl"] += (log_p.exp() * (log_p - log_q)).sum(-1).mean(1).tolist()
    return out


def request_of(options: argparse.Namespace, out: Path, asked: Mapping[str, Any], *, repair: bool) -> PruneRequest:
    from compress.devices import pick_dtype
    from compress.prune.decide import Asked
    from compress.prune.prune_stage import PruneRequest
    from compress.workspace import resolve

    return PruneRequest(
        source=resolve(str(options.model)), out=out, asked=Asked(**asked), calib=str(options.calib), repair=repair,
        samples=options.samples, seq_len=options.seq_len, self_samples=options.self_samples, device=options.device,
        dtype=pick_dtype(options.dtype, options.device), force=True,
    )  # fmt: skip


def calibration_rows(bench: Bench) -> Rows:
    """The rows that `compress prune` takes, sampled once for all rows of the table and kept in the cache."""
    import pickle

    from compress.calibration_rows import read_rows
    from compress.model import StreamedModel

    options = bench.options
    text = request_of(options, Path("unused"), {"depth": "1"}, repair=True).job().text
    name = hashlib.sha256(f"{text} {options.device} {sha256(*sorted(options.model.glob('*.safetensors')))}".encode())
    kept = options.cache / f"rows-{name.hexdigest()[:16]}.pickle"
    if kept.exists():
        found: Rows = pickle.loads(kept.read_bytes())
        return found
    rows = read_rows(text, StreamedModel.open(options.model, device=options.device), is_reference=False)
    kept.write_bytes(pickle.dumps(rows))
    return rows


def mingled(rows: Rows) -> Tensor:
    """All rows, one of the text and one of the model's own in turn as long as there are both."""
    text_NT, own_NT = rows.text.ids_NT, rows.ids_NT[len(rows.text.ids_NT) :]
    few = min(len(text_NT), len(own_NT))
    pairs = torch.stack([text_NT[:few], own_NT[:few]], 1).flatten(0, 1)
    return torch.cat([pairs, text_NT[few:], own_NT[few:]])


# ---- ways to prune -------------------------------------------------------------------------------------


def ours(bench: Bench, asked: Mapping[str, Any], repair: bool, out: Path) -> Row:
    from compress.prune.prune_stage import prune

    record = prune(request_of(bench.options, out, asked, repair=repair), rows=bench.rows).record
    return {
        "shape": record["shape"]["after"], "kept_blocks": record["kept_blocks"], "search": record["search"],
        "held_out": record["divergence"],
    }  # fmt: skip


def write_without(bench: Bench, gone: Sequence[int], out: Path) -> Row:
    """The model without some blocks and nothing else changed, by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(bench.options.model, dtype="auto")
    name, blocks = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    kept = [i for i in range(len(blocks)) if i not in gone]
    model.set_submodule(name, nn.ModuleList(blocks[i] for i in kept))
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(bench.options.model).save_pretrained(out)
    return {"kept_blocks": kept}


def least_influence(bench: Bench, count: int, out: Path) -> Row:
    """Block influence (arXiv:2403.03853), measured once: one less the mean cosine of a block's input and output."""
    blocks = next(m for m in bench.original.modules() if isinstance(m, nn.ModuleList))
    turned = [0.0] * len(blocks)

    def note(index: int) -> Callable[..., None]:
        def take(_: nn.Module, args: tuple[Tensor, ...], y: Any) -> None:
            after = y[0] if isinstance(y, tuple) else y
            turned[index] += float((1 - torch.cosine_similarity(args[0].float(), after.float(), dim=-1)).sum())

        return take

    handles = [block.register_forward_hook(note(i)) for i, block in enumerate(blocks)]
    with torch.inference_mode():
        for rows in bench.rows_NT.split(4):
            bench.original(rows.to(bench.options.device), use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    order = sorted(range(len(blocks)), key=lambda i: (turned[i], i))
    return write_without(bench, order[:count], out)


def at_random(bench: Bench, count: int, seed: int, out: Path) -> Row:
    gone = torch.randperm(bench.shape.blocks, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return write_without(bench, gone, out)


def torch_pruning(bench: Bench, importance: str, scope: str, parameters: int, out: Path) -> Row:
    import numpy as np

    np.save(bench.ids, bench.rows_NT.numpy())
    script = BENCH / "quantizers" / "run_torch_pruning.py"
    command = [str(bench.options.rival), str(script), str(bench.options.model), str(out), str(bench.ids)]
    command += ["--importance", importance, "--scope", scope, "--parameters", str(parameters)]
    done = run_child(command, cwd=bench.scratch, environment=environment(torch.get_num_threads()),
                     until=None if bench.until == math.inf else bench.until)  # fmt: skip
    found: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def ways(bench: Bench, size: Size) -> list[tuple[str, str, Make]]:
    """Every way to one size but the searched shape without repair; what matters most first."""
    own, here = own_code(), sha256(Path(__file__))
    rival = sha256(BENCH / "quantizers" / "run_torch_pruning.py")
    neurons = str(bench.shape.intermediate - size.intermediate)
    goal = {"params": size.parameters, "candidates": bench.options.candidates}
    out: list[tuple[str, str, Make]] = [
        ("least influence, one shot", here, partial(least_influence, bench, size.blocks)),
        ("searched", own, partial(ours, bench, goal, True)),
    ]
    for repair in (True, False):
        how = "" if repair else ", no repair"
        out.append((f"depth{how}", own, partial(ours, bench, {"depth": str(size.blocks)}, repair)))
        out.append((f"width{how}", own, partial(ours, bench, {"intermediate": neurons}, repair)))
    rivals = [
        (name, rival, partial(torch_pruning, bench, importance, scope, size.parameters))
        for name, (importance, scope) in RIVALS.items()
        if bench.options.rival
    ]
    at_seeds = [(f"blocks at random, seed {s}", here, partial(at_random, bench, size.blocks, s)) for s in SEEDS]
    return [*out, *rivals, *at_seeds]


def own_code() -> str:
    return sha256(*sorted((ROOT / "compress/prune").glob("*.py")), ROOT / "compress/blocks.py")


def without_repair(bench: Bench, size: Size, searched: Row) -> Row | None:
    """The shape that a search found, nothing refitted."""
    shape = searched["shape"]
    amounts = {
        key: str(getattr(bench.shape, field) - shape[field])
        for key, field in (("depth", "blocks"), ("intermediate", "intermediate"), ("hidden", "hidden"))
        if getattr(bench.shape, field) != shape[field]
    }
    if shape["kv_heads"] != bench.shape.kv_heads:
        amounts["kv_heads"] = str(bench.shape.kv_heads - shape["kv_heads"])
    elif shape["heads"] != bench.shape.heads:
        amounts["heads"] = str(bench.shape.heads - shape["heads"])
    code = f"{own_code()} {sorted(amounts.items())}"
    return bench.measured(f"searched, no repair -{size.blocks}", code, partial(ours, bench, amounts, False))


def all_rows(bench: Bench, sizes: Sequence[Size]) -> dict[Size, list[Row]]:
    """Every way to every size that there is time for; `--json` is written after each."""
    rows: dict[Size, list[Row]] = {size: [] for size in sizes}
    for turn in zip(*(ways(bench, size) for size in sizes), strict=True):
        for size, (name, code, make) in zip(sizes, turn, strict=True):
            if bench.options.only not in name:
                continue
            row = bench.measured(f"{name} -{size.blocks}", code, make)
            found = [row, without_repair(bench, size, row) if row and name == "searched" else None]
            rows[size] += [one for one in found if one is not None]
            if bench.options.json:
                made = {"settings": bench.settings, "rows": sum(rows.values(), []), "left_out": bench.left_out}
                bench.options.json.write_text(json.dumps(made))
    return rows


# ---- what is said --------------------------------------------------------------------------------------


def line(row: Row, shot: Row | None) -> str:
    if "failed" in row:
        return f"| {row['name']} | | failed: {row['failed']} |"
    cells = [row["name"], f"{row['parameters'] / 1e6:.2f}"]
    for name, found in row["texts"].items():
        rise = found["ppl"] - found["base"]
        against = ""
        if shot is not None:
            other = shot["texts"][name]
            against = f" ({rise / (other['ppl'] - other['base']):.3f})"
        cells += [f"{found['ppl']:.2f}", f"{rise:.2f}{against}", f"{found['kl']:.4f} +- {found['kl_error']:.4f}"]
    return "| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |"


def table(bench: Bench, sizes: Sequence[Size], rows: Mapping[Size, Sequence[Row]]) -> str:
    names = list(bench.texts)
    head = ["", "parameters, M", *(f"{n}: {what}" for n in names for what in ("perplexity", "rise", "KL")), "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    base = [f"{math.exp(statistics.mean(bench.base[n]['nll'])):.2f} | | " for n in names]
    whole = sum({id(p): p.numel() for p in bench.original.parameters()}.values())
    lines.append(f"| original | {whole / 1e6:.2f} | " + " | ".join(base) + " | |")
    for size in sizes:
        shot = next((r for r in rows[size] if r["name"].startswith("least influence")), None)
        lines.append(f"| **{1 - size.parameters / whole:.1%} of the parameters, or {size.blocks} blocks, gone** |")
        lines += [line(row, shot) for row in rows[size]]
    return "\n".join(lines)


def against_targets(bench: Bench, sizes: Sequence[Size], rows: Mapping[Size, Sequence[Row]]) -> str:
    """Ratios of rises, by size and text; "-" where a row is missing."""
    whole = sum({id(p): p.numel() for p in bench.original.parameters()}.values())
    heads = [f"-{1 - size.parameters / whole:.0%} {text}" for size in sizes for text in bench.texts]
    lines = ["", f"| ratio of rises | target | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for said, name, others, target in TARGETS:
        cells = [
            _ratio(rows[size], f"{name} -{size.blocks}", [f"{other} -{size.blocks}" for other in others], text)
            for size in sizes
            for text in bench.texts
        ]
        lines.append(f"| {said} | {'<' if target == 1 else '<='} {target:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(rows: Sequence[Row], name: str, others: Sequence[str], text: str) -> str:
    rises = {r["name"]: r["texts"][text]["ppl"] - r["texts"][text]["base"] for r in rows if "failed" not in r}
    against = [rises[other] for other in others if other in rises]
    return f"{rises[name] / min(against):.3f}" if name in rises and against else "-"


def sha256(*paths: Path) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()


def digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def named_text(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    return name, Path(path).absolute()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "calibration_data/reference_lm")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the texts below")
    parser.add_argument("--calib", type=Path, help="calibration text [DATA/wikitext-2/wiki.valid.tokens.txt]")
    parser.add_argument("--text", type=named_text, action="append", help="NAME=FILE to judge on; may be repeated")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.2, 0.3], help="of the parameters, gone")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--self-samples", type=int, help="rows sampled from the model itself [as many as of the text]")
    parser.add_argument("--candidates", type=int, default=10, help="shapes judged by the search")
    parser.add_argument("--windows", type=int, default=200, help="of 512 tokens, of each text")
    parser.add_argument("--rival", type=Path, help="python of Torch-Pruning's environment")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cache", type=Path, help="folder of finished rows (default: removed at the end)")
    parser.add_argument("--deadline", type=float, help="seconds, after which no row is begun")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data: Path = options.data
    options.calib = options.calib or data / "wikitext-2/wiki.valid.tokens.txt"
    texts = [("wiki", data / "wikitext-2/wiki.test.raw"), ("novels", data / "novels-heldout.txt")]
    options.text = options.text or texts
    options.model = options.model.absolute()
    with tempfile.TemporaryDirectory(prefix="prune-") as temporary:
        options.cache = options.cache or Path(temporary) / "cache"
        options.cache.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, Path(temporary))
        sizes = bench.sizes()
        rows = all_rows(bench, sizes)
    print(table(bench, sizes, rows))
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    text = (
        f"{len(bench.rows.text.ids_NT)} rows of the text and {bench.rows.num_own} of its own, {options.seq_len} tokens"
    )
    print(f"\n{where}; calibrated on {text}; judged on {options.windows} windows of {WINDOW} of each text")
    if bench.left_out:
        print(f"not done within --deadline {options.deadline:g}, run it again: {', '.join(bench.left_out)}")
    print(against_targets(bench, sizes, rows))


if __name__ == "__main__":
    main()
