"""Distillation on a GPU: memory of the loss, speed, recovery of a pruned model, quantization-aware training.

    python tests/bench/distill.py memory                          # of the loss at 128k and 262k entries, and its time
    python tests/bench/distill.py speed --shape 135m 1b           # tokens/s and MFU of a step, teacher included
    python tests/bench/distill.py recover MODEL --minutes 5       # prune -> distill -> INT8, INT4; each step judged
    python tests/bench/distill.py qad MODEL --minutes 3           # codes and scales of an INT4 `best` artifact trained
    python tests/bench/distill.py curve MODEL STUDENT --tokens N ...     # against the text alone, on a CPU

Each prints one JSON line a job and, last, a table. What is finished is kept in `--work`: after `--deadline` seconds a
run writes a checkpoint and ends, and the same command goes on from there. `--out FILE` gets all figures as they come.
`--minutes` of training are turned into tokens by the speed measured before (or say `--tokens`). Texts come from
`--data` (README.md there): training is on Wikipedia articles and on what MODEL writes itself; WikiText-2 test, novels
and LAMBADA judge.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
sys.path[:0] = [str(ROOT), str(BENCH)]  # `compress` and the files beside this one

import torch  # noqa: E402
from training import Facts, Work, carry_out, judged, release, sampled, texts  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {  # SmolLM2-135M's config.json
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "1b": {  # Llama-3.2-1B's config.json
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": True,
    },
}  # fmt: skip


# ---- memory and time of the loss ---------------------------------------------------------------------


def memory(work: Work, options: argparse.Namespace) -> None:
    """Peak memory beyond the inputs and the output matrix's gradient, and the time, of forward and backward."""
    from compress.losses.heads import DenseTeacher, Head

    tokens, width = options.tokens, options.width
    for vocabulary in options.vocabulary:
        torch.manual_seed(0)
        make: dict[str, Any] = {"device": options.device, "dtype": torch.bfloat16}
        hidden = torch.randn(tokens, width, **make).requires_grad_()
        weight = (torch.randn(vocabulary, width, **make).float() / width**0.5).requires_grad_()  # as trained: float32
        teacher = DenseTeacher(
            hidden_PH=torch.randn(tokens, width, **make),
            head=Head(weight_VH=torch.randn(vocabulary, width, **make) / width**0.5),
        )
        for name, way in {**_ways(hidden, weight, teacher), **_liger(hidden, weight, teacher)}.items():
            work.job(
                f"loss {name} V={vocabulary} P={tokens}",
                lambda w=way, h=hidden, m=weight: _measured(w, h, m),  # type: ignore[misc]
            )
            release()
        del hidden, weight, teacher
        release()


def _ways(hidden: torch.Tensor, weight: torch.Tensor, teacher: Any) -> dict[str, Any]:
    """Mean forward KL: in blocks as it is trained with, plain or compiled, and on whole logits."""
    from compress.distill import at_once
    from compress.losses.heads import Head
    from compress.losses.in_blocks import Objective, losses

    half = torch.autocast(hidden.device.type, torch.bfloat16)
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    each = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)

    def blocks(fuse: bool) -> torch.Tensor:
        with half:
            return losses(hidden, Head(weight_VH=weight), teacher, None, Objective(), fuse=fuse)[0].mean()

    def once(fuse: bool) -> torch.Tensor:
        counts = at_once.Weights(divergence_P=each, cross_entropy_P=None)
        with half:
            return at_once.total(hidden, Head(weight_VH=weight), teacher, labels, Objective(), counts, fuse=fuse)[0]

    def plain() -> torch.Tensor:
        log_q = (hidden @ weight.to(hidden.dtype).t()).float().log_softmax(-1)
        log_p = (teacher.hidden_PH @ teacher.head.weight_VH.t()).float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    return {
        "at once, compiled": lambda: once(True),
        "at once": lambda: once(False),
        "blocks, compiled": lambda: blocks(True),
        "blocks": lambda: blocks(False),
        "plain": plain,
    }


def _liger(hidden: torch.Tensor, weight: torch.Tensor, teacher: Any) -> dict[str, Any]:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        return {}
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=1.0)
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    own = teacher.head.weight_VH
    return {"liger": lambda: loss(hidden, weight.to(hidden.dtype), teacher.hidden_PH, own, labels)}


