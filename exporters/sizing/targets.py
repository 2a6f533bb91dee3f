"""The machines that an artifact is sized for, as data: every figure with where it comes from.

Gigabytes are decimal, as data sheets print them; the memory that a driver reports is a few per cent more, so a model
that fits here fits there. A figure that nobody publishes is None, and nothing is predicted from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GB = 10**9
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A machine.

    memory_bytes: what it has; `usable` is the share of it that a model may take. bandwidth: bytes a second from
    memory. fp16_tflops, int8_tops: peak dense arithmetic (10**12 operations a second). sm: CUDA compute capability.
    unified: CPU and GPU share the memory. formats: those that its readers take, the default first. context: tokens,
    when none are asked for. decode_share: measured share of the bandwidth that decoding reaches, by bits a weight;
    prefill_share: the same for arithmetic and the prompt. sources: figure -> where it is from.
    """

    name: str
    title: str
    memory_bytes: int
    usable: float
    bandwidth: float | None
    fp16_tflops: float | None
    int8_tops: float | None
    sm: str | None
    unified: bool
    jetpack: str | None
    tensorrt: str | None
    precisions: tuple[str, ...]
    formats: tuple[str, ...]
    context: int
    decode_share: Mapping[int, Range] | None
    prefill_share: Range | None
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def usable_bytes(self) -> int:
        """Bytes that weights, caches, activations and the runtime may take together."""
        return int(self.memory_bytes * self.usable)

    @property
    def has_gpu(self) -> bool:
        return self.sm is not None

    def to_json(self) -> dict[str, Any]:
        """The figures that a manifest or `compress targets --json` shows."""
        return {
            "name": self.name,
            "title": self.title,
            "memory_bytes": self.memory_bytes,
            "usable": self.usable,
            "usable_bytes": self.usable_bytes,
            "bandwidth_bytes_per_s": self.bandwidth,
            "fp16_tflops": self.fp16_tflops,
            "int8_tops": self.int8_tops,
            "sm": self.sm,
            "unified_memory": self.unified,
            "jetpack": self.jetpack,
            "tensorrt": self.tensorrt,
            "precisions": list(self.precisions),
            "formats": list(self.formats),
            "context": self.context,
            "decode_share": {str(k): list(v) for k, v in self.decode_share.items()} if self.decode_share else None,
            "prefill_share": list(self.prefill_share) if self.prefill_share else None,
            "sources": dict(self.sources),
        }


# ---- what several machines have in common --------------------------------------------------------------

_VLLM_SHARE = "vLLM engine arguments: --gpu-memory-utilization, default 0.9"
_JETSON_SHARE = "NVIDIA/skills jetson-inference-mem-tune, defaults by module: 0.50 Nano, 0.60 NX, 0.70 AGX, 0.75 Thor"
_JETSON_CONTEXT = "NVIDIA/skills jetson-inference-mem-tune: 4096 tokens on Nano and NX, 8192 on AGX and Thor"
_SERVER_FORMATS = (
    "TensorRT-LLM removed its engine back end (legacy/tensorrt-backend-removal): servers take the Hugging Face folder"
)
_A100_FORMATS = f"{_SERVER_FORMATS}; TensorRT Edge-LLM 0.11 wheels carry an sm80 payload"
_HOPPER_FORMATS = f"{_SERVER_FORMATS}; TensorRT Edge-LLM 0.11 has no sm90 payload"
_JETSON_FORMATS = (
    "TensorRT Edge-LLM 0.11 support matrix; upstream vLLM runs on Orin from 0.20 with JetPack 7.2, but "
    "jetson-inference-mem-tune keeps it off modules of 8 GB"
)
_TENSORRT = "onnx-tensorrt changelog: RMSNormalization, RotaryEmbedding and TensorScatter are parsed from 10.15"
_JETPACK = (
    "TensorRT Edge-LLM 0.11 support matrix: JetPack 7.2 official, 6.2 compatible; TensorRT documentation: JetPack 6.2 "
    "has 10.3, 7.2 has 10.x, 7.2.2 and later 11.4.1"
)
_ORIN_DECODE = (
    "share of bandwidth that published INT4 runs reach: Edge-LLM 0.9 performance-benchmarks, Qwen3 0.6B to 8B: "
    "49-77 % (AGX 64 GB), 62-90 % (NX 16 GB), 58-74 % (Nano at 68 GB/s); TensorRT-LLM README4Jetson 78-82 %; "
    "FP16 76 % (llm-awq tinychat)"
)
_ORIN_PREFILL = (
    "share of FP16 peak that published first-token times reach on AGX Orin: Edge-LLM 0.8, 370 tokens, 28-44 %; "
    "TensorRT-LLM README4Jetson, 128 and 512 tokens, 46-66 %; llm-awq tinychat, 256 to 4096 tokens, 51-54 %"
)
_BORROWED_PREFILL = f"no published first-token time was found for this machine; borrowed from AGX Orin: {_ORIN_PREFILL}"
_A100_DECODE = (
    "INT4 36-48 % (gpt-fast Llama-2-7B, llm-awq tinychat Llama-3-8B), 16 bit 60-78 % (the same two); which A100 "
    "tinychat used is not stated, so both bandwidths were tried"
)
_HOPPER_DECODE = (
    "Model-Optimizer benchmark.md, H200, TensorRT-LLM 0.15, Llama-3.1-8B at batch 1: INT4 22 %, bfloat16 58 % of "
    "bandwidth, prompt included; one measurement each, so a range of a fifth to either side is assumed"
)
_ORIN_SHARE = {4: (0.49, 0.90), 16: (0.49, 0.90)}
_A100_SHARE = {4: (0.36, 0.48), 16: (0.60, 0.78)}
_HOPPER_SHARE = {4: (0.18, 0.27), 16: (0.46, 0.70)}
_PREFILL_SHARE = (0.27, 0.66)
_AMPERE = ("fp32", "tf32", "bf16", "fp16", "int8", "int4 weights")
_HOPPER = (*_AMPERE, "fp8")
_ORIN = ("fp32", "fp16", "int8", "int4 weights")


