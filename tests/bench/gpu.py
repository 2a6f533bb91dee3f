"""How long does one GPU take from a model on disk to a verified artifact on disk, with how much memory?

    python tests/bench/gpu.py [--stage awq|int8|prune] [--shape llama-3-8b] [--blocks N] [--effort fast balanced]
        [--inside | --profile]

Makes a Llama of random weights in the shape of a real one (16-bit, sharded at 5 GB, full vocabulary), drops it from the
page cache, and runs the stage on it in a process of its own with 128 x 512 random token ids. Prints seconds by
stage, peak GPU memory, peak resident memory, and the arithmetic and bytes that the run cannot avoid against what the
same card and disk did when measured just before. With --blocks below the real number, the time of the whole model is
extrapolated from a block's median and said to be.

`--stage prune` takes an eighth of the blocks and a quarter of the neurons out; which blocks go is measured as well, on
8192 of the tokens.

Random weights say nothing about accuracy; shapes, bytes and operations are those of the real model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shape = dict[str, Any]
SHAPES: dict[str, Shape] = {
    # Llama 3 model cards' config.json
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama-3-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M, config.json; its output matrix is its embedding, here it is not
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    # Gemma-3-270M, the config.json that transformers makes of its GGUF file
    "gemma3-270m": {
        "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
        "sliding_window": 512, "tie_word_embeddings": True,
    },
    "small": {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 4096,
    },
}  # fmt: skip
SAMPLES, SEQ_LEN = 128, 512
SHARD_BYTES = 5_000_000_000


# ---- the model and the text --------------------------------------------------------------------------


def build(folder: Path, shape: Shape, device: str) -> None:
    """The model's folder: config, a tokenizer with a word for every id, shards of random bfloat16 weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    options = {"rope_theta": 500000.0, "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(**{"model_type": "llama", **options, **shape})
    config.dtype = "bfloat16"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    _save_tokenizer(folder, shape["vocab_size"])
    generator = torch.Generator(device).manual_seed(0)
    adds_one = shape.get("model_type") == "gemma3_text"  # its norms multiply by 1 + weight

    def made(parameter: Tensor) -> Tensor:
        values = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.ndim == 2:
            return values.mul_(parameter.shape[1] ** -0.5).bfloat16().cpu()
        # A few large channels, as trained norms have, so that smoothing has something to find.
        return values.mul_(0.5).exp_().sub_(float(adds_one)).bfloat16().cpu()

    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    pool = ThreadPoolExecutor(2)
    written = []

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        written.append(pool.submit(save_file, dict(shard), folder / file, {"format": "pt"}))
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, parameter in model.named_parameters():  # a tied output matrix is not among them
        shard[name] = made(parameter)
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()
    for one in written:
        one.result()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _save_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="t1").save_pretrained(folder)


