"""The `onnx` format: onnxruntime-genai's folder for a CPU, made by its builder, checked, and able to run by itself.

What is in the folder: model.onnx, model.onnx.data, genai_config.json and the tokenizer, as onnxruntime-genai reads
them, and run.py, which needs onnxruntime, numpy and tokenizers, and jinja2 where there is a chat template.

INT4 artifacts are read by the builder; INT8 ones are put into its dense graph (`exporters.genai.int8`). Inputs that an
artifact quantizes are quantized in the graph by the same rule. What weights alone are multiplied with is the option
`activations`:

    float32   exactly what the artifact says; the default of INT4
    int16     each input as the sum of two int8 numbers, through the int8 kernel: within 1e-3 of the artifact's logits,
              closer than the float16 arithmetic of GPU readers, and about twice as fast as float32 on large layers;
              the default of INT8 weights, which float32 would widen to four times their bytes when they are loaded
    int8      one int8 number, as llama.cpp does it: fastest, and about 1e-2 away

The option `head` is for the last two: `int8` stores the output matrix in 8 bits (`exporters.genai.head`), `float` as
the artifact has it. Default: 8 bits, whose error is far below that of the other weights (docs/benchmarks-speed.md).
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import ConfigError, UnsupportedError
from compress.files import json_bytes, read_json, write_bytes_atomically
from compress.formats import Stored, compressed_tensors
from compress.quantized import QuantizedWeight
from exporters import reference
from exporters.genai import builder as genai_builder
from exporters.genai import bundle
from exporters.genai import graph as genai_graph
from exporters.genai import head as genai_head
from exporters.genai import int8 as genai_int8
from exporters.genai.bundle.run import Decoder
from exporters.genai.check import block_linears, block_products, compare_weights, node_sources
from exporters.genai.families import LAYOUT, check_config
from exporters.reader import Job, Written
from exporters.readme import FOLDER, Usage

# Of the logits, relative (Frobenius), against the artifact's float32 forward. Float32 sums in another order differ by
# about 1e-6; a rotary table, norm or weight that is wrong by one part in a thousand shows above 1e-4.
TOLERANCES = {"float32": 1e-4, "int16": 1e-3, "int8": 5e-2}
# With an output matrix in 8 bits: rounding to steps of 1/127 of a block's largest value moves Gaussian ones by 5e-3.
HEAD_TOLERANCE = 2e-2
# With inputs that the artifact quantizes: so many times what that changes (`reference.input_noise`). 0.04 to 0.6 were
# measured, two independent roundings give 1.4. That no scale is wrong and no quantizer missing `check` has seen before.
OF_NOISE = 1.5
ACCURACY_LEVELS = {"float32": 1, "int16": 4, "int8": 4}  # of MatMulNBits; 4 lets it quantize activations to int8


def write(job: Job) -> Written:
    """See `exporters.reader`. Options: `activations` (`float32`, `int16` or `int8`)."""
    folder = job.source.folder
    activations = check(folder, job)
    with tempfile.TemporaryDirectory(dir=job.staged.parent) as scratch:
        job.say(f"onnx: {genai_builder.PACKAGE}'s builder writes the graph")
        built = Path(scratch, "built")
        graph = build_graph(folder, job.artifact, Path(scratch), built, activations)
        genai_graph.fix_head_size(graph, int(read_json(built / "genai_config.json")["model"]["decoder"]["head_size"]))
        tied = rewrite(graph, folder)
        if narrow := narrows_head(job, activations):
            genai_head.narrow(graph)
        if activations == "int16":
            genai_graph.split_activations(graph)
        compared = compare_weights(graph, folder, head=narrow)
        if narrow:
            genai_head.compare(graph, output_matrix(folder.checkpoint))
        graph.save(job.staged, importlib.metadata.version(genai_builder.PACKAGE))
        carry_over(built, job)
    bundle.copy_into(job.staged)
    job.say("onnx: running prefill and decoding in ONNX Runtime")
    expected = reference.of_artifact(job.artifact)
    found = decoded(job.staged, expected)
    allowed = max(tolerance(folder, activations, expected), HEAD_TOLERANCE if narrow else 0.0)
    verified = reference.compare(found, expected, tolerance=allowed, what="onnx")
    record = {
        "format": "onnx",
        "provider": "cpu",
        "activations": activations,
        **({"head": "int8"} if narrow else {}),
        "versions": {p: importlib.metadata.version(p) for p in (genai_builder.PACKAGE, "onnxruntime", "onnx")},
        "opset": {i.domain or "ai.onnx": i.version for i in graph.model.opset_import},
        "verified": {
            **verified,
            "runtime": "onnxruntime, CPUExecutionProvider",
            "prefill_tokens": expected.prefill,
            "decode_steps": len(expected.ids_T) - expected.prefill,
            "layers_compared": compared,
        },
    }
    return Written(
        record=record,
        parts=parts(graph, job.staged),
        notes=notes(tied, activations, job.options, narrow),
        usage=USAGE,
    )


USAGE = Usage(
    what="An ONNX model with its tokenizer and a script that generates text on a CPU: no torch, no transformers, no "
    "network. onnxruntime-genai reads the folder too.",
    verb="run it",
    command=("python3", f"{FOLDER}/run.py", "Once upon a time"),
    needs=(f"Python 3.11 to 3.13, and {', '.join(bundle.pins())}: `pip install -r requirements.txt`",),
    more="`--help` lists how text is drawn. Where the tokenizer has a chat template the prompt is a user's message; "
    "`--no-chat` goes on from the bare text.",
)


OWN = "as the artifact quantizes them"


def check(folder: Stored, job: Job) -> str:
    """What weights are multiplied with, `OWN` where the artifact says it of every layer.

    Raises UnsupportedError or ConfigError for what cannot be exported.
    """
    config = folder.checkpoint.config
    check_config(job.artifact, config)
    longest = config.get("max_position_embeddings")
    if longest and job.context > longest:
        raise ConfigError(f"--context {job.context}: {job.artifact} has positions for {longest} tokens; ask for fewer")
    asked = job.options.get("activations")
    if asked is not None and asked not in TOLERANCES:
        raise ConfigError(f"activations {asked!r}: choose one of {', '.join(TOLERANCES)}")
    if folder.format is None:
        if asked not in (None, "float32"):
            raise ConfigError(f"{asked} activations go with quantized weights, and these are dense; use float32")
        return "float32"
    if "lm_head" in folder:
        raise UnsupportedError(
            f"{job.artifact}: its lm_head is quantized, which is not supported by onnx yet; leave lm_head out"
        )
    if folder.format is compressed_tensors:
        return _check_int8(folder, asked)
    scheme = folder.plan.only().weight
    if scheme is not None and LAYOUT.wants(scheme) is not None:
        raise UnsupportedError(
            f"{job.artifact}: {scheme.label()} is not supported by onnx yet; MatMulNBits takes 4 bits in groups of "
            f"{', '.join(str(n) for n in sorted(LAYOUT.group_sizes or ()))}"
        )
    return asked or "float32"


def narrows_head(job: Job, activations: str) -> bool:
    """Whether the output matrix is stored in 8 bits: as asked, and by default where inputs are integers, if it can be.

    ConfigError where it is asked for and inputs stay floats: no kernel takes both.
    """
    asked = job.options.get("head")
    if asked not in (None, "float", "int8"):
        raise ConfigError(f"head {asked!r}: choose float or int8")
    if asked == "int8" and activations not in ("int16", "int8"):
        raise ConfigError(
            f"--head int8: ONNX Runtime multiplies 8 bits by integers, and the activations here are {activations}; "
            "pass --activations int16 or int8 with an artifact of quantized weights"
        )
    if asked is not None:
        return bool(asked == "int8")
    folder = job.source.folder
    width = folder.checkpoint.info(output_matrix_name(folder.checkpoint)).shape[1]
    return activations in ("int16", "int8") and genai_head.block(width) is not None


def output_matrix_name(checkpoint: Checkpoint) -> str:
    """The tensor of the output matrix `[V, H]`: lm_head, or the embedding where the two are one."""
    return "lm_head.weight" if "lm_head.weight" in checkpoint else "model.embed_tokens.weight"


def output_matrix(checkpoint: Checkpoint) -> np.ndarray:
    return as_numpy(checkpoint.tensor(output_matrix_name(checkpoint)))


def _check_int8(folder: Stored, asked: str | None) -> str:
    """See `check`, of an INT8 artifact."""
    path, schemes = folder.checkpoint.path, folder.plan.groups()
    other = next((scheme for scheme in schemes if not LAYOUT.takes_int8(scheme)), None)
    if other is not None:
        raise UnsupportedError(
            f"{path}: {schemes[other][0]} is {other.label()} in a compressed-tensors folder, of which onnx takes "
            "symmetric weights of 8 bits only; quantize the original with `compress awq` or `compress int8` instead"
        )
    if any(scheme.input is None for scheme in schemes):
        return asked or "int16"
    if asked is not None:
        raise ConfigError(
            f"--activations {asked}: {path} itself says how the inputs of each layer are quantized "
            f"({next(iter(schemes)).label()}); leave it out"
        )
    return OWN


def tolerance(folder: Stored, activations: str, expected: reference.Reference) -> float:
    """How far the export's logits may be from the artifact's, relative."""
    least = TOLERANCES.get(activations, TOLERANCES["float32"])
    return max(least, float(f"{OF_NOISE * reference.input_noise(folder.checkpoint.path, expected):.3g}"))


def build_graph(folder: Stored, artifact: Path, scratch: Path, built: Path, activations: str) -> genai_graph.Graph:
    """The builder's graph of the artifact in `built`, each layer of the blocks with its own weights."""
    level = ACCURACY_LEVELS.get(activations, 1)
    if folder.format is compressed_tensors:
        source = genai_int8.stand_in(folder, scratch / "source")
        genai_builder.build(source, built, precision="fp32", accuracy_level=level, fuse_qkv=alike(folder))
        graph = genai_graph.Graph(built)
        put_int8(graph, folder, widened=activations == "float32")
        return graph
    dense = dense_linears(folder) if folder.format else []
    source = genai_builder.stand_in(folder, dense, scratch / "source") if dense else artifact
    precision = "int4" if folder.format else "fp32"
    genai_builder.build(source, built, precision=precision, accuracy_level=level, fuse_qkv=not dense)
    graph = genai_graph.Graph(built)
    restore_dense(graph, folder, dense)
    return graph


