"""Generate text from this folder with nothing but onnxruntime, numpy and tokenizers.

    pip install -r requirements.txt
    python run.py "Once upon a time"
    python run.py "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1 --max-new-tokens 200
    echo "a long prompt" | python run.py -

Text goes to standard output as it is made; first-token time, tokens per second and peak memory go to standard error.
No network, no torch, no transformers. The prompt is used as it is: no chat template.

Shapes: T tokens, V vocabulary, B batch (1), K KV heads, C capacity of the cache in tokens, D size of a head
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

STARTED = time.monotonic()

try:
    import numpy as np
    import onnxruntime
except ImportError as e:  # pragma: no cover - the message is the point
    sys.exit(f"error: {e.name} is not installed; pip install -r {Path(__file__).with_name('requirements.txt')}")

HERE = Path(__file__).resolve().parent
CHUNK = 128  # tokens of the prompt run at once: bounds the logits at CHUNK * V floats


class Decoder:
    """The model and its KV cache.

    Keys and values live in buffers of `capacity` tokens that are bound once as past and as present, so a step writes
    one row of each and copies nothing. `folder` holds model.onnx and genai_config.json.
    """

    def __init__(self, folder: Path, capacity: int, threads: int = 0) -> None:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        decoder = config["decoder"]
        self.context_length = int(config["context_length"])
        self.capacity = min(capacity, self.context_length)
        eos = config["eos_token_id"]
        self.eos = frozenset(eos if isinstance(eos, list) else [eos])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(available_cores())
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(folder / decoder["filename"]), options, providers=["CPUExecutionProvider"]
        )
        names = decoder["inputs"]
        self.ids_name, self.mask_name = names["input_ids"], names["attention_mask"]
        self.positions_name: str | None = names.get("position_ids")
        self.logits_name: str = decoder["outputs"]["logits"]
        self.binding = self.session.io_binding()
        self._caches = []
        shape = (1, int(decoder["num_key_value_heads"]), self.capacity, int(decoder["head_size"]))
        for layer in range(int(decoder["num_hidden_layers"])):
            for kind in ("key", "value"):
                cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))  # [B, K, C, D]
                self.binding.bind_ortvalue_input(names[f"past_{kind}_names"] % layer, cache)
                self.binding.bind_ortvalue_output(decoder["outputs"][f"present_{kind}_names"] % layer, cache)
                self._caches.append(cache)
        self._mask = np.ones((1, self.capacity), np.int64)
        self._vocab = next(o for o in self.session.get_outputs() if o.name == self.logits_name).shape[-1]
        self._ids = self._positions = np.empty((1, 0), np.int64)
        self._logits = np.empty((1, 0, self._vocab), np.float32)
        self.length = 0

    def forward(self, ids: Sequence[int]) -> np.ndarray:
        """Append `ids` to the cache; float32 logits `[T, V]`, valid until the next call. At most `capacity` in all."""
        count = len(ids)
        total = self.length + count
        if total > self.capacity:
            raise ValueError(f"{total} tokens do not fit a cache of {self.capacity}")
        if self._ids.shape[1] != count:
            self._reserve(count)
        self._ids[0] = ids
        self._positions[0] = range(self.length, total)
        self._bind(self.mask_name, self._mask[:, :total])
        self.session.run_with_iobinding(self.binding)
        self.length = total
        out: np.ndarray = self._logits[0]
        return out

    def _reserve(self, count: int) -> None:
        """Buffers for `count` tokens at once, bound until another count comes: a step rewrites what they hold."""
        self._ids = np.empty((1, count), np.int64)
        self._positions = np.empty((1, count), np.int64)
        self._logits = np.empty((1, count, self._vocab), np.float32)
        self._bind(self.ids_name, self._ids)
        if self.positions_name:
            self._bind(self.positions_name, self._positions)
        out = self._logits
        self.binding.bind_output(self.logits_name, "cpu", 0, np.float32, out.shape, out.ctypes.data)

    def _bind(self, name: str, value: np.ndarray) -> None:
        self.binding.bind_input(name, "cpu", 0, np.int64, value.shape, value.ctypes.data)

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Run a whole prompt; logits `[V]` after its last token."""
        for start in range(0, len(ids), CHUNK):
            logits = self.forward(ids[start : start + CHUNK])
        last: np.ndarray = logits[-1]
        return last


def pick(logits: np.ndarray, temperature: float, top_k: int, top_p: float, rng: np.random.Generator) -> int:
    """The next token from logits `[V]`: the largest at temperature 0, else drawn from the `top_k` most likely (0: all)
    cut down to the fewest whose probabilities reach `top_p`.
    """
    if temperature <= 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    scaled = logits[order].astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    keep = int(np.searchsorted(probabilities.cumsum(), top_p)) + 1
    probabilities = probabilities[:keep] / probabilities[:keep].sum()
    return int(order[: len(probabilities)][rng.choice(len(probabilities), p=probabilities)])


