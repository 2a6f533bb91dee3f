"""Format `edge`: an ONNX graph for TensorRT Edge-LLM 0.11 (Jetson Orin and Thor, A100), written by its own exporter.

The exporter runs in its own environment (`exporters.edge.env`) on a folder made for it (`exporters.edge.folder`). It
exits with code 0 whatever it made, so nothing is believed: its count of tensors, every weight (`exporters.edge.check`)
and the logits of the graph that it wrote (`exporters.edge.graph`) are compared with the artifact's. `build_engine.sh`,
beside the graph, builds and tries the engine on the device. No TensorRT engine is built or run here.
"""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.files import json_bytes, write_bytes_atomically
from compress.formats import stored
from exporters import reference
from exporters.edge import check as edge_check
from exporters.edge import env as edge_env
from exporters.edge import folder as edge_folder
from exporters.edge import graph as edge_graph
from exporters.reader import Job, Written
from exporters.readme import FOLDER, Usage

LAYOUT = edge_folder.LAYOUT

# float32 against float32, the same weights: only the order of sums differs. Measured: 4e-7 to 1e-6.
TOLERANCE = 1e-4
# Edge-LLM stores float16, so weights that come in float32 or bfloat16 are rounded (2**-11 each).
TOLERANCE_ROUNDED = 5e-3
# Where inputs are rounded: two independent roundings differ by 1.4 times what one changes (`reference.input_noise`).
OF_NOISE = 1.5
# Prompt tokens that enter at once: the activation arena grows with them (`exporters.sizing.predict` assumes the same).
MAX_INPUT_LEN = 2048
# Building an engine: 3 to 4 bytes of memory a parameter (Edge-LLM issue 30).
BUILD_BYTES_PER_PARAMETER = (3, 4)
SMOKE_PROMPT = "The old house stood by the river and"
NOT_RUN = (
    "TensorRT, NVIDIA's plugin kernels, float16 arithmetic and build_engine.sh were not run: the graph was computed in "
    "float32 from the published meaning of its operators"
)