def alike(folder: Stored) -> bool:
    """Whether q, k and v of every block can be one product: in one scheme, with the same range of inputs."""
    for layer in block_linears(folder):
        parent, _, leaf = layer.rpartition(".")
        members = [f"{parent}.{name}" for name in ("q_proj", "k_proj", "v_proj")] if leaf == "q_proj" else [layer]
        if len({_kind(folder, name) for name in members}) > 1:
            return False
    return True


def _kind(folder: Stored, layer: str) -> tuple[object, ...]:
    if layer not in folder:
        return ()
    inputs = _inputs(folder, layer)
    return folder.scheme(layer), inputs and inputs.label


def _inputs(folder: Stored, layer: str) -> genai_int8.Inputs | None:
    scheme = folder.scheme(layer).input
    return None if scheme is None else genai_int8.Inputs(scheme=scheme, static=folder.static(layer))


def put_int8(graph: genai_graph.Graph, folder: Stored, *, widened: bool) -> None:
    """Replace each product of the builder's dense graph whose layers the artifact quantizes."""
    for node in list(block_products(graph)):
        sources = node_sources(folder, node.name)
        if sources[0][0] not in folder:
            continue
        weights = [folder.weight(layer) for layer, _ in sources]
        rows = [rows for _, rows in sources]
        joined = QuantizedWeight(
            codes_OI=torch.cat([w.codes_OI[r] for w, r in zip(weights, rows, strict=True)]),
            scale_OG=torch.cat([w.scale_OG[r] for w, r in zip(weights, rows, strict=True)]),
            zero_point_OG=torch.cat([w.zero_point_OG[r] for w, r in zip(weights, rows, strict=True)]),
            scheme=weights[0].scheme,
        )
        genai_int8.replace(graph, node, joined, _inputs(folder, sources[0][0]), widened=widened)