def write_text(path: Path, vocab_size: int, samples: int) -> None:
    ids = torch.randint(0, vocab_size, (samples * SEQ_LEN + 1,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(f"t{i}" for i in ids.tolist()))


def drop_from_page_cache(folder: Path, pattern: str = "*") -> None:
    """Write dirty pages out and ask the kernel to forget the files, so that the run reads from the disk."""
    for path in folder.glob(pattern):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


# ---- ceilings ----------------------------------------------------------------------------------------


def ceilings(folder: Path, device: str) -> dict[str, float]:
    """What this machine does at best: GB/s and TFLOP/s, medians of several runs after a warm-up."""
    out: dict[str, float] = {}
    data = os.urandom(1 << 24)
    started = time.perf_counter()
    for _ in range(16):
        hashlib.sha256(data).digest()
    out["sha256_GBps"] = 16 * len(data) / (time.perf_counter() - started) / 1e9
    path, block = folder / "ceiling.bin", data * 4
    started = time.perf_counter()
    with open(path, "wb") as f:
        for _ in range(32):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
    size = path.stat().st_size
    out["disk_write_GBps"] = size / (time.perf_counter() - started) / 1e9
    drop_from_page_cache(folder, path.name)
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as f:
        while f.read(len(block)):
            pass
    out["disk_read_GBps"] = size / (time.perf_counter() - started) / 1e9
    path.unlink()
    if device == "cuda":
        out.update(_gpu_ceilings())
    return out


def _gpu_ceilings() -> dict[str, float]:
    out: dict[str, float] = {}
    source, pinned = torch.randn(1 << 29, device="cuda"), torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    for name, data, moved in (("copy_GBps", source, 2 * source.nbytes), ("host_to_gpu_GBps", pinned, pinned.nbytes)):
        target = torch.empty_like(data, device="cuda")
        out[name] = moved / _seconds(partial(target.copy_, data, non_blocking=True)) / 1e9
    n = 8192
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        out[f"{name}_TFLOPs"] = 2 * n**3 / _seconds(partial(torch.mm, a, b)) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    return out


def _seconds(work: Callable[[], Any], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times[2:])[repeats // 2]


# ---- what the run cannot avoid -----------------------------------------------------------------------


def counts(shape: Shape, blocks: int, tokens: int, passes: int, stage: str) -> dict[str, float]:
    """Operations and bytes: `passes` forward passes over the tokens, one Gram matrix an input, weights in and out."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head_dim = shape.get("head_dim", hidden // shape["num_attention_heads"])
    queries, kv = (head_dim * shape[f"num_{of}_heads"] for of in ("attention", "key_value"))
    weights = 2 * hidden * queries + 2 * hidden * kv + 3 * hidden * inner
    attention = 2 * SEQ_LEN * queries  # causal: half of q k^T and half of the product with v
    outside = (1 if shape.get("tie_word_embeddings") else 2) * shape["vocab_size"] * hidden
    written = {"awq": weights * (0.5 + 2.5 / 128), "int8": weights, "prune": 2 * weights - 1.5 * hidden * inner}[stage]
    return {
        "forward_FLOP": passes * blocks * tokens * (2.0 * weights + attention),
        # a symmetric product needs half of 2 n^2
        "gram_FLOP": blocks * tokens * (2.0 * hidden**2 + queries**2 + inner**2),
        "read_bytes": 2.0 * (blocks * weights + outside),
        "written_bytes": (blocks if stage != "prune" else blocks - prune_depth(blocks)) * written + 2.0 * outside,
    }


def prune_depth(blocks: int) -> int:
    """Blocks that `--stage prune` takes out."""
    return max(1, blocks // 8)


# ---- one run -----------------------------------------------------------------------------------------


def child(arguments: argparse.Namespace) -> None:
    """Runs in a process of its own; prints one JSON object."""
    begun = time.perf_counter()
    import accelerate  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from compress import assemble, background, model, output, stage, verify
    from compress.prune.decide import Asked
    from compress.prune.prune_stage import PruneRequest, prune
    from compress.quantize import refit, tune
    from compress.quantize.awq_stage import AwqRequest, quantize_awq
    from compress.quantize.int8_stage import Int8Request, quantize_int8
    from compress.scheme import Scheme
    from compress.tell import Tell
    from compress.workspace import resolve

    imports = time.perf_counter() - begun
    stages: dict[str, float] = {}
    blocks: list[float] = []
    state: dict[str, Any] = {"stage": "opening and calibration text", "since": time.perf_counter(), "apart": False}

    def enter(name: str) -> None:
        now = time.perf_counter()
        stages[state["stage"]] = stages.get(state["stage"], 0.0) + now - state["since"]
        state.update(stage=name, since=now)

    class Clock(Tell):
        def start(self, what: str, total: int) -> None:
            state["apart"] = what in ("sampled position", "update through the whole model")
            if state["apart"]:
                enter(what)
                return
            enter("embedding, first block's weights")
            state.update(block=time.perf_counter(), total=total)

        def step(self, done: int | None = None, doing: str = "", **_: Any) -> None:
            if state["apart"]:
                return
            if done is None:
                enter("measuring which blocks can go" if doing.startswith("block ") else doing)
                return
            enter("loading and between blocks" if done < state["total"] else "behind the last block, to published")
            blocks.append(time.perf_counter() - state["block"])
            state["block"] = time.perf_counter()

    options: dict[str, Any] = {"effort": arguments.effort} if arguments.effort else {}
    options |= {
        "source": resolve(arguments.model), "out": Path(arguments.out), "calib": arguments.calib,
        "samples": arguments.samples, "seq_len": SEQ_LEN, "dtype": arguments.dtype, "device": arguments.device,
    }  # fmt: skip
    if arguments.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if arguments.torch_only:
        refit._KERNEL_COLUMNS = tune._KERNEL_COLUMNS = 0
    if arguments.device == "cuda":
        model.configure_allocator()
        torch.zeros(1, device="cuda")  # the driver's start is not the quantizer's
    started = time.perf_counter()
    state["since"] = started

    parts: dict[str, float] = {}
    places: list[tuple[Any, Sequence[str]]] = [
        (stage, ("write_rest",)),
        (assemble, ("merge_shards", "link_shards", "verify_written")),
        (output.Run, ("publish",)),
        (verify.ReadingBack, ("found",)),
        (background.BackgroundStore, ("wait",)),
        (model.StreamedModel, ("load_block",)),
    ]
    for owner, names in places:
        for name in names:
            setattr(owner, name, _timed(getattr(owner, name), name, parts))
    inside = _timed_inside(arguments.device) if arguments.inside else {}

    def work() -> Any:
        if arguments.stage == "int8":
            return quantize_int8(Int8Request(**options), Clock())  # w8a8
        if arguments.stage == "prune":
            asked = Asked(depth=str(prune_depth(arguments.blocks)), intermediate="0.25")
            return prune(PruneRequest(asked=asked, **options), Clock())
        scheme = Scheme(group_size=arguments.group_size)
        return quantize_awq(AwqRequest(scheme=scheme, **options), Clock())

    if arguments.profile:
        outcome = _profiled(work)
    else:
        outcome = work()
    enter("end")
    result = {
        "seconds": time.perf_counter() - started,
        "import_seconds": imports,
        "stages": stages,
        "assembly": {name: seconds for name, seconds in parts.items() if seconds},
        "inside": inside,
        "blocks": blocks,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "verified": outcome.verified,
        "out_bytes": outcome.out_bytes,
    }
    if arguments.device == "cuda":
        result["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
        result["gpu_reserved_bytes"] = torch.cuda.max_memory_reserved()
    print(json.dumps(result))


def _timed(
    work: Callable[..., Any], name: str, seconds: dict[str, float], settle: Callable[[], None] = lambda: None
) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        settle()
        started = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            settle()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    return timed


def _timed_inside(device: str) -> dict[str, float]:
    """Seconds, as they come, of what the main thread does with a block; the GPU is waited for around each of them.

    `searching` holds all from `_prepared` on; `_round` holds `retarget` and `_round_with_feedback`, which holds
    `refit_scales`.
    """
    from compress import blocks, model
    from compress.quantize import awq, awq_block

    seconds: dict[str, float] = {}
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    places: list[tuple[Any, Sequence[str]]] = [
        (model.StreamedModel, ("release_block", "prefetch_block")),
        (blocks._Walk, ("_collect",)),
        (blocks, ("_advance", "install", "return_freed_memory", "_check_finite")),
        (awq, ("search_scale",)),
        (awq_block, (
            "refuse_drowning", "_prepared", "_forward_prefers", "_feedback_prefers", "_lift", "fold_proven", "_round",
            "retarget", "_round_with_feedback", "refit_scales", "_packed", "dense_tensors", "_tuned",
        )),
    ]  # fmt: skip
    for owner, names in places:
        for name in names:
            setattr(owner, name, _timed(getattr(owner, name), name, seconds, settle))
    return seconds


def _profiled(work: Callable[[], Any]) -> Any:
    """Operators by time on stderr."""
    import cProfile
    import pstats

    from torch.profiler import ProfilerActivity, profile

    python = cProfile.Profile()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        outcome = python.runcall(work)
    print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=60), file=sys.stderr)
    pstats.Stats(python, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    return outcome


def measure(arguments: argparse.Namespace, model: Path, text: Path, out: Path, effort: str | None) -> dict[str, Any]:
    drop_from_page_cache(model)
    command = [sys.executable, __file__, "--child", "--model", str(model), "--calib", str(text), "--out", str(out)]
    command += [
        "--stage",
        arguments.stage,
        "--device",
        arguments.device,
        "--dtype",
        arguments.dtype,
        "--samples",
        str(arguments.samples),
        "--blocks",
        str(arguments.blocks),
    ]
    command += ["--group-size", str(arguments.group_size)]
    command += ["--effort", effort] if effort else []
    command += ["--profile"] if arguments.profile else []
    command += ["--inside"] if arguments.inside else []
    command += ["--tf32"] if arguments.tf32 else []
    command += ["--torch-only"] if arguments.torch_only else []
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed with exit code {process.returncode}")
    found: dict[str, Any] = json.loads(printed.decode().strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--stage", choices=["awq", "int8", "prune"], default="awq")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--blocks", type=int, help="decoder blocks to make [all]")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--effort", nargs="*", default=[], help="efforts to run, one after the other [the default one]")
    parser.add_argument("--group-size", type=int, default=128, help="of `awq` [128]; 64 for the small real ones")
    parser.add_argument("--passes", type=int, default=1, help="forward passes over the tokens, for the count")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, help="where the model and the artifact are made [a temporary folder]")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true", help="print operators by time (slower)")
    parser.add_argument("--inside", action="store_true", help="print what takes the time of a block (slower)")
    parser.add_argument(
        "--tf32", action="store_true", help="let every float32 matrix product be TF32: what would it save?"
    )
    parser.add_argument(
        "--torch-only", action="store_true", help="refit scales and tune without the kernels: what do these save?"
    )
    for name in ("--child", "--model", "--calib", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS, **({"action": "store_true"} if name == "--child" else {}))
    arguments = parser.parse_args()
    if arguments.child:
        arguments.effort = arguments.effort[0] if arguments.effort else None
        child(arguments)
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; pass --device cpu --shape small to try the benchmark itself")
    shape = dict(SHAPES[arguments.shape])
    real = shape["num_hidden_layers"]
    shape["num_hidden_layers"] = blocks = arguments.blocks = arguments.blocks or real
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        started = time.perf_counter()
        build(folder / "model", shape, arguments.device)
        write_text(folder / "calib.txt", shape["vocab_size"], arguments.samples)
        card = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        print(
            f"made {arguments.shape} with {blocks} of {real} blocks in {time.perf_counter() - started:.1f} s on {card}"
        )
        limits = ceilings(folder, arguments.device)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
        runs = {}
        for effort in arguments.effort or [None]:
            name = effort or "default"
            runs[name if name not in runs else f"{name}, again"] = measure(
                arguments, folder / "model", folder / "calib.txt", folder / "out", effort
            )
            subprocess.run(["rm", "-r", str(folder / "out")], check=True)
    count = counts(shape, blocks, arguments.samples * SEQ_LEN, arguments.passes, arguments.stage)
    report = {
        "card": card, "torch": torch.__version__, "stage": arguments.stage, "shape": arguments.shape,
        "blocks": blocks, "real_blocks": real,
        "tokens": arguments.samples * SEQ_LEN, "dtype": arguments.dtype, "ceilings": limits, "counts": count,
        "runs": runs,
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))
    show(report)


def show(report: dict[str, Any]) -> None:
    limits, count, blocks, real = (report[k] for k in ("ceilings", "counts", "blocks", "real_blocks"))
    print("\nceilings of this machine: " + ", ".join(f"{k} {v:.2f}" for k, v in limits.items()))
    floors = {
        "read the model": count["read_bytes"] / limits["disk_read_GBps"] / 1e9,
        "write the artifact": count["written_bytes"] / limits["disk_write_GBps"] / 1e9,
    }
    if "bf16_TFLOPs" in limits:
        floors["forward passes (bf16)"] = count["forward_FLOP"] / limits["bf16_TFLOPs"] / 1e12
        floors["Gram matrices (bf16)"] = count["gram_FLOP"] / limits["bf16_TFLOPs"] / 1e12
    print("cannot be avoided: " + ", ".join(f"{k} {v:.1f} s" for k, v in floors.items()))
    for effort, run in report["runs"].items():
        print(
            f"\n{report['shape']}, {blocks} blocks, effort {effort}: {run['seconds']:.1f} s from read to verified "
            f"(and {run['import_seconds']:.1f} s of imports before)"
        )
        for stage, seconds in run["stages"].items():
            print(f"  {stage:<45} {seconds:8.2f} s")
        print("  of these: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in run["assembly"].items()))
        if run["inside"]:
            said = sorted(run["inside"].items(), key=lambda one: -one[1])
            print("  inside: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in said))
        steady = sorted(run["blocks"][1:]) or run["blocks"]
        each = steady[len(steady) // 2]
        print(f"  a block: first {run['blocks'][0]:.2f} s, median of the rest {each:.2f} s")
        print(f"  host peak {run['host_peak_bytes'] / 2**30:.2f} GiB", end="")
        if "gpu_peak_bytes" in run:
            peak, reserved = run["gpu_peak_bytes"] / 1e9, run["gpu_reserved_bytes"] / 1e9
            print(f", GPU peak {peak:.2f} GB allocated, {reserved:.2f} GB reserved", end="")
        print(f", {run['verified']} tensors verified")
        if blocks < real:
            whole = run["seconds"] + (real - blocks) * each
            print(f"  EXTRAPOLATED to {real} blocks: {whole:.0f} s (blocks only; assembly grows as well)")


if __name__ == "__main__":
    main()
