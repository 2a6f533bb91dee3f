"""Will it fit, and how fast will it be: arithmetic on an inventory, before any work is done.

    run peak = weights + KV cache + activations + runtime

Weights and KV cache are counted. Activations and runtime of the TensorRT formats are two constants fitted to four
published peaks (TensorRT Edge-LLM 0.9, AGX Orin, Qwen3 0.6B to 8B, INT4, batch 1, prompts up to 2048 tokens, cache of
2200): the prediction is within 4 % of each, and within 10 % of a point that was left out of the fit. Two constants on
four points are little evidence, for one runtime; what the other formats add is stated beside each constant.

Speeds are predictions from a roofline: the bytes that a token moves over the bandwidth, or its arithmetic over the
peak, divided by the share of either that published runs have reached. They are ranges, and no measurement; for models
smaller than any of those runs there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from compress.errors import CompressError
from exporters.sizing.inventory import Model
from exporters.sizing.targets import TARGETS, Range, Target

# Fitted, see the module docstring; `tests/exporters/sizing/test_predict.py` fits them again.
TENSORRT_RUNTIME_BYTES = 428_800_000
TENSORRT_BYTES_PER_TOKEN_AND_HIDDEN = 159.3
# vLLM: the largest CUDA-graph memory that its logs show is 4.4 GiB (0.36 to 4.4 since v0.21 profiles it), beside a CUDA
# context as in the fitted runtime. Its prefill is chunked: no more tokens at once than max_num_batched_tokens.
VLLM_RUNTIME_BYTES = TENSORRT_RUNTIME_BYTES + 4_700_000_000
# ONNX Runtime on a CPU: float32 activations; the interpreter and the library. An estimate that was not calibrated.
ONNX_RUNTIME_BYTES = 200_000_000
# The most prompt tokens that enter at once: what the calibration was measured with, and what our launch files ask for.
PREFILL_TOKENS = 2048
# Build peak of a TensorRT engine: 3 to 4 bytes a parameter (Edge-LLM issue 30: a 32B model was killed at 128 GB).
BUILD_BYTES_PER_PARAMETER = (3.0, 4.0)
# Bits a weight that this version can make for each format; others are sized, and said to be plans.
MADE_BITS: dict[str, tuple[int, ...]] = {
    "hf": (16, 8, 4), "edge": (16, 8, 4), "onnx-trt": (16, 8, 4), "tensorrt": (16, 8, 4), "onnx": (16, 8, 4),
}  # fmt: skip
# Numbers in the KV cache: what each format's reader takes. TensorRT's cache layer and Edge-LLM on Orin: 16 bits only;
# vLLM's kv_cache_dtype takes 8; ONNX Runtime's CPU kernels compute in float32.
KV_BITS: dict[str, tuple[int, ...]] = {
    "hf": (16, 8), "edge": (16,), "onnx-trt": (16,), "tensorrt": (16,), "onnx": (32,)
}  # fmt: skip
# Weights that a token reads, at least, for speeds to be predicted: the smallest model with published runs reads 0.54 GB
# (Qwen3-0.6B, INT4). Below, launching kernels costs more than reading, and no roofline holds.
PREDICTED_FROM_BYTES = 500_000_000
_ENGINES = ("edge", "onnx-trt", "tensorrt")
# Formats whose server takes sequences as they come and shares its memory among them; elsewhere a batch is built in.
SERVED = ("hf",)
# Sequences that launch files ask for at most where nobody said how many: a cap of ours. Each sequence more makes all of
# them wait longer for their next token.
MOST_SEQUENCES = 256
_STEP = 256


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to run. num_bits None: the weights as the folder stores them.

    kv_bits: of a number in the KV cache, see `native_kv_bits`. keep: share of the decoder's linear parameters that
    pruning leaves. prompt: tokens of the prompt that first-token time is predicted for.
    """

    format: str
    context: int
    batch: int = 1
    num_bits: int | None = None
    group_size: int = 128
    kv_bits: int = 16
    keep: float = 1.0
    prompt: int = 512


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """Bytes of each part, the peaks, and what the machine has. Speeds are predicted ranges, or None."""

    plan: Plan
    decoder_linears: int
    lm_head: int
    embedding: int
    other: int
    kv_cache: int
    activations: int
    runtime: int
    usable: int
    memory: int
    build_peak: tuple[int, int] | None
    decode_tokens_per_s: Range | None
    first_token_s: Range | None

    @property
    def weights(self) -> int:
        return self.decoder_linears + self.lm_head + self.embedding + self.other

    @property
    def run_peak(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.runtime

    @property
    def fits(self) -> bool:
        """Whether it runs. The build is another matter: swap helps there, see `build_note`."""
        return self.run_peak <= self.usable

    def parts(self) -> dict[str, int]:
        """Bytes by part of the run peak."""
        return {
            "decoder linears": self.decoder_linears,
            "lm_head": self.lm_head,
            "embedding": self.embedding,
            "norms and biases": self.other,
            "KV cache": self.kv_cache,
            "activations": self.activations,
            "runtime": self.runtime,
        }

    def build_note(self) -> str | None:
        """What the engine build needs beyond the machine's memory, if anything. None when nothing is built.

        No refusal: published runs of Qwen3-8B on a 16 GB module show that builds above the memory succeed.
        """
        if self.build_peak is None:
            return None
        low, high = self.build_peak
        text = f"building the engine may take {low / 1e9:.2f} to {high / 1e9:.2f} GB (3 to 4 bytes a parameter)"
        if high <= self.memory:
            return text
        return (
            f"{text}, of {self.memory / 1e9:.0f} GB: add {(high - self.memory) / 1e9:.1f} GB of swap (zram off), or "
            "externalize weights"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": asdict(self.plan),
            "parts": self.parts(),
            "weights": self.weights,
            "run_peak": self.run_peak,
            "usable": self.usable,
            "memory": self.memory,
            "fits": self.fits,
            "build_peak": list(self.build_peak) if self.build_peak else None,
            "predicted": {
                "decode_tokens_per_s": _rounded(self.decode_tokens_per_s),
                "first_token_s": _rounded(self.first_token_s),
                "prompt_tokens": min(self.plan.prompt, self.plan.context),
            },
        }


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Something that fits: what to change, in words, and its sizing. made: whether this version can make it."""

    text: str
    sizing: Sizing
    made: bool


class DoesNotFit(CompressError):
    """The model is too big for the target; carries the breakdown and what would fit."""

    def __init__(self, message: str, sizing: Sizing, suggestions: list[Suggestion]) -> None:
        super().__init__(message)
        self.sizing = sizing
        self.suggestions = suggestions


def native_kv_bits(format: str) -> int:
    """Bits of a number in the format's KV cache when nothing is asked for."""
    return KV_BITS[format][0] if format in KV_BITS else 16


def size(model: Model, plan: Plan, target: Target) -> Sizing:
    """Bytes and predicted speeds of `plan` on `target`."""
    dense = 4 if plan.format == "onnx" else 2  # bytes of a number that is not quantized
    linears = _linear_bytes(model, plan, dense)
    head = model.head_parameters * dense
    # vLLM and transformers share a tied matrix; the others hold the embedding and the output matrix apart.
    shared = model.tied and plan.format == "hf"
    embedding = 0 if shared else model.embedding * dense
    other = model.other * dense
    kv_cache = model.kv_bytes_per_token(plan.kv_bits) * plan.context * plan.batch
    activations, runtime = _working(model, plan)
    streamed = linears + head + other  # what one decoding step reads of the weights
    return Sizing(
        plan=plan,
        decoder_linears=linears,
        lm_head=head,
        embedding=embedding,
        other=other,
        kv_cache=kv_cache,
        activations=activations,
        runtime=runtime,
        usable=target.usable_bytes,
        memory=target.memory_bytes,
        build_peak=_build_peak(model, plan),
        decode_tokens_per_s=_decode(model, plan, target, streamed, kv_cache),
        first_token_s=_first_token(model, plan, target, streamed),
    )


def _bits(model: Model, plan: Plan) -> int:
    if plan.num_bits is not None:
        return plan.num_bits
    return model.scheme.num_bits if model.scheme else 16


def _linear_bytes(model: Model, plan: Plan, dense: int) -> int:
    if plan.num_bits is None:
        return int((model.packed_bytes + (model.linears - model.packed) * dense) * plan.keep)
    if plan.num_bits >= 16:
        return int(model.linears * dense * plan.keep)
    bits = plan.num_bits + 16 / plan.group_size  # a float16 scale for each group
    return int(model.linears * bits / 8 * plan.keep)


def _working(model: Model, plan: Plan) -> tuple[int, int]:
    """Bytes of activations and of the runtime."""
    tokens = min(plan.context, PREFILL_TOKENS)
    if plan.format == "onnx":
        # float32: the hidden state and what a block makes of it (about 12 times its width), attention scores of one
        # layer, and logits of every position
        floats = tokens * (12 * model.hidden_size + model.num_heads * plan.context)
        floats += tokens * (model.head_parameters // model.hidden_size)
        return 4 * floats * plan.batch, ONNX_RUNTIME_BYTES
    if plan.format == "hf":
        return int(TENSORRT_BYTES_PER_TOKEN_AND_HIDDEN * PREFILL_TOKENS * model.hidden_size), VLLM_RUNTIME_BYTES
    # one activation arena, fixed at build by the largest shape: batch x prompt tokens
    total = TENSORRT_BYTES_PER_TOKEN_AND_HIDDEN * tokens * plan.batch * model.hidden_size
    return int(total), TENSORRT_RUNTIME_BYTES


def _build_peak(model: Model, plan: Plan) -> tuple[int, int] | None:
    if plan.format not in _ENGINES:
        return None
    parameters = model.num_parameters - model.linears * (1 - plan.keep)
    low, high = BUILD_BYTES_PER_PARAMETER
    return int(low * parameters), int(high * parameters)


# ---- speed ---------------------------------------------------------------------------------------------


def _share(target: Target, num_bits: int) -> Range | None:
    """The measured share of bandwidth for weights of so many bits; between the measured ones, both."""
    if not target.decode_share:
        return None
    if num_bits in target.decode_share:
        return target.decode_share[num_bits]
    lows, highs = zip(*target.decode_share.values(), strict=True)
    return min(lows), max(highs)


def _decode(model: Model, plan: Plan, target: Target, streamed: int, kv_cache: int) -> Range | None:
    """Tokens a second of all sequences together: slow with a full cache, fast with an empty one."""
    share = _share(target, _bits(model, plan))
    if share is None or target.bandwidth is None or streamed < PREDICTED_FROM_BYTES:
        return None
    seconds = (streamed / (target.bandwidth * share[1]), (streamed + kv_cache) / (target.bandwidth * share[0]))
    if target.fp16_tflops and target.prefill_share:
        work = 2 * (model.linears * plan.keep + model.head_parameters) * plan.batch
        low, high = target.prefill_share
        seconds = (
            max(seconds[0], work / (target.fp16_tflops * 1e12 * high)),
            max(seconds[1], work / (target.fp16_tflops * 1e12 * low)),
        )
    return plan.batch / seconds[1], plan.batch / seconds[0]


def _first_token(model: Model, plan: Plan, target: Target, streamed: int) -> Range | None:
    """Seconds from a prompt to its first token, one sequence."""
    if not target.fp16_tflops or not target.prefill_share or not target.bandwidth:
        return None
    if streamed < PREDICTED_FROM_BYTES:
        return None
    tokens = min(plan.prompt, plan.context)
    attention = 2 * tokens * tokens * model.num_heads * model.head_dim * model.num_layers  # causal: half of the square
    work = 2 * (model.linears * plan.keep * tokens + model.head_parameters) + attention
    low, high = target.prefill_share
    share = _share(target, _bits(model, plan)) or (1.0, 1.0)
    fast = max(work / (target.fp16_tflops * 1e12 * high), streamed / (target.bandwidth * share[1]))
    slow = max(work / (target.fp16_tflops * 1e12 * low), streamed / (target.bandwidth * share[0]))
    return fast, slow


# ---- what would fit ------------------------------------------------------------------------------------


Takes = Callable[[Plan], bool]


def anything(plan: Plan) -> bool:
    """Where only bytes are asked for."""
    return True


def check(model: Model, plan: Plan, target: Target, takes: Takes = anything) -> Sizing:
    """The plan's sizing. Raises DoesNotFit, with the breakdown and what would fit, when it is too big.

    takes: whether the format's reader can hold the model as another plan has it (`exporters.answer.taker`).
    """
    sizing = size(model, plan, target)
    if sizing.fits:
        return sizing
    suggestions = what_fits(model, plan, target, takes)
    best = next((s.text for s in suggestions if s.made), None)
    way_out = f"this would fit: {best}" if best else "nothing that can be made today fits there"
    raise DoesNotFit(
        f"{model.name} needs {sizing.run_peak / 1e9:.2f} GB on {target.name} at context {plan.context} and batch "
        f"{plan.batch}, and {sizing.usable / 1e9:.2f} GB of {sizing.memory / 1e9:.0f} are usable; {way_out}",
        sizing,
        suggestions,
    )


def most_sequences(model: Model, plan: Plan, target: Target, most: int = MOST_SEQUENCES) -> int:
    """How many sequences of the plan's context fit at once, at most `most`; 0 when not even one does."""
    return _largest(most, lambda n: size(model, replace(plan, batch=n), target).fits)


def what_fits(model: Model, plan: Plan, target: Target, takes: Takes = anything) -> list[Suggestion]:
    """Single changes that make it fit, then pairs of them if none does; every one has been sized and fits.

    What `takes` refuses is not among them: nothing is suggested that `compress export` would not make.
    """
    found = [s for s in _changes(model, plan, target) if takes(s.sizing.plan)]
    if not any(s.made for s in found):
        for fewer in _fewer_bits(model, plan):
            smaller = replace(plan, num_bits=fewer)
            found += [
                replace(
                    s,
                    text=f"{_bits_text(fewer, plan.format)} and {s.text}",
                    made=s.made and fewer in MADE_BITS[plan.format],
                )
                for s in _changes(model, smaller, target)
                if takes(s.sizing.plan)
            ]
    found += [s for s in _elsewhere(model, plan, target) if takes(s.sizing.plan)]
    return sorted(found, key=lambda s: not s.made)


def _changes(model: Model, plan: Plan, target: Target) -> Iterator[Suggestion]:
    def sized(changed: Plan) -> Sizing | None:
        sizing = size(model, changed, target)
        return sizing if sizing.fits else None

    for bits in _fewer_bits(model, plan):
        if sizing := sized(replace(plan, num_bits=bits)):
            yield Suggestion(text=_bits_text(bits, plan.format), sizing=sizing, made=bits in MADE_BITS[plan.format])
    context = _largest(plan.context // _STEP, lambda n: bool(sized(replace(plan, context=n * _STEP)))) * _STEP
    if context and (sizing := sized(replace(plan, context=context))):
        yield Suggestion(text=f"--context {context}", sizing=sizing, made=True)
    batch = _largest(plan.batch - 1, lambda n: bool(sized(replace(plan, batch=n))))
    if batch and (sizing := sized(replace(plan, batch=batch))):
        yield Suggestion(text=f"--batch {batch}", sizing=sizing, made=True)
    if plan.kv_bits > 8 and (sizing := sized(replace(plan, kv_bits=8))):
        made = 8 in KV_BITS[plan.format] and _bits(model, plan) >= 8  # the command makes weights of 8 bits as well
        text = "a KV cache of 8 bits" + (" (compress int8 --kv-cache int8)" if made else "")
        yield Suggestion(text=text, sizing=sizing, made=made)
    kept = _largest(19, lambda n: bool(sized(replace(plan, keep=n / 20))))
    if kept and (sizing := sized(replace(plan, keep=kept / 20))):
        left = (model.num_parameters - model.linears * (1 - kept / 20)) / 1e6
        made = _bits(model, plan) >= 16  # what is quantized is not pruned any more
        text = f"pruning {100 - 5 * kept} % of the decoder's weights" + (
            f" (compress prune --params {left:.0f}M)" if made else ""
        )
        yield Suggestion(text=text, sizing=sizing, made=made)


def _elsewhere(model: Model, plan: Plan, target: Target) -> Iterator[Suggestion]:
    """The smallest machine of the same kind that takes the plan as it is."""
    others = [t for t in TARGETS.values() if plan.format in t.formats and t.name != target.name]
    for other in sorted(others, key=lambda t: t.usable_bytes):
        sizing = size(model, plan, other)
        if sizing.fits and (other.unified, other.has_gpu) == (target.unified, target.has_gpu):
            yield Suggestion(text=f"--target {other.name}", sizing=sizing, made=True)
            return


def _bits_text(bits: int, format: str) -> str:
    int8 = "compress int8 --static" if format == "edge" else "compress int8 --scheme w8a16"
    way = {4: "compress awq --bits 4", 8: int8}[bits]
    return f"weights of {bits} bits" + (f" ({way})" if bits in MADE_BITS[format] else "")


def _fewer_bits(model: Model, plan: Plan) -> list[int]:
    return [bits for bits in (8, 4) if bits < _bits(model, plan)]


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n of 1..most that fits, when fitting gets harder with n; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _rounded(value: Range | None) -> list[float] | None:
    return None if value is None else [float(f"{v:.4g}") for v in value]