def _measured(way: Any, hidden: torch.Tensor, weight: torch.Tensor) -> Facts:
    value, peak, times = 0.0, 0, []
    on_gpu = hidden.is_cuda
    try:
        for _ in range(5):
            hidden.grad = weight.grad = None
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            out = way()
            out.backward()
            value = float(out.detach())
            if on_gpu:
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() - before - weight.nbytes
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        hidden.grad = weight.grad = None
    return {"peak_MB": round(peak / 1e6, 1), "ms": round(1e3 * sorted(times)[2], 2), "value": value}


# ---- speed -------------------------------------------------------------------------------------------


def speed(work: Work, options: argparse.Namespace) -> None:
    """`compress distill` of a model of random weights on itself and random text; one process or several."""
    for shape in options.shape:
        for processes in options.processes:
            for more in ([], ["--no-compile"]) if options.plain else ([],):
                name = " ".join(["speed", shape, *(["plain"] * bool(more)), *([str(processes)] * (processes > 1))])
                work.job(name, lambda s=shape, p=processes, m=more: _speed(work, options, s, p, m))  # type: ignore[misc]


def _speed(work: Work, options: argparse.Namespace, shape: str, processes: int, more: Sequence[str]) -> Facts:
    sizes = SHAPES[shape]
    tokens = options.steps * options.batch * options.seq_len
    with tempfile.TemporaryDirectory(dir=work.folder) as scratch:
        folder = Path(scratch)
        model = random_model(folder / "model", sizes, options.device)
        text = random_text(folder / "text.jsonl", sizes["vocab_size"], tokens)
        found = work.compress(
            "distill", "--teacher", model, "--student", model, "--data", text, "--seq-len", options.seq_len, "--batch",
            options.batch, "--micro-batch", options.micro_batch, "--tokens", tokens, "--device", options.device,
            "-o", folder / "out", *more, processes=processes,
        )  # fmt: skip
    return {
        "shape": shape, "processes": processes, "engine": found["record"]["engine"]["kind"],
        "tokens_per_second": found["tokens_per_second"], "mfu": found["mfu"], "seconds": found["wall_seconds"],
        "gflop_per_token": found["record"]["flops_per_token"] / 1e9, "peak_GB": found["peak_gpu_bytes"] / 1e9,
        "steps": options.steps, "tokens_a_step": options.batch * options.seq_len,
    }  # fmt: skip


