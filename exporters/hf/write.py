"""Format `hf`: the folder for vLLM, SGLang and transformers, with files that start a server on it.

    config.json, *.safetensors, tokenizer ...   the artifact's own files, byte for byte
    modelopt/                                    the same codes in ModelOpt's layout, with hf_quant_config.json
    serve/triton, kserve.yaml, kubernetes.yaml   filled in for the target, context and batch

Weights are hard links where the file system allows: they are never written again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import yaml  # type: ignore[import-untyped]

from compress.artifact import MANIFEST, carried_files
from compress.checkpoint import INDEX, Checkpoint
from compress.errors import ArtifactError, UnsupportedError
from compress.files import copy_durably, file_sha256, write_bytes_atomically
from compress.formats import Stored, awq_gemm, compressed_tensors, stored
from compress.kv_cache import LAST_WRONG_VLLM
from exporters.hf import modelopt, serve, vllm_rules
from exporters.hf.layout import LAYOUT
from exporters.reader import Artifact, Job, Written
from exporters.readme import FOLDER, Usage
from exporters.sizing.inventory import inventory, part_of

__all__ = ["LAYOUT", "write"]

WITH_COMPRESS = "transformers 5.23 itself does not load packed zero points"
TRANSFORMERS = """
`serve/` starts the same server under Triton, KServe and Kubernetes. With transformers:

    {imports}

    tokenizer = AutoTokenizer.from_pretrained(".")
    model = {load}
    ids = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
    print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
"""


def write(job: Job) -> Written:
    """Write `job.staged`. Raises ArtifactError when a file or tensor is not the artifact's."""
    notes = _compare_with_architecture(job.source)
    hashes = _copy(job.source, job.staged)
    job.say(f"reading {len(hashes)} files back")
    folder = stored(Checkpoint.open(job.staged))
    made = folder.checkpoint
    opened = _reopen(folder, job)
    notes += vllm_rules.check(folder, job.target.sm)
    layers, note = _modelopt(folder, job)
    if note:
        notes.append(note)
    serving = serve.Serving(
        name=job.artifact.resolve().name,
        context=job.context,
        batch=job.batch,
        share=job.target.usable,
        dtype=str(made.config.get("dtype", "float16")) if folder.layers else "auto",
        kv=folder.plan.kv,
        weight_bytes=sum(info.num_bytes for info in made.tensors.values()),
        gpu=job.target.has_gpu,
    )
    texts = serve.files(serving)
    for name, text in texts.items():
        path = job.staged / "serve" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, text.encode())
        _parse(path)
    record = {
        "reader": "vLLM, SGLang, transformers",
        "modelopt_layers": layers,
        "serve": sorted(texts),
        "kv_cache": _kv_record(folder),
        "verified": {
            "files_equal_to_artifact": len(hashes),
            "tensors_reopened": opened,
            "modelopt_layers_equal_to_artifact": layers,
            "vllm_rules": "checked without vLLM",
        },
    }
    if folder.plan.kv is not None:
        notes.append(
            f"the KV cache is {folder.plan.kv.label()}: it needs vLLM newer than {LAST_WRONG_VLLM} (older ones cut "
            "codes off, or mix up the scales of hybrid models), and leaves it Triton's attention only"
        )
    return Written(record=record, parts=_parts(folder), notes=notes, hashes=hashes, usage=_usage(folder, serving))


def _usage(folder: Stored, serving: serve.Serving) -> Usage:
    """How the folder is served, and how transformers opens it."""
    packages = "torch, transformers, accelerate"
    if folder.format is awq_gemm:
        packages += ", gptqmodel (transformers reads AutoAWQ's layout with it)"
    elif folder.format is not None:
        packages += ", compressed-tensors"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    load = 'AutoModelForCausalLM.from_pretrained(".", device_map="auto")'
    if unpacked_nowhere(folder):
        packages += f", and compress: {WITH_COMPRESS}"
        imports, load = "import compress\n    from transformers import AutoTokenizer", 'compress.load_model(".")'
    vllm = serving.image.partition(":v")[2]
    vllm = f"vLLM newer than {LAST_WRONG_VLLM}" if serving.kv else f"vLLM ({vllm} is the one that serve/ names)"
    return Usage(
        what=f"A Hugging Face folder ({'float' if folder.format is None else folder.format.NAME}) for vLLM, SGLang and "
        "transformers.",
        verb="serve it",
        command=("vllm", "serve", FOLDER, f"--served-model-name={serving.label}", *serve.flags(serving)),
        needs=(f"{vllm}; no server was run when this folder was made", f"with transformers: {packages}"),
        more=TRANSFORMERS.format(imports=imports, load=load),
    )


def unpacked_nowhere(folder: Stored) -> bool:
    """Whether INT4 has packed zero points in compressed-tensors' layout: compressed-tensors 0.20 does not unpack them
    for transformers (`compress` of its pack_quantized/base.py ends early on the meta device)."""
    return folder.format is compressed_tensors and any(
        scheme.weight is not None and scheme.input is None and not scheme.weight.symmetric
        for scheme in folder.plan.groups()
    )


