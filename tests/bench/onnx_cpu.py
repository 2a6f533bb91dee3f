"""Decode speed, first token and peak memory on a CPU: our ONNX bundle beside transformers and llama.cpp.

    python tests/bench/onnx_cpu.py ARTIFACT... [--model PARENT] [--llama PYTHON] [--only REGEX] [--threads 2]
        [--rounds 7] [--tokens 128] [--prefill 512] [--work DIR] [--json FILE]

ARTIFACT is a folder of `compress awq` or `compress int8`; the model it was made from is what the rivals get. PYTHON is
an interpreter that has llama-cpp-python, gguf and safetensors. Every entry generates the same number of tokens greedily
from the same token ids, in a process of its own; the entries take turns, round after round, so that other load on the
machine hits all alike, and the figures are medians over the rounds with the extremes beside them. Ratios are taken
inside a round, by the median token and by the prompt's time; the second table has their medians. --prefill: tokens of a
second, longer prompt, for the time of a prompt (0: not measured). --work: where exports and GGUFs are made; those that
are there from an earlier run are not made again.

first token: from the start of the process, imports and loading included. decode: tokens after the first over the time
they took. median step: the same from the median time of a token, which one interruption does not move. prefill: tokens
of a long prompt over its time, from when the model is loaded to its first new token, in a process of its own.
peak RSS: of the process, as the kernel counts it (pages of a mapped model file included).

The GGUF is written here with the `gguf` package: our tokenizer is byte-level BPE with GPT-2's splitting rule, which
llama.cpp knows as `gpt-2`, but its converter recognises tokenizers by a hash that ours is not in. That the model is
right is checked: llama.cpp's F16 continuation must begin with the tokens of ours. This process imports nothing large,
because a child's peak RSS starts at the size of its parent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The old house stood at the end of the lane, and nobody had lived there since the war. In the autumn of"

# llama.cpp's names of tensor types and of file types (ggml.h, llama.h)
F16 = 1
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}
# What each kind of artifact is exported as.
EXPORTS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "INT4": [
        ("float32 activations", {}),
        ("int16 activations, float lm_head", {"activations": "int16", "head": "float"}),
        ("int8 activations, float lm_head", {"activations": "int8", "head": "float"}),
        ("int16 activations, int8 lm_head", {"activations": "int16"}),
        ("int8 activations and lm_head", {"activations": "int8"}),
    ],
    "INT8": [
        ("int16 activations, float lm_head", {"head": "float"}),
        ("int8 activations, float lm_head", {"activations": "int8", "head": "float"}),
        ("int16 activations, int8 lm_head", {}),
        ("int8 activations and lm_head", {"activations": "int8"}),
    ],
    "W8A8": [("inputs as it says", {})],
}
DENSE = "ours, dense (float16 stored, float32 computed)"


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- children: each is run as `onnx_cpu.py --child NAME JSON` -------------------------------------------------


def child_export(given: dict[str, Any]) -> dict[str, Any]:
    """Write an ONNX folder (with all of the export's own checks)."""
    from compress.files import read_json
    from exporters.genai import write as onnx_genai
    from exporters.reader import Job
    from exporters.sizing.targets import TARGETS

    source, out = Path(given["source"]), Path(given["out"])
    out.mkdir()
    context = int(read_json(source / "config.json")["max_position_embeddings"])
    job = Job(artifact=source, target=TARGETS["cpu"], context=context, batch=1, staged=out, options=given["options"])
    written = onnx_genai.write(job)
    return {"parts": written.parts, "verified": written.record["verified"]}


def child_tokenize(given: dict[str, Any]) -> dict[str, Any]:
    from tokenizers import Tokenizer

    return {"ids": Tokenizer.from_file(given["tokenizer"]).encode(given["text"]).ids}


def child_transformers(given: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(given["threads"])
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32).eval()
    ids, past, made, times = torch.tensor([given["ids"]]), None, [], []
    begun = time.perf_counter()
    with torch.inference_mode():
        for _ in range(given["tokens"]):
            out = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            made.append(int(ids))
            times.append(time.perf_counter())
            if len(times) == 1:
                first = seconds_since_start()
    return figures(made, times, first, begun)


def child_llama(given: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp through its C interface: no sampling chain, no detokenizing, as little Python as ours has."""
    import ctypes

    import llama_cpp as c
    import numpy as np

    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    c.llama_log_set(quiet, ctypes.c_void_p(0))
    c.llama_backend_init()
    model = c.llama_model_load_from_file(str(given["model"]).encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx = len(given["ids"]) + given["tokens"]
    params.n_threads = params.n_threads_batch = given["threads"]
    context = c.llama_init_from_model(model, params)
    vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    ids, made, times = list(given["ids"]), [], []
    begun = time.perf_counter()
    for _ in range(given["tokens"]):
        array = (c.llama_token * len(ids))(*ids)
        if c.llama_decode(context, c.llama_batch_get_one(array, len(ids))):
            raise SystemExit("llama_decode failed")
        logits = np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), (vocab,))
        ids = [int(logits.argmax())]
        made.append(ids[0])
        times.append(time.perf_counter())
        if len(times) == 1:
            first = seconds_since_start()
    return figures(made, times, first, begun)


def child_gguf(given: dict[str, Any]) -> dict[str, Any]:
    """A Llama folder with a byte-level BPE tokenizer as an F16 GGUF."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    source = Path(given["model"])
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"] or not config["tie_word_embeddings"]:
        raise SystemExit(f"{source}: only a Llama with tied embeddings is written as GGUF here")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(given["out"], "llama")
    writer.add_name("reference")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {t["id"] for t in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for _, i in vocabulary])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, value in sorted(load_file(source / "model.safetensors").items()):
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp rotates neighbours, not halves
            n = heads if ".q_proj." in name else kv_heads
            value = value.reshape(n, 2, value.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(value.shape)
        wide = value.ndim == 1
        writer.add_tensor(names.get_name(name, (".weight",)), value.astype(np.float32 if wide else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {}


def child_quantize(given: dict[str, Any]) -> dict[str, Any]:
    import ctypes

    import llama_cpp as c

    params = c.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[given["type"]]
    params.nthread = given["threads"]
    if given["head"] == "F16":
        params.token_embedding_type = params.output_tensor_type = F16
    if c.llama_model_quantize(given["source"].encode(), given["out"].encode(), ctypes.byref(params)):
        raise SystemExit(f"llama_model_quantize failed for {given['type']}")
    return {}


def figures(made: Sequence[int], times: Sequence[float], first: float, begun: float) -> dict[str, Any]:
    import resource

    return {
        "ids": list(made),
        "prefill_seconds": times[0] - begun,
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]),
        "median_step_seconds": statistics.median(b - a for a, b in zip(times, times[1:], strict=False)),
        "first_token_seconds": first,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def seconds_since_start() -> float:
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


# ---- the harness --------------------------------------------------------------------------------------------


def run_child(python: str, name: str, given: dict[str, Any], threads: int) -> dict[str, Any]:
    command = [python, __file__, "--child", name, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(threads), cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_bundle(folder: Path, text: str, tokens: int, threads: int) -> dict[str, Any]:
    """The folder's own run.py, as a user would call it."""
    command = [
        sys.executable, str(folder / "run.py"), text, "--max-new-tokens", str(tokens), "--threads", str(threads),
        "--ids", "--json", "--no-chat",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment(threads), cwd=folder)
    if done.returncode:
        raise SystemExit(f"run.py: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])
    return found | {"ids": [int(line) for line in done.stdout.split()]}


def environment(threads: int) -> dict[str, str]:
    path = {"PYTHONPATH": str(ROOT)}
    return (
        os.environ | path | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    )


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Prepare every entry, then run them in turn. Returns machine, entries and their runs."""
    threads, tokens = options.threads, options.tokens
    texts = {"decode": PROMPT}
    ids = {"decode": tokens_of(options.model, PROMPT)}
    if options.prefill:
        texts["prefill"] = " ".join([PROMPT] * -(-options.prefill // len(ids["decode"])))
        ids["prefill"] = tokens_of(options.model, texts["prefill"])
    entries = prepared(options, work, texts, ids)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in entries}
    load = [os.getloadavg()[0]]
    for number in range(options.rounds):
        for name, (run, _) in entries.items():
            result = run("decode", tokens)
            if len(result["ids"]) != tokens:
                raise SystemExit(f"{name}: {len(result['ids'])} tokens instead of {tokens}; it met an end of text")
            which = "prefill" if options.prefill else "decode"
            prompt = run(which, 2) if options.prefill else result
            result["prefill_seconds"] = prompt["prefill_seconds"] / len(ids[which])
            runs[name].append(result)
        load.append(os.getloadavg()[0])
        log(f"round {number + 1} of {options.rounds}, load {load[-1]:.1f}")
    check_same_model(runs)
    ratios = {"token": ratios_of(runs, "median_step_seconds")}
    if options.prefill:
        ratios["prompt"] = ratios_of(runs, "prefill_seconds")
    return {
        "machine": f"{platform.machine()}, {cpu_name()}, {os.cpu_count()} cores", "threads": threads, "tokens": tokens,
        "prompt_tokens": {kind: len(found) for kind, found in ids.items()}, "rounds": options.rounds,
        "load": [round(x, 1) for x in load],
        "entries": {name: {"bytes": entries[name][1], **spread(results)} for name, results in runs.items()},
        "ratios": ratios,
    }  # fmt: skip


def tokens_of(model: Path, text: str) -> list[int]:
    given = {"tokenizer": str(model / "tokenizer.json"), "text": text}
    ids: list[int] = run_child(sys.executable, "tokenize", given, 1)["ids"]
    return ids


def prepared(
    options: argparse.Namespace, work: Path, texts: dict[str, str], ids: dict[str, list[int]]
) -> dict[str, tuple[Callable[[str, int], dict[str, Any]], int]]:
    """By name, what runs an entry (which prompt, how many new tokens) and its files' bytes."""
    python, threads, model = sys.executable, options.threads, options.model
    entries: dict[str, tuple[Callable[[str, int], dict[str, Any]], int]] = {}
    exports = [
        (f"ours, {kind_of(folder)}, {label}", folder, changes)
        for folder in options.artifacts
        for label, changes in EXPORTS[kind_of(folder)]
    ]
    for name, source, changes in [*exports, (DENSE, model, {})]:
        if not options.only.search(name):
            continue
        folder = work / name.replace(" ", "-").replace(",", "")
        if not folder.exists():
            given = {"source": str(source), "out": str(work / "part"), "options": changes}
            shutil.rmtree(work / "part", ignore_errors=True)
            log(f"{name}: {run_child(python, 'export', given, threads)}")
            (work / "part").rename(folder)
        entries[name] = (
            lambda which, count, f=folder: run_bundle(f, texts[which], count, threads), size(folder, ".onnx", ".data")
        )  # fmt: skip

    def rival(interpreter: str, name: str, path: Path) -> Callable[[str, int], dict[str, Any]]:
        return lambda which, count: run_child(
            interpreter, name, {"model": str(path), "ids": ids[which], "tokens": count, "threads": threads}, threads
        )

    if options.only.search("transformers, float32"):
        entries["transformers, float32"] = (rival(python, "transformers", model), size(model, ".safetensors"))
    if options.llama:
        for name, path in ggufs(options, work).items():
            entries[name] = (rival(options.llama, "llama", path), path.stat().st_size)
    else:
        log("LLAMA.CPP ABSENT: pass --llama PYTHON; its rows were not measured")
    return entries


def kind_of(folder: Path) -> str:
    """INT4, INT8 (weights only) or W8A8, as the folder's config says."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if "bits" in config:
        return f"INT{config['bits']}"
    groups = list(config["config_groups"].values())
    return "W8A8" if any(g["input_activations"] for g in groups) else f"INT{groups[0]['weights']['num_bits']}"


def ratios_of(runs: dict[str, list[dict[str, Any]]], key: str) -> dict[str, dict[str, list[float]]]:
    """Of each of our entries, how many times as quick as each other entry it was in each round, sorted."""
    return {
        name: {
            other: sorted(round(b[key] / a[key], 3) for a, b in zip(results, runs[other], strict=True))
            for other in runs
            if other != name and (other == DENSE or not other.startswith("ours"))
        }
        for name, results in runs.items()
        if name.startswith("ours")
    }


def spread(results: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Each figure over the rounds, sorted."""
    keys = {"tokens_per_second": 1, "first_token_seconds": 4, "peak_rss_mib": 1}
    out = {key: sorted(round(float(r[key]), digits) for r in results) for key, digits in keys.items()}
    out["steady_tokens_per_second"] = sorted(round(1 / r["median_step_seconds"], 1) for r in results)
    return out | {"prefill_tokens_per_second": sorted(round(1 / r["prefill_seconds"], 1) for r in results)}


def ggufs(options: argparse.Namespace, work: Path) -> dict[str, Path]:
    """llama.cpp's files: F16, Q4_0 with our F16 embedding and lm_head, and Q4_0 and Q4_K_M as it makes them."""
    dense, part = work / "f16.gguf", work / "part.gguf"
    if not dense.exists():
        run_child(options.llama, "gguf", {"model": str(options.model), "out": str(part)}, options.threads)
        part.rename(dense)
    out = {"llama.cpp, F16": dense}
    for type_, head, label in (
        ("Q4_0", "F16", "Q4_0, F16 embedding and lm_head"),
        ("Q4_0", "", "Q4_0, its default"),
        ("Q4_K_M", "", "Q4_K_M, its default"),
        ("Q8_0", "F16", "Q8_0, F16 embedding and lm_head"),
        ("Q8_0", "", "Q8_0, its default"),
    ):
        if not options.only.search(f"llama.cpp, {label}"):
            continue
        path = work / f"{type_}-{head or 'default'}.gguf"
        if not path.exists():
            given = {"type": type_, "head": head, "source": str(dense), "out": str(part), "threads": options.threads}
            run_child(options.llama, "quantize", given, options.threads)
            part.rename(path)
        out[f"llama.cpp, {label}"] = path
    return out


def check_same_model(runs: dict[str, list[dict[str, Any]]]) -> None:
    """The dense entries continue the prompt with the same tokens: the same model ran everywhere."""
    dense = {
        name: r[0]["ids"][:16]
        for name, r in runs.items()
        if "dense" in name or "float32" == name[-7:] or "F16" == name[-3:]
    }
    if len({tuple(ids) for ids in dense.values()}) > 1:
        raise SystemExit(f"the dense entries continue differently, so a conversion is wrong: {dense}")


def size(folder: Path, *suffixes: str) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix in suffixes)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def table(result: dict[str, Any]) -> str:
    columns = (
        ("decode, tokens/s", "tokens_per_second", 0), ("median step, tokens/s", "steady_tokens_per_second", 0),
        ("prefill, tokens/s", "prefill_tokens_per_second", 0), ("first token, s", "first_token_seconds", 2),
        ("peak RSS, MiB", "peak_rss_mib", 0),
    )  # fmt: skip
    lines = ["| | MB | " + " | ".join(title for title, _, _ in columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, entry in result["entries"].items():
        cells = []
        for _, key, digits in columns:
            values = entry[key]
            cells.append(f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f} to {values[-1]:.{digits}f})")
        lines.append(f"| {name} | {entry['bytes'] / 1e6:.1f} | {' | '.join(cells)} |")
    for what, ratios in result["ratios"].items():
        lines += ["", f"| times as quick, {what} | than | median | least | most |", "|---|---|---|---|---|"]
        for name, others in ratios.items():
            for other, values in others.items():
                said = " | ".join(f"{v:.2f}" for v in (statistics.median(values), values[0], values[-1]))
                lines.append(f"| {name} | {other} | {said} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(globals()[f"child_{sys.argv[2]}"](json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+", help="folders of `compress awq` or `compress int8`")
    parser.add_argument("--model", type=Path, default=ROOT / "calibration_data" / "reference_lm", help="its parent")
    parser.add_argument("--llama", default="", metavar="PYTHON", help="interpreter with llama-cpp-python")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="entries whose name this is found in")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the long prompt, about; 0: none")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where exports are made, and found again")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    options.artifacts = [folder.resolve() for folder in options.artifacts]
    options.model = options.model.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        result = measure(options, work.resolve())
    print(table(result))
    print(f"\n{result['machine']}, {result['threads']} threads, {result['rounds']} rounds, load {result['load']}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