def dense_linears(folder: Stored) -> list[str]:
    """The layers of a quantized artifact's blocks that it left as they were (`compress awq --skip`)."""
    return [layer for layer in block_linears(folder) if layer not in folder]


def restore_dense(graph: genai_graph.Graph, folder: Stored, dense: list[str]) -> None:
    """Give the nodes whose layers are dense their own weights, in place of `genai_builder.stand_in`'s placeholders."""
    for node in list(genai_graph.matmul_nbits(graph)):
        sources = node_sources(folder, node.name)
        if not {layer for layer, _ in sources} & set(dense):
            continue
        rows = [folder.checkpoint.tensor(f"{layer}.weight")[part] for layer, part in sources]
        genai_graph.make_dense(graph, node, as_numpy(torch.cat(rows).t().contiguous()))


def rewrite(graph: genai_graph.Graph, folder: Stored) -> bool:
    """Put the artifact's own embedding and lm_head into the graph; whether they are one."""
    checkpoint = folder.checkpoint
    table = checkpoint.tensor("model.embed_tokens.weight")
    head = checkpoint.tensor("lm_head.weight") if "lm_head.weight" in checkpoint else None
    tied = head is None or (head.dtype == table.dtype and torch.equal(head, table))
    genai_graph.store_embedding(graph, as_numpy(table))
    genai_graph.store_lm_head(graph, None if tied or head is None else as_numpy(head))
    genai_graph.take_logits_from(graph)
    genai_graph.set_windows(graph, windows(checkpoint))
    if is_gemma(checkpoint):
        genai_graph.set_embedding_scale(graph, float(checkpoint.config["hidden_size"]) ** 0.5)
        genai_graph.set_norms(graph, gemma_norms(checkpoint))
    if folder.format:
        genai_graph.drop_symmetric_zero_points(graph)
        genai_graph.fuse_gate_up(graph)
    if folder.format in (None, compressed_tensors) and table.dtype != torch.float32:
        genai_graph.narrow_linears(graph, as_numpy(table[:1]).dtype)
    graph.drop_unused()
    return tied