def _kv_record(folder: Stored) -> dict[str, str] | None:
    """How the KV cache is to be held, and by which server; None for the model's own dtype."""
    kv = folder.plan.kv
    return None if kv is None else {"dtype": kv.label(), "vllm": f"> {LAST_WRONG_VLLM}"}


def _compare_with_architecture(artifact: Artifact) -> list[str]:
    """Every tensor of the model must be there, in its shape, and no other. A note where we do not know the model."""
    try:
        _ = artifact.streamed
    except UnsupportedError as e:
        return [f"the tensors were not compared with the model's architecture: {e}"]
    return []


def _copy(artifact: Artifact, staged: Path) -> dict[str, str]:
    """The artifact's files in `staged`, and the sha256 of each. ArtifactError for a copy that is not the artifact's.

    The artifact's own bytes have been read and compared with its manifest (`Artifact.checked`), and a hard link is that
    very file: it is not read for its hash again.
    """
    path, known = artifact.path, artifact.checked.hashes
    shards = sorted({info.file for info in artifact.folder.checkpoint.tensors.values()})
    index = [INDEX] if (path / INDEX).exists() else []
    small = ["config.json", *index, *(p.name for p in carried_files(path))]
    hashes = {}
    for name in [*shards, *small]:
        linked = name in shards and _link(path / name, staged / name)
        if not linked and name not in shards:
            write_bytes_atomically(staged / name, (path / name).read_bytes())
        hashes[name] = known[name] if linked and name in known else file_sha256(staged / name)
        if hashes[name] != (known[name] if name in known else file_sha256(path / name)):
            raise ArtifactError(f"{staged / name} differs from the artifact's; the disk is faulty, run again")
    return hashes


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name, or, where the file system has none, a copy; whether it is the same file."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        copy_durably(source, target)
    return os.path.samefile(source, target)


def _reopen(folder: Stored, job: Job) -> int:
    """Read every tensor once: codes and scales must be in range, everything else finite. Returns how many."""
    made, taken = folder.checkpoint, folder.taken()
    for layer in folder.layers:
        folder.weight(layer)
    for name in made.names():
        if name in taken:
            continue
        value = made.tensor(name)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ArtifactError(f"{job.artifact}: tensor {name} has NaN or infinite values; quantize the model again")
    return len(made.names())


def _modelopt(folder: Stored, job: Job) -> tuple[int, str | None]:
    """The ModelOpt folder, when the codes allow it: number of layers, and a note on its size or why there is none."""
    if folder.format is None or not job.options.get("modelopt", True):
        return 0, None  # plain weights need no hf_quant_config.json
    if folder.format is not awq_gemm:
        return 0, f"no ModelOpt folder: {folder.format.NAME} codes have no counterpart in its layout"
    if not all(scheme.weight and scheme.weight.symmetric for scheme in job.source.plan.groups()):
        return 0, (
            "no ModelOpt folder (hf_quant_config.json): its layout has no zero points, and these codes have them; "
            "`compress awq --sym` makes codes that it can hold"
        )

    def tell(done: int, total: int) -> None:
        if done == total or done % max(1, total // 10) == 0:
            job.say(f"ModelOpt layer {done}/{total}")

    out = folder.checkpoint.path / "modelopt"
    layers = modelopt.write(folder, out, tell)
    size = sum(p.stat().st_size for p in out.iterdir())
    return layers, f"modelopt/ is a second copy of the weights, {size / 1e6:.1f} MB, not counted above"


def _parse(path: Path) -> None:
    """What was written must be what it says it is."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        json.loads(text)
    elif path.suffix == ".yaml":
        list(yaml.safe_load_all(text))


def _parts(folder: Stored) -> dict[str, int]:
    """Bytes by part of the Hugging Face folder; the ModelOpt copy and the small files are parts of their own."""
    model = inventory(folder)
    taken = folder.taken()
    parts = {"decoder linears": 0, "lm_head": 0, "embedding": 0, "norms and biases": 0}
    for name, info in folder.checkpoint.tensors.items():
        packed = "decoder linears" if part_of(name, 2) != "lm_head" else "lm_head"
        parts[packed if name in taken else part_name(name, info.shape)] += info.num_bytes
    if model.tied:
        parts.pop("lm_head")
        parts["embedding (tied with lm_head)"] = parts.pop("embedding")
    parts["tokenizer and configuration"] = sum(
        p.stat().st_size
        for p in folder.checkpoint.path.iterdir()
        if p.is_file() and p.suffix != ".safetensors" and p.name != MANIFEST
    )
    return parts


def part_name(name: str, shape: tuple[int, ...]) -> str:
    """The part of the size table that a tensor belongs to which is stored as it is."""
    known = {"linears": "decoder linears", "other": "norms and biases"}
    part = part_of(name, len(shape))
    return known.get(part, part)
