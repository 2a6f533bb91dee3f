"""Distillation on a GPU: speed, memory of the loss, recovery of a pruned model, quantization-aware training.

    python tests/bench/distill.py memory                                  # of the loss at 128k and 262k entries, its
    time python tests/bench/distill.py speed --shape 135m 1b [--processes 2]   # tokens/s and MFU of a step, teacher
    included python tests/bench/distill.py recover MODEL STUDENT --data TEXT --watch TEXT --tokens N --out FOLDER
    python tests/bench/distill.py qad MODEL ARTIFACT --data TEXT --watch TEXT --tokens N --out FOLDER [--lr ...]
    python tests/bench/distill.py judge MODEL CANDIDATE... --text TEXT... [--windows 200]

Each prints one JSON line a measurement. `recover` and `qad` run `compress distill` and then `judge`. Perplexity is over
the first windows of 512 tokens of a text, float32, without BOS, as `shared/models/README.md` measures it. A run that is
cut off goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

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


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


# ---- memory and time of the loss ---------------------------------------------------------------------


def memory(arguments: argparse.Namespace) -> None:
    """Peak memory beyond the inputs and the output matrix's gradient, and the time, of forward and backward."""
    from compress.distill.heads import DenseTeacher, Head

    tokens, width = arguments.tokens, arguments.width
    for vocabulary in (131_072, 262_144):
        torch.manual_seed(0)
        make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        hidden = torch.randn(tokens, width, **make).requires_grad_()
        weight = (torch.randn(vocabulary, width, **make) / width**0.5).requires_grad_()
        teacher = DenseTeacher(
            hidden_PH=torch.randn(tokens, width, **make),
            head=Head(weight_VH=torch.randn(vocabulary, width, **make) / width**0.5),
        )
        for name, way in {**_ways(hidden, weight, teacher), **_liger(hidden, weight, teacher)}.items():
            facts = {"what": "loss", "way": name, "vocabulary": vocabulary, "tokens": tokens, "width": width}
            try:
                say(**facts, **_measured(way, hidden, weight))
            except torch.cuda.OutOfMemoryError:
                say(**facts, out_of_memory=True)
            torch.cuda.empty_cache()


def _ways(hidden: torch.Tensor, weight: torch.Tensor, teacher: Any) -> dict[str, Any]:
    """Mean forward KL: in blocks as it is trained with, plain or compiled, and on whole logits."""
    from compress.distill.heads import Head
    from compress.distill.losses import Objective, losses

    def own(fuse: bool) -> torch.Tensor:
        return losses(hidden, Head(weight_VH=weight), teacher, None, Objective(), fuse=fuse)[0].mean()

    def plain() -> torch.Tensor:
        log_q = (hidden @ weight.t()).float().log_softmax(-1)
        log_p = (teacher.hidden_PH @ teacher.head.weight_VH.t()).float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    return {"blocks": lambda: own(False), "blocks, compiled": lambda: own(True), "plain": plain}


def _liger(hidden: torch.Tensor, weight: torch.Tensor, teacher: Any) -> dict[str, Any]:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        return {}
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=1.0)
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return {"liger": lambda: loss(hidden, weight, teacher.hidden_PH, teacher.head.weight_VH, labels)}