def windows(checkpoint: Checkpoint) -> list[int | None]:
    """For each block, how many tokens its attention sees, itself included; None where it sees all.

    Configs with `layer_types` say it block by block; the others (Mistral, Phi-3) use their window everywhere.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.path)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * int(config.num_hidden_layers)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def is_gemma(checkpoint: Checkpoint) -> bool:
    return str(checkpoint.config["architectures"][0]).startswith("Gemma")


def gemma_norms(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """`1 + weight` of every norm, by the builder's name for it."""
    out = {}
    for name in checkpoint.names():
        if name.endswith("norm.weight"):
            value: np.ndarray = 1 + checkpoint.tensor(name).to(torch.float32).numpy()
            last = f"model.layers.{checkpoint.config['num_hidden_layers']}.final_norm_layernorm.weight"
            out[last if name == "model.norm.weight" else name] = value
    return out


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The same bits; bfloat16 as ml_dtypes has it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def carry_over(built: Path, job: Job) -> None:
    """genai_config.json with the asked context as its limit, and the artifact's tokenizer and licence."""
    config = read_json(built / "genai_config.json")
    config["search"]["max_length"] = job.context
    config["model"]["eos_token_id"] = ends(config["model"]["eos_token_id"], job.artifact)
    write_bytes_atomically(job.staged / "genai_config.json", json_bytes(config))
    for path in sorted(built.iterdir()):
        if path.name not in ("model.onnx", genai_graph.DATA, "genai_config.json"):
            shutil.copyfile(path, job.staged / path.name)


def ends(found: int | list[int], artifact: Path) -> int | list[int]:
    """What ends a text: what the builder `found` (config, tokenizer), and all of generation_config.json besides."""
    path = artifact / "generation_config.json"
    stated = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = found if isinstance(found, list) else [found]
    more = stated if isinstance(stated, list) else [] if stated is None else [stated]
    every = list(dict.fromkeys([*ids, *more]))
    return found if len(every) == len(ids) else every


def decoded(folder: Path, expected: reference.Reference) -> Tensor:
    """Logits `[T, V]` through the bundle's own decoder: the prompt at once, then token by token."""
    ids = expected.ids_T.tolist()
    decoder = Decoder(folder, capacity=len(ids))
    found = [decoder.forward(ids[: expected.prefill]).copy()]
    found += [decoder.forward([token]).copy() for token in ids[expected.prefill :]]
    return torch.from_numpy(np.concatenate(found))


def parts(graph: genai_graph.Graph, folder: Path) -> dict[str, int]:
    """Bytes by part; `graph` is model.onnx, `other` the norms, biases and rotary tables."""
    sizes = {"decoder linears": 0, "embedding": 0, "lm_head": 0, "other": 0}
    linears = {i for n in genai_graph.matmul_nbits(graph) if not genai_graph.is_identity(n) for i in n.input[1:]}
    weights = {n.input[1].removesuffix("/float32") for n in graph.nodes if n.op_type in ("MatMul", "MatMulInteger")}
    linears |= {f"{name}{leaf}" for name in weights for leaf in ("", *genai_int8.LEAVES)}
    names = dict.fromkeys((genai_graph.LM_HEAD, genai_head.CODES, genai_head.SCALES), "lm_head")
    names[genai_graph.EMBEDDING] = "embedding"
    for name in graph.tensors:
        part = names.get(name) or ("decoder linears" if name in linears else "other")
        sizes[part] += graph.array(name).nbytes
    sizes["graph"] = (folder / "model.onnx").stat().st_size
    return sizes


def notes(tied: bool, activations: str, options: Mapping[str, Any], narrow: bool) -> list[str]:
    """What differs from the artifact, and how to ask for less of it."""
    out = []
    if narrow and options.get("head"):
        out.append("lm_head is in 8 bits, as you asked; the embedding stays as it is")
    elif narrow:
        out.append(
            "lm_head is in 8 bits, a scale for each block of columns (logits within 1e-2); --head float keeps it as "
            "the artifact has it, and reads four times as much of it for every token"
        )
    elif tied:
        out.append("lm_head is the embedding; it is stored once")
    if activations == "int16" and options.get("activations") is None:
        out.append(
            "weights only: inputs enter as int16, within 1e-3 of the artifact's logits; --activations int8 is twice as "
            "quick and about 1e-2 away, as llama.cpp is; float32 is exact and widens the weights to four times their "
            "bytes when they are loaded"
        )
    elif activations not in ("float32", OWN):
        out.append(f"activations are {activations}, as you asked: faster, and not exactly what the artifact says")
    return out
