"""The models that are judged: what a folder is, how it is run, whether two of them can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from compress import tokens
from compress.artifact import BUNDLED, read_manifest
from compress.checkpoint import Checkpoint
from compress.contents import SMALL_BYTES, check_files
from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.files import file_sha256
from compress.folders import check_folder
from compress.model import StreamedModel
from compress.plan import KvScheme
from compress.runtime.ort import OnnxRunner, find_graph
from compress.runtime.streamed import TorchRunner
from evaluators.request import EvaluationRequest
from evaluators.results import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_runner(path: Path, request: EvaluationRequest) -> TorchRunner | OnnxRunner:
    """The runner for what a folder holds: safetensors, or an ONNX graph."""
    import torch

    if next(path.glob("*.engine"), None) or next(path.glob("*.plan"), None):
        raise UnsupportedError(
            f"{path} holds a TensorRT engine, which runs on its own device only; judge the ONNX folder or the "
            "quantized folder that it was built from"
        )
    if next(path.glob("*.safetensors"), None):
        dtype = getattr(torch, request.dtype)
        return TorchRunner.open(path, device=request.device, dtype=dtype)
    if next(path.glob("*.onnx"), None):
        return OnnxRunner.open(path)
    check_folder(path)
    raise ArtifactError(f"{path} holds neither safetensors nor an .onnx graph; pass a model folder")


def hold_cache(runner: TorchRunner | OnnxRunner, path: Path, asked: str | None) -> str | None:
    """Let a model hold keys and values as `asked` (see `EvaluationRequest`); what that is called, None for floats.

    UnsupportedError for a graph, whose cache is its own.
    """
    if isinstance(runner, OnnxRunner):
        if asked == "int8":
            raise UnsupportedError(
                f"--kv-cache int8: {path} is a graph with a cache of its own; judge the artifact that it was made from"
            )
        return None
    if asked is not None:
        runner.model.kv = KvScheme() if asked == "int8" else None
    return None if runner.model.kv is None else runner.model.kv.label()


def subject(path: Path, note: Callable[[str | None], object] = lambda text: None) -> Subject:
    """Facts of a model folder, read from its headers. num_parameters counts what the reader computes with.

    Every byte is read for the content hash, and compared with the folder's manifest on the way.
    """
    small = check_files(path, below=SMALL_BYTES)
    note(small.note)
    if next(path.glob("*.safetensors"), None):
        checkpoint = Checkpoint.open(path)
        checked = check_files(path, known=small.hashes)
        size = sum(checkpoint.info(n).num_bytes for n in checkpoint.names())
        method = checkpoint.config.get("quantization_config", {}).get("quant_method")
        parameters = _parameters(checkpoint)
        return Subject(
            path=str(path),
            sha256=checked.content_sha256(checkpoint),
            format=str(method or "plain"),
            runtime=TorchRunner.runtime,
            weight_bytes=size,
            num_parameters=parameters,
            bits_per_weight=8 * size / max(1, parameters),
        )
    graph = find_graph(path)
    files = [graph, *sorted(path.glob(f"{graph.name}*data")), *sorted(path.glob(f"{graph.stem}*.bin"))]
    size = sum(f.stat().st_size for f in files)
    known = check_files(path, known=small.hashes).hashes
    hashes = {f.name: known.get(f.name) or file_sha256(f) for f in files}
    return Subject(
        path=str(path),
        # The weights lie outside the graph: two exports of one architecture may have the same graph.
        sha256=hashlib.sha256("".join(f"{name}\0{found}\n" for name, found in hashes.items()).encode()).hexdigest(),
        format="onnx",
        runtime=OnnxRunner.runtime,
        weight_bytes=size,
        num_parameters=0,
        bits_per_weight=0.0,
    )


def whose_weights(candidate: Path, asked: Path | None = None) -> str:
    """Which weights a verdict is about: an export's codes need not be those of the artifact that it was made from.

    asked: the export in whose place `candidate` is judged.
    """
    export = asked or candidate
    manifest = read_manifest(export)
    record = {} if manifest is None else manifest.record
    if record.get("stage") != "export":
        return f"the weights of {candidate}"
    made_of = _named(record["parent"]["path"], export)
    if asked is not None and asked.resolve() != candidate.resolve():
        said = f"the weights of {made_of}, which {asked} holds (its {record['format']} runs on its device only)"
    else:
        said = f"the export's own, as its {record['format']} files hold them, made of {made_of}"
    before = record.get("requantized_from")
    if before is None:
        return said
    return f"{said}: quantized again for {record['target']}, not the codes of {_named(before, export)}"


def _named(stated: str, folder: Path) -> str:
    """A manifest's path to another artifact, as it is found from here."""
    return stated if stated == BUNDLED else str(Path(folder, stated).resolve())


def _parameters(checkpoint: Checkpoint) -> int:
    """Parameters of the model as it computes, tied ones once, however they are stored."""
    model = StreamedModel.open(checkpoint.path)
    parameters = dict(model.model.named_parameters())
    return sum({model.source_name(name): p.numel() for name, p in parameters.items()}.values())


def one_tokenizer(request: EvaluationRequest) -> PreTrainedTokenizerBase:
    """The reference's tokenizer; ConfigError when the candidate has another one."""
    tokenizer = tokens.load_tokenizer(request.reference)
    if _same_file(request.candidate / "tokenizer.json", request.reference / "tokenizer.json"):
        return tokenizer  # a second one of 262144 tokens would take 400 MB
    if (request.candidate / "tokenizer.json").exists() or (request.candidate / "tokenizer_config.json").exists():
        other = tokens.load_tokenizer(request.candidate)
        ours, theirs = tokenizer.get_vocab(), other.get_vocab()
        if ours != theirs:
            differing = len(set(ours.items()) ^ set(theirs.items()))
            raise ConfigError(
                f"{request.candidate} and {request.reference} have different tokenizers ({len(theirs)} and {len(ours)} "
                f"tokens, {differing} entries differ); pass the candidate's own original with --reference"
            )
    return tokenizer


def _same_file(one: Path, other: Path) -> bool:
    """Whether two files are there and hold the same bytes."""
    return one.is_file() and other.is_file() and (one.samefile(other) or file_sha256(one) == file_sha256(other))