def _orin_peak(num_sm: int, gigahertz: float) -> dict[str, float]:
    """Dense tensor-core peak of an Orin GPU, whose SM does 1024 FP16 or 2048 INT8 multiply-adds a clock."""
    fp16 = num_sm * 1024 * 2 * gigahertz / 1000
    return {"fp16_tflops": round(fp16, 1), "int8_tops": round(2 * fp16, 1)}


def _orin_sources(module: str, num_sm: int, gigahertz: float) -> dict[str, str]:
    peak = (
        f"computed: {num_sm} SM x 1024 (FP16) or 2048 (INT8) multiply-adds x 2 x {gigahertz} GHz, dense, no DLA; "
        f"SMs and clock from NVIDIA's data sheet of {module}"
    )
    return {
        "memory_bytes": f"NVIDIA data sheet of {module}",
        "bandwidth": f"NVIDIA data sheet of {module}",
        "usable": _JETSON_SHARE,
        "fp16_tflops": peak,
        "int8_tops": peak,
        "sm": "NVIDIA CUDA GPUs: Jetson Orin is 8.7",
        "jetpack": _JETPACK,
        "tensorrt": _JETPACK,
        "precisions": "TensorRT Edge-LLM 0.11 support matrix: FP16, INT8 and INT4 on Orin",
        "formats": _JETSON_FORMATS,
        "context": _JETSON_CONTEXT,
        "decode_share": _ORIN_DECODE,
        "prefill_share": _ORIN_PREFILL,
    }


def _server_sources(sheet: str, formats: str, decode: str, sm: str) -> dict[str, str]:
    return {
        "memory_bytes": sheet,
        "bandwidth": sheet,
        "usable": _VLLM_SHARE,
        "fp16_tflops": f"{sheet}; dense: half of the figure with sparsity where the sheet gives that one",
        "int8_tops": f"{sheet}; dense: half of the figure with sparsity where the sheet gives that one",
        "sm": f"NVIDIA CUDA GPUs: {sm}",
        "tensorrt": _TENSORRT,
        "precisions": sheet,
        "formats": formats,
        "context": "this project's choice: 8192 tokens",
        "decode_share": decode,
        "prefill_share": _BORROWED_PREFILL,
    }


_A100_SHEET = "NVIDIA A100 Tensor Core GPU data sheet"
_H100_SHEET = "NVIDIA H100 Tensor Core GPU data sheet, SXM"
_H200_SHEET = "NVIDIA H200 Tensor Core GPU data sheet, SXM"
_AGX_64, _AGX_32 = "Jetson AGX Orin 64GB", "Jetson AGX Orin 32GB"
_NX_16, _NX_8, _NANO = "Jetson Orin NX 16GB", "Jetson Orin NX 8GB", "Jetson Orin Nano 8GB"