RUNNING = f"""
The script checks the device, builds `engine/`, answers `smoke_input.json` and measures; `--help` lists its settings.
The engine then answers requests in files like that one:

    llm_inference --engineDir engine --inputFile smoke_input.json --outputFile answer.json

Not run when this folder was made: {NOT_RUN}.
"""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What build_engine.sh demands of the device.

    min_l4t: oldest Jetson Linux release, "" for no Jetson; tested_l4t: oldest that Edge-LLM's support matrix has.
    tensorrt: major versions. note: for the user.
    """

    sm: str
    soc: str = ""
    min_l4t: str = ""
    tested_l4t: str = ""
    jetpack: str = ""
    note: str = ""
    tensorrt: str = "10"


# Edge-LLM 0.11 support matrix and the payloads in its wheels (sm80, sm87, sm110; none for sm90). Jetson Linux 36.4.3 is
# JetPack 6.2, 38.2 is 7.0 (NVIDIA's JetPack archive), 39.2 is 7.2 (the wheel's own probe).
_ORIN = Device(
    sm="8.7", soc="Jetson Orin", min_l4t="36.4.3", tested_l4t="39.2", jetpack="7.2 (6.2 at least)", tensorrt="10 11"
)
_A100 = Device(sm="8.0", tensorrt="10 11", note="Edge-LLM supports x86 machines for development, not as deployments")
DEVICES = {
    "orin": _ORIN,
    "orin-32g": _ORIN,
    "orin-nx-16g": _ORIN,
    "orin-nx-8g": _ORIN,
    "orin-nano": _ORIN,
    "thor": Device(
        sm="11.0", soc="Jetson Thor", min_l4t="38.2", tested_l4t="38.2", jetpack="7.0 to 7.2", tensorrt="10 11"
    ),
    "a100": _A100,
    "a100-40g": _A100,
}


def write(job: Job) -> Written:
    """Export `job.artifact` into `job.staged`: llm/ (graph, weights, embedding, tokenizer), build_engine.sh, a prompt.

    Raises UnsupportedError for what Edge-LLM 0.11 gets wrong, ConfigError when its environment cannot be made, and
    ArtifactError when what it wrote is not what the artifact says.
    """
    if job.target.name not in DEVICES:
        raise UnsupportedError(
            f"--target {job.target.name}: TensorRT Edge-LLM {edge_env.VERSION} has no build for it; edge exports run "
            f"on {', '.join(DEVICES)}"
        )
    _need_onnx()
    checkpoint = job.source.folder.checkpoint
    edge_folder.check_model(checkpoint, job.context)
    edge_folder.check_zero_points(checkpoint)
    environment = edge_env.ensure(job.say)
    with tempfile.TemporaryDirectory(prefix="edge-", dir=job.staged.parent) as scratch:
        handed, lines = run_exporter(checkpoint, Path(scratch), environment, job)
        counted = edge_check.check_log(lines, handed)
        (Path(scratch) / "out" / "llm").rename(job.staged / "llm")
    folder = job.staged / "llm"
    remove_metadata(folder / "model.onnx")
    job.say("comparing every weight with the artifact")
    equal = edge_check.check_weights(checkpoint, folder)
    structure = edge_check.check_structure(checkpoint, folder)
    job.say(f"running the graph in float32: {reference.PREFILL} tokens, then {reference.DECODE} one by one")
    wanted = reference.of_artifact(job.artifact)
    found = edge_graph.logits(folder, wanted.ids_T, prefill=wanted.prefill)
    allowed = max(tolerance(checkpoint), float(f"{OF_NOISE * reference.input_noise(job.artifact, wanted):.3g}"))
    compared = reference.compare(found, wanted, tolerance=allowed, what="llm/model.onnx")
    _write_script(job, checkpoint, folder)
    prompt = {
        "batch_size": 1,
        "temperature": 0.0,
        "max_generate_length": 32,
        "requests": [{"messages": [{"role": "user", "content": SMOKE_PROMPT}]}],
    }
    write_bytes_atomically(job.staged / "smoke_input.json", json_bytes(prompt))
    record = {
        "versions": dict(environment.versions),
        "dialect": structure,
        "verified": {
            **compared,
            "prefill": wanted.prefill,
            "decode": len(wanted.ids_T) - wanted.prefill,
            "tensors_loaded": counted[0],
            "tensors_skipped": counted[1],
            "equal": equal,
            "not_run": NOT_RUN,
        },
        "normalised": "metadata that torch.onnx adds (it names folders of the machine) was removed from model.onnx",
    }
    device = DEVICES[job.target.name]
    return Written(
        record=record,
        parts=_parts(folder),
        notes=[*handed.notes, *([device.note] if device.note else []), NOT_RUN],
        usage=_usage(device),
    )


def _usage(device: Device) -> Usage:
    """How the engine is built on the device, and what runs it then."""
    where = device.soc or "the machine"
    release = f"JetPack {device.jetpack}" if device.jetpack else "CUDA"
    majors = " or ".join(device.tensorrt.split())
    return Usage(
        what=f"An ONNX graph, weights and tokenizer for TensorRT Edge-LLM {edge_env.VERSION}; the engine is built on "
        f"{where} itself.",
        verb="build and try its engine there",
        command=("bash", f"{FOLDER}/build_engine.sh"),
        needs=(
            f"a GPU of compute capability {device.sm}, {release}, TensorRT {majors}",
            f"TensorRT Edge-LLM {edge_env.VERSION}, built there: `EDGELLM_BIN` names the folder of llm_build",
        ),
        more=RUNNING,
    )


def tolerance(checkpoint: Checkpoint) -> float:
    """How far the export's logits may be from the artifact's, relative."""
    rounded = any(info.dtype in ("F32", "BF16", "F64") for info in checkpoint.tensors.values())
    return TOLERANCE_ROUNDED if rounded else TOLERANCE


def run_exporter(
    checkpoint: Checkpoint, scratch: Path, environment: edge_env.Environment, job: Job
) -> tuple[edge_folder.Handed, list[str]]:
    """Hand the artifact over and run the exporter into `scratch`/out; returns what was handed and what it counted.

    Its log names folders of this machine, so it stays out of the export: the last one lies beside the environment.
    """
    source, out = scratch / "in", scratch / "out"
    source.mkdir()
    handed = edge_folder.hand_over(checkpoint, source)
    command = [str(environment.python), "-m", edge_env.MODULE, str(source), str(out)]
    # its choices must not depend on the machine: no GPU, no network, one order of sets
    environ = {
        **edge_env.clean_environ(),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
    }
    counts: list[str] = []

    def told(line: str) -> None:
        if "skipped" in line and "Loaded" in line:
            counts.append(line)
        if any(word in line for word in _PROGRESS) and not line.endswith("\u2705"):
            job.say(f"edge: {_short(line, scratch)}")

    job.say(f"running TensorRT Edge-LLM {edge_env.VERSION}'s exporter")
    log = edge_env.log_file()
    code, tail = edge_env.stream(command, say=told, environ=environ, log=log)
    if code or not (out / "llm" / "model.onnx").exists():
        edge_env.refuse_full("\n".join(tail))
        raise ArtifactError(
            f"TensorRT Edge-LLM's exporter failed: {_short(edge_env.reason(tail), scratch)}; its log is {log}"
        )
    return handed, counts


_PROGRESS = ("Loading checkpoint", "Loaded ", "...", "Export complete:", " ERROR ")


def _short(line: str, scratch: Path) -> str:
    """A line of the exporter without its time stamp, its module and our scratch folder."""
    text = re.sub(r"^[\d:]+\s+\w+\s+[\w.]+: ", "", line)
    return text.replace(f"{scratch}/", "").strip()


def remove_metadata(path: Path) -> None:
    """Drop torch.onnx's stack traces and notes from the graph: they hold the exporting machine's folder names.

    Weights lie in another file, so memory is the graph's. Equal graphs give equal bytes afterwards.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    write_bytes_atomically(path, model.SerializeToString(deterministic=True))