def _measured(way: Any, hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    value = 0.0
    times = []
    for _ in range(5):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        out = way()
        out.backward()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() - before - weight.nbytes
        value = float(out.detach())
    return {"peak_MB": round(peak / 1e6, 1), "ms": round(1e3 * sorted(times)[2], 2), "value": value}


# ---- speed -------------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace) -> None:
    """`compress distill` of a model of random weights on itself and random text; one process or several."""
    for shape in arguments.shape:
        for processes in arguments.processes:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                model = random_model(folder / "model", SHAPES[shape])
                text = random_text(folder / "text.jsonl", SHAPES[shape]["vocab_size"], arguments.tokens)
                found = _distill(
                    processes,
                    ["--teacher", str(model), "--student", str(model), "--data", str(text), "--seq-len", "2048",
                     "--batch", str(arguments.batch), "--micro-batch", str(arguments.micro_batch),
                     "--tokens", str(arguments.tokens), "-o", str(folder / "out"), *arguments.more],
                )  # fmt: skip
                say(
                    what="speed", shape=shape, processes=processes, engine=found["record"]["engine"]["kind"],
                    tokens_per_second=found["tokens_per_second"], mfu=found["mfu"],
                    flops_per_token=found["record"]["flops_per_token"], peak_gpu_bytes=found["peak_gpu_bytes"],
                )  # fmt: skip


def random_model(folder: Path, shape: dict[str, Any]) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(**shape, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1)
    config.dtype = "bfloat16"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
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


def _distill(processes: int, arguments: list[str]) -> dict[str, Any]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "compress", "distill", *arguments, "--json"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {found.returncode}")
    result: dict[str, Any] = json.loads(found.stdout[found.stdout.index("{") :])
    return result


# ---- recovery and quantization-aware training ----------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    """`compress distill` of STUDENT on MODEL, then both judged on the texts."""
    out = Path(arguments.out)
    more = ["--lr", str(arguments.lr)] if arguments.lr else []
    if arguments.what == "qad":
        more += ["--scheme", arguments.scheme]
    data = [x for text in arguments.data for x in ("--data", text)]
    watch = ["--watch", arguments.watch] if arguments.watch else []
    started = time.perf_counter()
    if not out.exists():
        found = _distill(
            arguments.processes[0],
            ["--teacher", arguments.model, "--student", arguments.student, *data, *watch, "--epochs",
            str(arguments.epochs), "--tokens", str(arguments.tokens), "--seq-len", str(arguments.seq_len), "--batch",
            str(arguments.batch), "-o", str(out), "--report", f"{out}-report", "--checkpoint-minutes", "2", *more,
            *arguments.more],
        )  # fmt: skip
        say(
            what=arguments.what, out=str(out), seconds=time.perf_counter() - started, mfu=found["mfu"],
            tokens_per_second=found["tokens_per_second"], looks=(found["record"]["watch"] or {}).get("looks"),
        )  # fmt: skip
    arguments.candidates = [arguments.student, str(out)]
    judge(arguments)


def judge(arguments: argparse.Namespace) -> None:
    """Perplexity of models on the first windows of each text."""
    from compress.distill import models
    from compress.tokens import load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(Path(arguments.model))
    for folder in [arguments.model, *arguments.candidates]:
        loaded = models.load(Path(folder), dtype=torch.float32, device=device)
        for text in arguments.text:
            ids = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
            count = min(arguments.windows, len(ids) // 512)
            rows = torch.tensor(ids[: count * 512]).view(count, 512).to(device)
            say(
                what="perplexity",
                model=str(folder),
                text=Path(text).name,
                windows=count,
                value=perplexity(loaded, rows),
            )
        del loaded


@torch.no_grad()
def perplexity(loaded: Any, rows_NT: torch.Tensor) -> float:
    from compress.distill.losses import Objective, losses
    from compress.distill.models import head_of

    total = 0.0
    for row in rows_NT.split(8):
        hidden = loaded.base(input_ids=row, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        total += float(losses(hidden, head_of(loaded), None, row[:, 1:].flatten(), Objective())[1].double().sum())
    return float(torch.tensor(total / (rows_NT.shape[0] * (rows_NT.shape[1] - 1))).exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="what", required=True)
    one = verbs.add_parser("memory")
    one.add_argument("--tokens", type=int, default=8192)
    one.add_argument("--width", type=int, default=2048)
    two = verbs.add_parser("speed")
    two.add_argument("--shape", nargs="+", default=["135m", "1b"])
    two.add_argument("--processes", nargs="+", type=int, default=[1])
    two.add_argument("--tokens", type=int, default=2048 * 32 * 20)
    two.add_argument("--batch", type=int, default=32)
    two.add_argument("--micro-batch", type=int, default=8)
    two.add_argument("--more", nargs=argparse.REMAINDER, default=[])
    for name in ("recover", "qad"):
        verb = verbs.add_parser(name)
        verb.add_argument("model")
        verb.add_argument("student")
        verb.add_argument("--data", action="append", required=True)
        verb.add_argument("--watch")
        verb.add_argument("--tokens", type=int, required=True)
        verb.add_argument("--epochs", type=int, default=1)
        verb.add_argument("--seq-len", type=int, default=512)
        verb.add_argument("--batch", type=int, default=64)
        verb.add_argument("--lr", type=float)
        verb.add_argument("--scheme", default="w4a16")
        verb.add_argument("--processes", nargs=1, type=int, default=[1])
        verb.add_argument("--text", action="append", default=[])
        verb.add_argument("--windows", type=int, default=200)
        verb.add_argument("--out", required=True)
        verb.add_argument("--more", nargs=argparse.REMAINDER, default=[])
    last = verbs.add_parser("judge")
    last.add_argument("model")
    last.add_argument("candidates", nargs="*")
    last.add_argument("--text", action="append", required=True)
    last.add_argument("--windows", type=int, default=200)
    arguments = parser.parse_args()
    {"memory": memory, "speed": speed, "recover": train, "qad": train, "judge": judge}[arguments.what](arguments)


if __name__ == "__main__":
    main()