def random_model(folder: Path, shape: dict[str, Any], device: str) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(**shape, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1)
    config.dtype = "bfloat16"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    del model
    release()
    words = {f"t{i}": i for i in range(shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="t1").save_pretrained(folder)
    return folder


def random_text(path: Path, vocabulary: int, tokens: int) -> Path:
    ids = torch.randint(2, vocabulary, (tokens + 8192,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = (ids[i : i + 4096] for i in range(0, len(ids), 4096))
    path.write_text("".join(json.dumps({"text": " ".join(f"t{i}" for i in row)}) + "\n" for row in rows))
    return path


# ---- recovery of a pruned model ------------------------------------------------------------------------


def recover(work: Work, options: argparse.Namespace) -> None:
    """Prune by search, distil, then INT8 and INT4; size, perplexities, LAMBADA and verdict after each."""
    model, folder = options.model, work.folder
    train, watched = texts(work, options.data)
    own = sampled(work, model, options.self_rows, at_once=options.at_once, device=options.device)
    judged(work, "original", model, model, options)
    made = {name: folder / name for name in ("pruned", "distilled", "int8", "int4")}

    def prune() -> Facts:
        found = work.compress(
            "prune", model, "--params", options.params, "--candidates", options.candidates, "--calib", train,
            "--samples", options.samples, "--device", options.device, "-o", made["pruned"], "--force",
        )  # fmt: skip
        record = found["record"]
        return {key: record[key] for key in ("shape", "num_parameters", "seconds") if key in record}

    work.job("prune", prune)
    judged(work, "pruned", made["pruned"], model, options)
    tokens = options.tokens or _tokens_of(work, options)
    work.job(
        "distill",
        lambda: _train(
            work, options, model, made["pruned"], made["distilled"], tokens, [train, own, watched], options.lr or 1e-3
        ),
    )
    judged(work, "distilled", made["distilled"], model, options)
    for name, stage in (("int8", ["int8"]), ("int4", ["awq", "--group-size", "64"])):
        command = [*stage, made["distilled"], "--calib", train, "--samples", options.samples, "--device"]
        work.job(name, lambda n=name, c=command: _artifact(work, [*c, options.device, "-o", made[n], "--force"]))  # type: ignore[misc]
        judged(work, name, made[name], model, options)


def _artifact(work: Work, command: Sequence[object]) -> Facts:
    found = work.compress(*command)
    return {"seconds": found.get("seconds")}


def _tokens_of(work: Work, options: argparse.Namespace) -> int:
    """Tokens for so many minutes, at the speed of `speed 135m` in the same folder."""
    known = work.results.get("speed 135m")
    if known is None:
        raise SystemExit("pass --tokens N, or run `speed --shape 135m` with the same --work before")
    return int(60 * options.minutes * known["tokens_per_second"])


def _train(
    work: Work,
    options: argparse.Namespace,
    teacher: Path,
    student: Path,
    out: Path,
    tokens: int,
    read: Sequence[Path],
    rate: float,
    *more: object,
) -> Facts:
    """`compress distill` on Wikipedia and sampled text, three to one. read: those two and the watched text."""
    train, own, watched = read
    size = options.batch * 512
    epochs = max(1, math.ceil(tokens / options.unique))
    found = work.compress(
        "distill", "--teacher", teacher, "--student", student, "--data", train, "--data", own, "--mix", options.mix,
        "--tokens", tokens // size * size, "--epochs", epochs, "--batch", options.batch, "--lr", rate, "--watch",
        watched, "--watch-tokens", options.watch_tokens, "--patience", "99", "--checkpoint-minutes", "1.5", "--device",
        options.device, "-o", out, *more,
    )  # fmt: skip
    record = found["record"]
    return {
        "tokens": record["tokens"], "steps": record["steps"], "epochs": epochs, "rate": rate,
        "tokens_per_second": found["tokens_per_second"], "mfu": found["mfu"], "peak_GB": found["peak_gpu_bytes"] / 1e9,
        "seconds": found["wall_seconds"], "kept_step": record["kept_step"],
        "looks": [[w["step"], round(w["divergence"], 5), round(w["perplexity"], 4)] for w in record["watch"]["looks"]],
    }  # fmt: skip


# ---- quantization-aware --------------------------------------------------------------------------------


def qad(work: Work, options: argparse.Namespace) -> None:
    """An INT4 artifact, then its codes and scales trained: short runs choose the rate, a long one is judged."""
    model, folder = options.model, work.folder
    train, watched = texts(work, options.data)
    own = sampled(work, model, options.self_rows, at_once=options.at_once, device=options.device)
    judged(work, "original", model, model, options)
    start = folder / f"start-{options.effort}"
    calibration = options.data / "wikitext-2/wiki.valid.tokens.txt"
    work.job(
        f"int4 {options.effort}",
        lambda: _artifact(
            work,
            ["awq", model, "--group-size", "64", "--effort", options.effort, "--calib", calibration, "--samples",
             options.samples, "--seq-len", "512", "--device", options.device, "-o", start, "--force"],
        ),
    )  # fmt: skip
    judged(work, f"int4 {options.effort}", start, model, options)
    read = [train, own, watched]
    rates = [options.lr] if options.lr else options.rates
    for rate in rates if len(rates) > 1 else ():
        work.job(
            f"qad short {rate:g}",
            lambda r=rate: _train(  # type: ignore[misc]
                work, options, model, start, folder / f"qad-{r:g}", options.short, read, r, "--scheme", "w4a16",
                "--watch-every", "100000",
            ),
        )  # fmt: skip
    shorts = {rate: work.results[f"qad short {rate:g}"] for rate in rates if f"qad short {rate:g}" in work.results}
    best = min(shorts, key=lambda rate: shorts[rate]["looks"][-1][1]) if shorts else rates[0]
    speeds = [s["tokens_per_second"] for s in shorts.values() if s["tokens_per_second"]]
    tokens = options.tokens or (int(60 * options.minutes * max(speeds)) if speeds else _tokens_of(work, options))
    out = folder / f"qad-long-{best:g}"
    name = f"qad long {best:g}"
    work.job(name, lambda: _train(work, options, model, start, out, tokens, read, best, "--scheme", "w4a16"))
    judged(work, name, out, model, options)


# ---- against the text alone ----------------------------------------------------------------------------


def curve(work: Work, options: argparse.Namespace) -> None:
    """The same student, rows and rates, learning from its teacher and from the text alone; looked at together."""
    size = options.batch * options.seq_len
    steps = options.tokens // size
    for loss in ("forward-kl", "cross-entropy"):

        def make(loss: str = loss) -> Facts:
            found = work.compress(
                "distill", "--teacher", options.model, "--student", options.student, "--loss", loss, "--data",
                options.train, "--watch", options.watch, "--tokens", steps * size, "--batch", options.batch,
                "--seq-len", options.seq_len, "--lr", options.lr or 1e-3, "--watch-every",
                max(1, -(-steps // options.looks)), "--watch-tokens", options.watch_tokens, "--patience", "99",
                "--checkpoint-minutes", "3", "--device", options.device, "-o", work.folder / loss,
            )  # fmt: skip
            record = found["record"]
            looks = [[int(w["step"] * size), w["perplexity"]] for w in record["watch"]["looks"]]
            return {"looks": looks, "tokens_per_second": found["tokens_per_second"], "seconds": found["wall_seconds"]}

        work.job(f"curve {loss}", make)
    if options.plot:
        _plot({loss: work.results[f"curve {loss}"]["looks"] for loss in ("forward-kl", "cross-entropy")}, options.plot)


def _plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curve", "axes.grid": True}):
        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        for (loss, looks), label in zip(curves.items(), ("from its teacher", "from the text alone"), strict=True):
            color = "#0072b2" if loss == "forward-kl" else "#d55e00"
            axes.plot([t / 1000 for t, _ in looks], [p for _, p in looks], "o-", label=label, color=color)
        axes.set_xlabel("thousand tokens")
        axes.set_ylabel("perplexity of held-out articles")
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})


# ---- tables ------------------------------------------------------------------------------------------


def print_table(work: Work) -> None:
    """Everything that is in the folder, shortly."""
    results = work.results
    for name, found in results.items():
        if name.startswith("loss "):
            print(f"{name:44} {_cell(found)}")
        if name.startswith("speed "):
            use = "" if found["mfu"] is None else f"  MFU {100 * found['mfu']:.1f} %"
            print(f"{name:24} {found['tokens_per_second']:12,.0f} tokens/s{use}  peak {found['peak_GB']:.1f} GB")
        if "tokens" in found and "looks" in found:
            print(
                f"{name:20} {found['tokens'] / 1e6:.1f} M tokens, {found['seconds']:.0f} s, "
                f"{found['tokens_per_second']:,.0f} tokens/s, watched (step, KL, perplexity) {found['looks'][0]} -> "
                f"{found['looks'][-1]}, step {found['kept_step']} kept"
            )
    rows = {name.removeprefix("judged "): f for name, f in results.items() if name.startswith("judged ")}
    if "original" in rows:
        _print_judged(rows)
    if {"curve forward-kl", "curve cross-entropy"} <= results.keys():
        both = (results["curve forward-kl"]["looks"], results["curve cross-entropy"]["looks"])
        print(f"{'tokens':>10} {'distilled':>10} {'text alone':>10}")
        for (tokens, learned), (_, alone) in zip(*both, strict=True):
            print(f"{tokens:10d} {learned:10.3f} {alone:10.3f}")


def _cell(found: Facts) -> str:
    if "peak_MB" not in found:
        return "out of memory"
    return f"{found['peak_MB']:10.1f} MB  {found['ms']:8.2f} ms  value {found['value']:.6f}"


def _print_judged(rows: dict[str, Facts]) -> None:
    original = rows["original"]
    start = next((f for n, f in rows.items() if n.startswith("int4 b")), None)
    print(f"{'':18} {'MB':>7} {'wiki':>8} {'gap':>7} {'novels':>8} {'gap':>7} {'KL':>7} {'LAMBADA':>8}  gate at 0.98")
    for name, row in rows.items():
        gaps = {text: row[text] - original[text] for text in ("wiki", "novels")}
        metrics = row["metrics"]
        kl = next((v for n, v in metrics.items() if n == "kl_mean"), float("nan"))
        right = next((v for n, v in metrics.items() if "lambada" in n), float("nan"))
        print(
            f"{name:18} {row['model_MB']:7.1f} {row['wiki']:8.3f} {gaps['wiki']:7.3f} {row['novels']:8.3f} "
            f"{gaps['novels']:7.3f} {kl:7.4f} {100 * right:7.2f}%  {row['verdict']} {row['recovery']}"
        )
        if start is not None and name.startswith("qad"):
            shares = {text: gaps[text] / (start[text] - original[text]) for text in gaps}
            print(f"    of its start's gap: wiki {shares['wiki']:.3f}, novels {shares['novels']:.3f}")
    if {"pruned", "distilled"} <= rows.keys():
        for text in ("wiki", "novels"):
            before, after, least = (math.log(rows[n][text]) for n in ("pruned", "distilled", "original"))
            print(
                f"recovered of the damage in log-perplexity, {text}: {100 * (before - after) / (before - least):.1f} %"
            )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="what", required=True)
    one, two = verbs.add_parser("memory"), verbs.add_parser("speed")
    one.add_argument("--tokens", type=int, default=8192)
    one.add_argument("--width", type=int, default=2048)
    one.add_argument("--vocabulary", nargs="+", type=int, default=[131_072, 262_144])
    two.add_argument("--shape", nargs="+", default=["135m", "1b"], choices=list(SHAPES))
    two.add_argument("--processes", nargs="+", type=int, default=[1])
    two.add_argument("--steps", type=int, default=20)
    two.add_argument("--seq-len", type=int, default=2048)
    two.add_argument("--batch", type=int, default=32)
    two.add_argument("--micro-batch", type=int, default=8)
    two.add_argument("--plain", action="store_true", help="without torch.compile as well")
    for name in ("recover", "qad"):
        verb = verbs.add_parser(name)
        verb.add_argument("model", type=Path)
        verb.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the texts")
        verb.add_argument("--minutes", type=float, default=5.0, help="of training, by the speed measured before")
        verb.add_argument("--tokens", type=int, help="to train on, instead")
        verb.add_argument("--unique", type=int, default=10_000_000, help="tokens before they are read again")
        verb.add_argument("--mix", default="3,1", help="of Wikipedia and sampled text")
        verb.add_argument("--batch", type=int, default=64 if name == "recover" else 32)
        verb.add_argument("--lr", type=float)
        verb.add_argument("--self-rows", type=int, default=5120)
        verb.add_argument("--at-once", type=int, default=2560)
        verb.add_argument("--samples", type=int, default=128, help="calibration rows of quantizers and of pruning")
        verb.add_argument("--watch-tokens", type=int, default=65_536)
        verb.add_argument("--windows", type=int, default=200)
        verb.add_argument("--items", type=int, default=2000)
        if name == "recover":
            verb.add_argument("--params", default="60M")
            verb.add_argument("--candidates", type=int, default=10)
        else:
            verb.add_argument("--effort", default="best")
            verb.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
            verb.add_argument("--short", type=int, default=2_000_000, help="tokens of the runs that choose the rate")
    last = verbs.add_parser("curve")
    last.add_argument("model", type=Path)
    last.add_argument("student", type=Path)
    last.add_argument("--train", type=Path, required=True)
    last.add_argument("--watch", type=Path, required=True)
    last.add_argument("--tokens", type=int, required=True)
    last.add_argument("--batch", type=int, default=8)
    last.add_argument("--seq-len", type=int, default=256)
    last.add_argument("--lr", type=float)
    last.add_argument("--looks", type=int, default=5)
    last.add_argument("--plot", type=Path, help="SVG file")
    last.add_argument("--watch-tokens", type=int, default=16_384)
    for verb in verbs.choices.values():
        verb.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "distill-bench")
        verb.add_argument("--out", type=Path, help="copy of the figures, written as they come")
        verb.add_argument(
            "--deadline", type=float, default=1e9, help="seconds after which a run ends, to be gone on with"
        )
        verb.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    work = Work(options.work.absolute(), options.out, options.deadline)
    verbs = {"memory": memory, "speed": speed, "recover": recover, "qad": qad, "curve": curve}
    carry_out(verbs[options.what], work, options)
    print_table(work)


if __name__ == "__main__":
    main()