def generate(decoder: Decoder, prompt: Sequence[int], limit: int, sampling: dict[str, Any], seed: int) -> Iterator[int]:
    """Token ids one by one, up to `limit`, to the end of the cache, or to an end-of-text token (which is not given)."""
    rng = np.random.default_rng(seed)
    logits = decoder.prefill(prompt)
    for made in range(1, limit + 1):
        token = pick(logits, rng=rng, **sampling)
        if token in decoder.eos:
            return
        yield token
        if made == limit or decoder.length == decoder.capacity:
            return
        logits = decoder.forward([token])[-1]


class TextStream:
    """Token ids in, text out, never half a character.

    A token may end inside a UTF-8 sequence, which decodes to U+FFFD until the rest arrives; it is held back. Each
    piece is the difference of two decodings that start at the same token, because decoders treat the first token of
    a text differently (leading spaces).
    """

    def __init__(self, tokenizer: Any, context: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(context[-8:])
        self.start, self.done = 0, len(self.ids)

    def add(self, token: int) -> str:
        self.ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """What is still held back: the model stopped inside a character."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.done])
        after = self.tokenizer.decode(self.ids[self.start :])
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self.start, self.done = self.done, len(self.ids)
        return str(after[len(before) :])


def available_cores() -> Sequence[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def seconds_since_start() -> float:
    """Since this process was started, where Linux tells, else since this file was."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic() - STARTED


def peak_mib() -> float:
    """Peak resident memory of this process in MiB; NaN where the system does not tell."""
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate text from this folder's model.")
    parser.add_argument("prompt", help="the text to go on from; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the K likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that sum to P")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; the same seed gives the same text")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: every core of this process")
    parser.add_argument("--ids", action="store_true", help="print token ids, one a line, instead of text")
    parser.add_argument("--json", action="store_true", help="the figures on standard error as one line of JSON")
    options = parser.parse_args(arguments)
    for name, fits, rule in (
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        ("temperature", options.temperature >= 0, "0 or more"),
        ("top_k", options.top_k >= 0, "0 or more"),
        ("top_p", 0 < options.top_p <= 1, "more than 0 and at most 1"),
        ("threads", options.threads >= 0, "0 or more"),
        ("seed", options.seed >= 0, "0 or more"),
    ):
        if not fits:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be {rule}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        sys.exit(f"error: tokenizers is not installed; pip install -r {HERE / 'requirements.txt'}")
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    prompt = tokenizer.encode(text).ids
    if not prompt:
        sys.exit("error: the prompt has no token; write at least one character")
    decoder = Decoder(HERE, capacity=len(prompt) + options.max_new_tokens, threads=options.threads)
    if len(prompt) >= decoder.context_length:
        sys.exit(
            f"error: the prompt has {len(prompt)} tokens, and the model's context is {decoder.context_length}; "
            "shorten it"
        )
    stream = TextStream(tokenizer, prompt)
    sampling = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    begun = time.perf_counter()
    times: list[float] = []
    first = float("nan")
    for token in generate(decoder, prompt, options.max_new_tokens, sampling, options.seed):
        times.append(time.perf_counter())
        if len(times) == 1:
            first = seconds_since_start()
        piece = f"{token}\n" if options.ids else stream.add(token)
        if piece:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("" if options.ids else stream.finish() + "\n")
    sys.stdout.flush()
    report(options.json, len(prompt), begun, first, times)
    return 0


def report(as_json: bool, prompt_tokens: int, begun: float, first: float, times: Sequence[float]) -> None:
    """The figures, on standard error. Decoding speed leaves out the first token, which pays for the prompt."""
    decoding = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    figures = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(times),
        "prefill_seconds": round(times[0] - begun, 4) if times else None,
        "first_token_seconds": round(first, 4) if times else None,
        "tokens_per_second": round(decoding, 1) if decoding else None,
        "median_step_seconds": round(float(np.median(np.diff(times))), 7) if decoding else None,
        "peak_rss_mib": round(peak_mib(), 1),
    }
    if as_json:
        print(json.dumps(figures), file=sys.stderr)
        return
    print(
        f"[{prompt_tokens} prompt tokens, {len(times)} new; "
        + (f"first token {first:.2f} s after start, {times[0] - begun:.3f} s of it the prompt; " if times else "")
        + (f"{decoding:.0f} tokens/s; " if decoding else "")
        + f"peak {figures['peak_rss_mib']:.0f} MiB]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