def build_script(job: Job, num_parameters: int, weight_bytes: int) -> str:
    """build_engine.sh for the job's target and sizes."""
    device = DEVICES[job.target.name]
    low, high = (n * num_parameters for n in BUILD_BYTES_PER_PARAMETER)
    values: dict[str, Any] = {
        "EDGELLM_VERSION": edge_env.VERSION,
        "TARGET": job.target.name,
        "SM": device.sm,
        "SOC": device.soc,
        "MIN_L4T": device.min_l4t,
        "TESTED_L4T": device.tested_l4t,
        "JETPACK": device.jetpack,
        "TENSORRT_MAJORS": device.tensorrt,
        "BUILD_BYTES_LOW": low,
        "BUILD_BYTES_HIGH": high,
        "WEIGHT_BYTES": weight_bytes,
        "MAX_BATCH_SIZE": job.batch,
        "MAX_INPUT_LEN": min(job.context, MAX_INPUT_LEN),
        "MAX_KV_CACHE_CAPACITY": job.context,
    }
    text = Path(__file__).with_name("build_engine.sh").read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def _write_script(job: Job, checkpoint: Checkpoint, folder: Path) -> None:
    artifact = stored(checkpoint)
    taken = artifact.taken()
    parameters = sum(math.prod(info.shape) for name, info in checkpoint.tensors.items() if name not in taken)
    parameters += sum(math.prod(artifact.shape(layer)) for layer in artifact.layers)
    path = job.staged / "build_engine.sh"
    path.write_text(build_script(job, parameters, sum(_parts(folder).values())), encoding="utf-8")
    path.chmod(0o755)


def _parts(folder: Path) -> dict[str, int]:
    """Bytes by part: quantized products and their scales, lm_head, what else the graph holds, the embedding's file."""
    graph = edge_graph.Graph(folder)
    parts = {"decoder linears": 0, "lm_head": 0, "norms and biases": 0}
    for name, proto in graph.initializers.items():
        size = graph.num_bytes(name)
        if "lm_head" in name:
            parts["lm_head"] += size
        else:
            packed = name.endswith((".qweight", ".scales", ".weight_scale")) or len(proto.dims) == 2
            parts["decoder linears" if packed else "norms and biases"] += size
    parts["graph"] = (folder / "model.onnx").stat().st_size
    parts["embedding"] = (folder / "embedding.safetensors").stat().st_size
    return parts


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError as e:
        raise ConfigError('--format edge needs onnx; pip install "compress-toolkit[edge]"') from e
