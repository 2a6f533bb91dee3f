"""The decoder for what a folder holds, on what this machine has; why it is not a quicker one is said."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.runtime.engine_stamp import ENGINE
from compress.runtime.runner import Decoder
from compress.tell import SILENT, Tell

Runtime = Literal["auto", "gpu", "torch", "onnx", "tensorrt"]
RUNTIMES: tuple[Runtime, ...] = ("auto", "gpu", "torch", "onnx", "tensorrt")


def open_decoder(
    folder: Path,
    *,
    capacity: int,
    batch: int = 1,
    runtime: Runtime = "auto",
    graphs: bool = True,
    tell: Tell = SILENT,
) -> Decoder:
    """A decoder with room for `capacity` tokens a sequence.

    gpu: the decode kernels (`gpu_decoder`); torch: transformers' forward, on a GPU if there is one; onnx: ONNX Runtime
    on the CPU; tensorrt: the folder's engine, on the card that it was built for. auto: what a folder without weights
    holds (tensorrt, onnx), else gpu where there is one and it can, else torch.
    """
    import torch

    has_weights = next(folder.glob("*.safetensors"), None) is not None
    has_graph = next(folder.glob("*.onnx"), None) is not None
    has_engine = (folder / ENGINE).exists()
    if runtime == "auto" and has_engine and has_graph and not torch.cuda.is_available():
        tell.note(f"{folder / ENGINE} needs the GPU that it was built for; the graph beside it runs on the CPU instead")
        has_engine = False
    if runtime == "tensorrt" or (runtime == "auto" and has_engine and not has_weights):
        from compress.runtime.tensorrt_decoder import TensorrtDecoder

        return TensorrtDecoder.open(folder, capacity=capacity, batch=batch, graphs=graphs, tell=tell)
    if runtime == "onnx" or (runtime == "auto" and has_graph and not has_weights):
        from compress.runtime.ort_decoder import OrtDecoder

        return OrtDecoder.open(folder, capacity=capacity, batch=batch)
    if not has_weights:
        raise _not_a_model(folder)
    on_gpu = torch.cuda.is_available()
    if runtime == "gpu" and not on_gpu:
        raise ConfigError(
            "--runtime gpu: PyTorch sees no GPU here; use --runtime torch, or `compress doctor` to see why"
        )
    if on_gpu and runtime in ("gpu", "auto"):
        from compress.runtime import gpu_weights

        try:
            return gpu_weights.open_decoder(folder, capacity=capacity, batch=batch, graphs=graphs)
        except UnsupportedError as e:
            if runtime == "gpu":
                raise
            tell.note(f"transformers' own forward is used, which is slower: {e}")
    from compress.runtime.resident import TorchDecoder

    device, dtype = ("cuda", torch.float16) if on_gpu else ("cpu", torch.float32)
    return TorchDecoder.open(folder, capacity=capacity, batch=batch, device=device, dtype=dtype)


def _not_a_model(folder: Path) -> ArtifactError:
    if next(folder.glob("*.engine"), None) or next(folder.glob("*.plan"), None):
        return ArtifactError(
            f"{folder} holds a TensorRT engine that is not called {ENGINE}, or that --runtime does not run; pass "
            "--runtime tensorrt for one that build_engine.py built, else the artifact that it was made from"
        )
    return ArtifactError(f"{folder} holds neither safetensors nor an .onnx graph; pass a model, artifact or export")