_ALL = (
    Target(
        name="a100-40g", title="NVIDIA A100 40 GB",
        memory_bytes=40 * GB, usable=0.9, bandwidth=1555e9, fp16_tflops=312.0, int8_tops=624.0,
        sm="8.0", unified=False, jetpack=None, tensorrt=">= 10.15",
        precisions=_AMPERE, formats=("hf", "onnx-trt", "tensorrt", "edge", "onnx"), context=8192,
        decode_share=_A100_SHARE, prefill_share=_PREFILL_SHARE,
        sources=_server_sources(_A100_SHEET, _A100_FORMATS, _A100_DECODE, "A100 is 8.0"),
    ),
    Target(
        name="a100", title="NVIDIA A100 80 GB",
        memory_bytes=80 * GB, usable=0.9, bandwidth=2039e9, fp16_tflops=312.0, int8_tops=624.0,
        sm="8.0", unified=False, jetpack=None, tensorrt=">= 10.15",
        precisions=_AMPERE, formats=("hf", "onnx-trt", "tensorrt", "edge", "onnx"), context=8192,
        decode_share=_A100_SHARE, prefill_share=_PREFILL_SHARE,
        sources=_server_sources(f"{_A100_SHEET}, SXM (PCIe: 1935 GB/s)", _A100_FORMATS, _A100_DECODE, "A100 is 8.0"),
    ),
    Target(
        name="h100", title="NVIDIA H100 80 GB SXM",
        memory_bytes=80 * GB, usable=0.9, bandwidth=3350e9, fp16_tflops=989.5, int8_tops=1979.0,
        sm="9.0", unified=False, jetpack=None, tensorrt=">= 10.15",
        precisions=_HOPPER, formats=("hf", "onnx-trt", "tensorrt", "onnx"), context=8192,
        decode_share=_HOPPER_SHARE, prefill_share=_PREFILL_SHARE,
        sources=_server_sources(_H100_SHEET, _HOPPER_FORMATS, f"borrowed from H200: {_HOPPER_DECODE}", "H100 is 9.0"),
    ),
    Target(
        name="h200", title="NVIDIA H200 141 GB SXM",
        memory_bytes=141 * GB, usable=0.9, bandwidth=4800e9, fp16_tflops=989.5, int8_tops=1979.0,
        sm="9.0", unified=False, jetpack=None, tensorrt=">= 10.15",
        precisions=_HOPPER, formats=("hf", "onnx-trt", "tensorrt", "onnx"), context=8192,
        decode_share=_HOPPER_SHARE, prefill_share=_PREFILL_SHARE,
        sources=_server_sources(_H200_SHEET, _HOPPER_FORMATS, _HOPPER_DECODE, "H200 is 9.0"),
    ),
    Target(
        name="orin", title=_AGX_64,
        memory_bytes=64 * GB, usable=0.70, bandwidth=204.8e9, **_orin_peak(16, 1.3),
        sm="8.7", unified=True, jetpack="7.2 (6.2 compatible)", tensorrt="10.x; 11.4.1 from JetPack 7.2.2",
        precisions=_ORIN, formats=("edge", "onnx-trt", "tensorrt", "hf", "onnx"), context=8192,
        decode_share=_ORIN_SHARE, prefill_share=_PREFILL_SHARE, sources=_orin_sources(_AGX_64, 16, 1.3),
    ),
    Target(
        name="orin-32g", title=_AGX_32,
        memory_bytes=32 * GB, usable=0.70, bandwidth=204.8e9, **_orin_peak(14, 0.93),
        sm="8.7", unified=True, jetpack="7.2 (6.2 compatible)", tensorrt="10.x; 11.4.1 from JetPack 7.2.2",
        precisions=_ORIN, formats=("edge", "onnx-trt", "tensorrt", "hf", "onnx"), context=8192,
        decode_share=_ORIN_SHARE, prefill_share=_PREFILL_SHARE, sources=_orin_sources(_AGX_32, 14, 0.93),
    ),
    Target(
        name="orin-nx-16g", title=_NX_16,
        memory_bytes=16 * GB, usable=0.60, bandwidth=102.4e9, **_orin_peak(8, 0.918),
        sm="8.7", unified=True, jetpack="7.2 (6.2 compatible)", tensorrt="10.x",
        precisions=_ORIN, formats=("edge", "onnx-trt", "tensorrt", "hf", "onnx"), context=4096,
        decode_share=_ORIN_SHARE, prefill_share=_PREFILL_SHARE, sources=_orin_sources(_NX_16, 8, 0.918),
    ),
    Target(
        name="orin-nx-8g", title=_NX_8,
        memory_bytes=8 * GB, usable=0.60, bandwidth=102.4e9, **_orin_peak(8, 0.765),
        sm="8.7", unified=True, jetpack="7.2 (6.2 compatible)", tensorrt="10.x",
        precisions=_ORIN, formats=("edge", "onnx-trt", "tensorrt", "onnx"), context=4096,
        decode_share=_ORIN_SHARE, prefill_share=_PREFILL_SHARE, sources=_orin_sources(_NX_8, 8, 0.765),
    ),
    Target(
        name="orin-nano", title=_NANO,
        memory_bytes=8 * GB, usable=0.50, bandwidth=68e9, **_orin_peak(8, 0.625),
        sm="8.7", unified=True, jetpack="7.2 (6.2 compatible)", tensorrt="10.x",
        precisions=_ORIN, formats=("edge", "onnx-trt", "tensorrt", "onnx"), context=4096,
        decode_share=_ORIN_SHARE, prefill_share=_PREFILL_SHARE,
        sources={
            **_orin_sources(_NANO, 8, 0.625),
            "bandwidth": f"NVIDIA data sheet of {_NANO}: 68 GB/s; the Super power modes of JetPack 6.2 raise it to 102",
        },
    ),
    Target(
        name="thor", title="Jetson AGX Thor 128GB (T5000)",
        memory_bytes=128 * GB, usable=0.75, bandwidth=273e9, fp16_tflops=258.8, int8_tops=None,
        sm="11.0", unified=True, jetpack="7.0 to 7.2", tensorrt="10.13 (JetPack 7.1); 11.4.1 from 7.2.2",
        precisions=("fp32", "bf16", "fp16", "fp8", "int8", "int4 weights", "nvfp4"),
        formats=("edge", "onnx-trt", "tensorrt", "hf", "onnx"), context=8192,
        decode_share=_ORIN_SHARE, prefill_share=_PREFILL_SHARE,
        sources={
            "memory_bytes": "NVIDIA data sheet of Jetson T5000",
            "bandwidth": "NVIDIA data sheet of Jetson T5000",
            "usable": _JETSON_SHARE,
            "fp16_tflops": "computed: an eighth of the 2070 sparse FP4 TFLOPS in NVIDIA's data sheet of Jetson T5000",
            "sm": "NVIDIA CUDA GPUs, CUDA 13: Thor is 11.0",
            "jetpack": "TensorRT Edge-LLM 0.11 payloads: JetPack 7.0, 7.1, 7.2",
            "tensorrt": "TensorRT documentation: JetPack 7.1 has 10.13.3.9, 7.2.2 and later 11.4.1",
            "precisions": "TensorRT Edge-LLM 0.11 support matrix",
            "formats": _JETSON_FORMATS,
            "context": _JETSON_CONTEXT,
            "decode_share": f"no published run was found; borrowed from Orin: {_ORIN_DECODE}",
            "prefill_share": _BORROWED_PREFILL,
        },
    ),
    Target(
        name="cpu", title="Desktop CPU, 16 GB, two channels of DDR4-3200",
        memory_bytes=16 * GB, usable=0.75, bandwidth=51.2e9, fp16_tflops=None, int8_tops=None,
        sm=None, unified=True, jetpack=None, tensorrt=None,
        precisions=("fp32", "int8", "int4 weights"), formats=("onnx", "hf"), context=4096,
        decode_share=None, prefill_share=None,
        sources={
            "memory_bytes": "this project's choice of a modest machine",
            "usable": "this project's choice: a quarter is left to the system and other programs",
            "bandwidth": "computed: 2 channels x 8 bytes x 3200 million transfers a second (JEDEC DDR4)",
            "precisions": "ONNX Runtime CPU execution provider",
            "formats": "ONNX Runtime; transformers",
            "context": "this project's choice: 4096 tokens",
        },
    ),
    Target(
        name="lambda", title="AWS Lambda function, 10,240 MB",
        memory_bytes=10_240 * 10**6, usable=0.9, bandwidth=None, fp16_tflops=None, int8_tops=None,
        sm=None, unified=True, jetpack=None, tensorrt=None,
        precisions=("fp32", "int8", "int4 weights"), formats=("onnx",), context=2048,
        decode_share=None, prefill_share=None,
        sources={
            "memory_bytes": "AWS Lambda quotas: at most 10,240 MB of memory; container images of at most 10 GB",
            "usable": "this project's choice: a tenth is left to the interpreter and the runtime's own agent",
            "precisions": "ONNX Runtime CPU execution provider; AWS Lambda has no GPU",
            "formats": "only a bundle without torch fits a function's image and starts in time",
            "context": "this project's choice: 2048 tokens",
        },
    ),
)  # fmt: skip

TARGETS: dict[str, Target] = {target.name: target for target in _ALL}
