"""Generate text from this folder with nothing but onnxruntime, numpy and tokenizers, and jinja2 for chats.

    pip install -r requirements.txt
    python run.py "Once upon a time"
    python run.py "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1 --max-new-tokens 200
    echo "a long prompt" | python run.py -

Text goes to standard output as it is made; first-token time, tokens per second and peak memory go to standard error.
No network, no torch, no transformers. Where the tokenizer has a chat template, the prompt is a user's message and the
template writes it out (jinja2 runs it in its sandbox); --no-chat goes on from the bare text.

Shapes: T tokens, V vocabulary, B batch (1), K KV heads, C capacity of the cache in tokens, D size of a head
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
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
SPIN = 1000  # microseconds; longer than the gap between two tokens, shorter than anything a user does
LOGITS_FROM = "logits_from"  # an input with a value: the first position that logits are computed of
CHUNK = 128  # tokens of the prompt run at once: bounds the logits at CHUNK * V floats
CGROUP = Path("/sys/fs/cgroup")
SAFE_JINJA = (3, 1, 6)  # templates come with models; older sandboxes have known escapes


class Decoder:
    """The model and its KV cache.

    Keys and values live in buffers of `capacity` tokens that are bound once as past and as present, so a step writes
    one row of each and copies nothing. `folder` holds model.onnx and genai_config.json. spin: for how many microseconds
    a thread that waits keeps its core busy before it sleeps; the next piece of a token comes within tens of them, and
    waking a thread takes longer than most pieces do.
    """

    def __init__(self, folder: Path, capacity: int, threads: int = 0, spin: int = SPIN) -> None:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        decoder = config["decoder"]
        self.context_length = int(config["context_length"])
        self.capacity = min(capacity, self.context_length)
        eos = config["eos_token_id"]
        self.eos = frozenset(eos if isinstance(eos, list) else [eos])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin > 0)))
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin))
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
        known = [i.name for i in self.session.get_overridable_initializers()]
        self._from = np.zeros(1, np.int64) if LOGITS_FROM in known else None
        self._vocab = next(o for o in self.session.get_outputs() if o.name == self.logits_name).shape[-1]
        self._ids = self._positions = np.empty((1, 0), np.int64)
        self._logits = np.empty((1, 0, self._vocab), np.float32)
        self.length = 0

    def forward(self, ids: Sequence[int], last: int | None = None) -> np.ndarray:
        """Append `ids` to the cache; float32 logits `[T, V]`, valid until the next call. At most `capacity` in all.

        last: of so many tokens, where the graph can leave out the others'.
        """
        count = len(ids)
        rows = count if last is None or self._from is None else last
        total = self.length + count
        if total > self.capacity:
            raise ValueError(f"{total} tokens do not fit a cache of {self.capacity}")
        if (self._ids.shape[1], self._logits.shape[1]) != (count, rows):
            self._reserve(count, rows)
        self._ids[0] = ids
        self._positions[0] = range(self.length, total)
        self._bind(self.mask_name, self._mask[:, :total])
        self.session.run_with_iobinding(self.binding)
        self.length = total
        out: np.ndarray = self._logits[0]
        return out

    def _reserve(self, count: int, rows: int) -> None:
        """Buffers for `count` tokens at once, bound until another count comes: a step rewrites what they hold."""
        if self._from is not None:
            self._from[0] = count - rows
            self._bind(LOGITS_FROM, self._from)
        self._ids = np.empty((1, count), np.int64)
        self._positions = np.empty((1, count), np.int64)
        self._logits = np.empty((1, rows, self._vocab), np.float32)
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
            logits = self.forward(ids[start : start + CHUNK], last=1)
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


def available_cores(cgroup: Path = CGROUP) -> int:
    """As many cores as this process may use: those of its affinity, and no more than its container is given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()[:2]
        return cores if limit == "max" else max(1, min(cores, round(int(limit) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):
        return cores


def chat_template(folder: Path) -> str | None:
    """The template that lies with the tokenizer, where transformers looks for it; None without one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = tokenizer_config(folder).get("chat_template")
    if isinstance(found, list):  # several, each with a name
        found = next((t["template"] for t in found if t["name"] == "default"), None)
    return found or None


def tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def render(template: str, text: str, config: dict[str, Any]) -> str:
    """`text` as a user's message, and the opening of the answer, as `template` writes them; `config`: tokenizer_config.

    The environment is that of transformers' chat templates. Exits with one sentence where jinja2 is absent or too old,
    or where the template refuses.
    """
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox
    except ImportError:
        sys.exit(
            "error: the chat template beside this model needs jinja2, which is not installed; pip install -r "
            f"{shlex.quote(str(HERE / 'requirements.txt'))}, or pass --no-chat"
        )
    if tuple(int(n) for n in jinja2.__version__.split(".")[:3] if n.isdigit()) < SAFE_JINJA:
        wanted = ".".join(map(str, SAFE_JINJA))
        sys.exit(
            f"error: jinja2 {jinja2.__version__} has a sandbox with known holes, and chat templates are programs; pip "
            f"install 'jinja2>={wanted}', or pass --no-chat"
        )

    class Generation(ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here its body is just written."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda x, ensure_ascii=False, **how: json.dumps(x, ensure_ascii=ensure_ascii, **how)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = time.strftime
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    messages = [{"role": "user", "content": text}]
    try:
        return environment.from_string(template).render(
            **{k: v for k, v in tokens.items() if isinstance(v, str)},
            messages=messages,
            tools=None,  # given as transformers gives them: templates ask whether they are none
            documents=None,
            add_generation_prompt=True,
        )
    except Exception as e:  # templates are programs: they raise whatever they like
        reason = " ".join(str(e).split()) or type(e).__name__
        sys.exit(f"error: the chat template beside this model fails ({reason[:160]}); pass --no-chat")


def prompt_ids(tokenizer: Any, text: str, chat: bool | None) -> tuple[list[int], bool]:
    """The prompt's tokens, and whether a chat template wrote it out; chat None: where there is one."""
    template = None if chat is False else chat_template(HERE)
    if template is None:
        if chat:
            sys.exit(f"error: --chat: {HERE} has no chat template; leave --chat out")
        return list(tokenizer.encode(text).ids), False
    rendered = render(template, text, tokenizer_config(HERE))  # it writes special tokens itself
    return list(tokenizer.encode(rendered, add_special_tokens=False).ids), True


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
    parser.add_argument("prompt", help="what to answer, or the text to go on from; - reads standard input")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="write the prompt out with the tokenizer's chat template; default: where it has one",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the K likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that sum to P")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; the same seed gives the same text")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: every core of this process")
    parser.add_argument(
        "--spin",
        type=int,
        default=SPIN,
        metavar="US",
        help=f"microseconds that a waiting thread keeps its core before it sleeps; default: {SPIN}, 0: sleeps at once",
    )
    parser.add_argument("--ids", action="store_true", help="print token ids, one a line, instead of text")
    parser.add_argument("--json", action="store_true", help="the figures on standard error as one line of JSON")
    options = parser.parse_args(arguments)
    for name, fits, rule in (
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        ("temperature", options.temperature >= 0, "0 or more"),
        ("top_k", options.top_k >= 0, "0 or more"),
        ("top_p", 0 < options.top_p <= 1, "more than 0 and at most 1"),
        ("threads", options.threads >= 0, "0 or more"),
        ("spin", options.spin >= 0, "0 or more"),
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
    if not text:
        sys.exit("error: the prompt has no token; write at least one character")
    prompt, chat = prompt_ids(tokenizer, text, options.chat)
    if not prompt:
        sys.exit("error: the prompt has no token; write at least one character")
    decoder = Decoder(HERE, len(prompt) + options.max_new_tokens, options.threads, options.spin)
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
    report(options.json, len(prompt), chat, begun, first, times)
    return 0


def report(as_json: bool, prompt_tokens: int, chat: bool, begun: float, first: float, times: Sequence[float]) -> None:
    """The figures, on standard error. Decoding speed leaves out the first token, which pays for the prompt."""
    decoding = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    figures = {
        "prompt_tokens": prompt_tokens,
        "chat": chat,
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
        f"[{prompt_tokens} prompt tokens{' with the chat template' if chat else ''}, {len(times)} new; "
        + ("" if times else "the model ended the text at once; ")
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
