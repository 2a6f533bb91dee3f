"""Several GPUs of one machine: how the stages that run on them scale, and whether a killed run goes on exactly.

    python tests/bench/scale.py awq --shape llama-3-8b --processes 1 4     # seconds by part, bytes, memory
    python tests/bench/scale.py awq --shape llama-3-70b --blocks 4 --processes 1 4
    python tests/bench/scale.py distill --shape 1b --processes 1 2 4       # FSDP2: tokens/s, MFU, memory
    python tests/bench/scale.py distill --shape llama-3-8b --processes 4
    python tests/bench/scale.py distill --shape 1b --processes 2 --engine fsdp ddp deepspeed
    python tests/bench/scale.py resume --processes 4                       # kill -9 of every process, the same command
    python tests/bench/scale.py powersgd --shape 135m --processes 4        # gradients whole, in 16 bits, as two factors

Processes are started as torchrun starts them, one a GPU (on a CPU they meet through gloo). Models have random weights
in the shapes of real ones and are kept in `--models`. What is finished is kept in `--work`: the same command goes on.
Calls on GPUs of their own (CUDA_VISIBLE_DEVICES) may share both folders. The last lines are a table.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
sys.path[:0] = [str(ROOT), str(BENCH)]  # `compress` and the files beside this one

import busy  # noqa: E402
import distill as one_gpu  # noqa: E402
import gpu  # noqa: E402
import torch  # noqa: E402
from training import Facts, OutOfTime, Work, carry_out, release, texts  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {**gpu.SHAPES, **one_gpu.SHAPES}
# Seconds that the others get once one process has failed.
GRACE = 20.0
# (rows a pass, more options) of a shape whose passes may not fit: the first that is not refused counts. The last ones
# are for cards of 80 GB.
PASSES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "llama-3-8b": [(2, {}), (4, {"checkpointing": True}), (2, {"checkpointing": True})],
}
LARGE_CARD = 100e9
# Steps behind which a profile begins and ends.
PROFILED = (10, 13)
FORWARD = ("collecting statistics", "running the compressed block")


# ---- processes ---------------------------------------------------------------------------------------


class Failed(Exception):
    """A process ended with an error; what it said last."""


def start(work: Work, command: Sequence[object], processes: int, name: str, **more: str) -> list[subprocess.Popen[str]]:
    """The command in so many processes that meet; each writes to files of its own in `work`/logs."""
    logs = work.folder / "logs"
    logs.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    children = []
    for rank in range(processes):
        meeting = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "RANK": str(rank),
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes),
        }  # fmt: skip
        env = {**os.environ, "PYTHONPATH": path, **(meeting if processes > 1 else {}), **more}
        with open(logs / f"{name}.{rank}.log", "w") as log:
            children.append(
                subprocess.Popen(
                    list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, cwd=work.folder, env=env, text=True
                )
            )
    return children


def kill(children: Sequence[subprocess.Popen[str]]) -> None:
    """SIGKILL for all of them, and their ends."""
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
    for child in children:
        child.wait()


def wait(work: Work, children: Sequence[subprocess.Popen[str]], name: str) -> None:
    """Until all have ended. Failed with what the first that failed had said, OutOfTime at the deadline."""
    failed_at = None
    while any(child.poll() is None for child in children):
        if failed_at is None and any(child.poll() for child in children):
            failed_at = time.monotonic()
        if time.monotonic() > work.until or (failed_at is not None and time.monotonic() > failed_at + GRACE):
            kill(children)
            if failed_at is None:
                raise OutOfTime(name)
        time.sleep(0.02)
    wrong = [rank for rank, child in enumerate(children) if child.returncode]
    if wrong:
        # one that another's end took down says less
        said = [(work.folder / "logs" / f"{name}.{rank}.log").read_text()[-3000:] for rank in wrong]
        plain = [text for text in said if "another process of this run has ended" not in text] or said
        raise Failed(plain[0].strip())


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


# ---- what is made once -------------------------------------------------------------------------------


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """A file or folder, made under another name unless it is there; calls beside this one wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            part = path.with_name(path.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            part.rename(path)
    return path


def model_of(options: argparse.Namespace, shape: str, blocks: int | None = None) -> Path:
    """A folder of random weights in a real shape, with a tokenizer of one word an id."""
    sizes = dict(SHAPES[shape])
    name = shape
    if blocks is not None and blocks != sizes["num_hidden_layers"]:
        sizes["num_hidden_layers"], name = blocks, f"{shape}-{blocks}"

    def make(part: Path) -> None:
        if shape in gpu.SHAPES:
            gpu.build(part, sizes, options.device)
        else:
            one_gpu.random_model(part, sizes, options.device)
        release()

    return made(options.models / name, make)


def learner_of(options: argparse.Namespace, shape: str, seed: int) -> Path:
    """A folder of freshly initialised weights with the bundled model's tokenizer, to learn real text."""
    import calibration_data

    def make(part: Path) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, bos_token_id=0, eos_token_id=0)
        config.dtype = "bfloat16"
        torch.manual_seed(seed)
        with torch.device(options.device):
            model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        model.save_pretrained(part)
        del model
        release()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(calibration_data.reference_model() / name, part / name)

    return made(options.models / f"{shape}-learner-{seed}", make)


def prose(work: Work, options: argparse.Namespace) -> Path:
    """Wikipedia articles where `--data` has them, else the bundled text."""
    import calibration_data

    if (options.data / "wikipedia-train.jsonl.xz").exists():
        return texts(work, options.data)[0]
    return Path(calibration_data.default_calibration())


# ---- AWQ ---------------------------------------------------------------------------------------------


def awq(work: Work, options: argparse.Namespace) -> None:
    """`compress awq` balanced; one process sums in as many parts as the largest number of processes."""
    model = model_of(options, options.shape, options.blocks)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    calib = made(
        options.models / f"calib-{vocabulary}-{options.samples}.txt",
        lambda part: gpu.write_text(part, vocabulary, options.samples),
    )
    blocks = options.blocks or SHAPES[options.shape]["num_hidden_layers"]
    for processes in options.processes:
        name = f"awq {options.shape} {blocks} {processes}"
        work.job(name, functools.partial(_awq, work, options, model, calib, processes, name))


def _awq(work: Work, options: argparse.Namespace, model: Path, calib: Path, processes: int, name: str) -> Facts:
    key = name.replace(" ", "-")
    facts = work.folder / f"{key}-facts"
    shutil.rmtree(facts, ignore_errors=True)
    facts.mkdir()
    asked = {
        "model": str(model), "calib": str(calib), "out": str(work.folder / key), "facts": str(facts),
        "samples": options.samples, "device": options.device, "parts": options.parts if processes == 1 else 1,
    }  # fmt: skip
    gpu.drop_from_page_cache(model)
    begun = time.monotonic()
    children = start(work, [sys.executable, __file__, "awq-child", json.dumps(asked)], processes, key)
    wait(work, children, key)
    whole = time.monotonic() - begun
    found = [json.loads((facts / f"{rank}.json").read_text()) for rank in range(processes)]
    sha256 = _sha256(work.folder / key)
    shutil.rmtree(work.folder / key)
    return {
        "processes": processes, "parts": asked["parts"] * processes, "seconds": found[0]["seconds"],
        "with_start_seconds": round(whole, 1), "stages": found[0]["stages"],
        "forward_seconds": sum(found[0]["stages"].get(s, 0.0) for s in FORWARD),
        "search_seconds": found[0]["stages"].get("searching", 0.0), "blocks": found[0]["blocks"],
        "gpu_peak_GB": [f["gpu_peak_bytes"] / 1e9 for f in found],
        "host_peak_GB": [f["host_peak_bytes"] / 1e9 for f in found], "sha256": sha256, "card": found[0]["card"],
    }  # fmt: skip


def _sha256(folder: Path) -> str:
    from compress.files import file_sha256

    named = "".join(f"{path.name} {file_sha256(path)}\n" for path in sorted(folder.glob("*.safetensors")))
    return hashlib.sha256(named.encode()).hexdigest()


class _Clock:
    """Seconds by what a run says it is doing, the GPU's work waited for at each change."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self.stages: dict[str, float] = {}
        self.blocks: list[float] = []
        self.stage, self.since, self.block = "opening, calibration text", time.perf_counter(), 0.0

    def now(self) -> float:
        if self.on_gpu and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return time.perf_counter()

    def timed(self, work: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same, its seconds beside those of the stage that it is in."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = self.now()
            try:
                return work(*args, **kwargs)
            finally:
                self.stages[name] = self.stages.get(name, 0.0) + self.now() - begun

        return timed

    def enter(self, name: str) -> None:
        now = self.now()
        self.stages[self.stage] = self.stages.get(self.stage, 0.0) + now - self.since
        self.stage, self.since = name, now

    def started(self, total: int) -> None:
        self.total = total
        self.enter("first block's weights")
        self.block = time.perf_counter()

    def ended(self, done: int) -> None:
        self.enter("between blocks" if done < self.total else "assembly, verification")
        self.blocks.append(time.perf_counter() - self.block)
        self.block = time.perf_counter()


def awq_child(asked: dict[str, Any]) -> None:
    """One of the processes that `_awq` starts."""
    import resource

    import accelerate  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from compress import model, stage
    from compress.quantize import awq_block
    from compress.quantize.awq_stage import AwqRequest, quantize_awq
    from compress.scheme import Scheme
    from compress.tell import Tell
    from compress.workspace import resolve

    if asked["parts"] > 1:
        stage.stream = functools.partial(stage.stream, num_parts=asked["parts"])  # type: ignore[assignment]
    on_gpu = asked["device"] == "cuda"
    rank = int(os.environ.get("RANK", "0"))
    if on_gpu:
        model.configure_allocator()
        torch.cuda.set_device(rank)
        torch.zeros(1, device="cuda")  # the driver's start is not the quantizer's
    clock = _Clock(asked["device"])
    for name in ("prepare", "_scales_ahead", "_smooth", "_round_groups", "exchanged"):
        setattr(awq_block, name, clock.timed(getattr(awq_block, name), f"(of searching) {name.strip('_')}"))

    class Told(Tell):
        def start(self, what: str, total: int) -> None:
            clock.started(total)

        def step(self, done: int | None = None, doing: str = "", **_: Any) -> None:
            if done is None:
                clock.enter(doing)
            else:
                clock.ended(done)

    begun = time.perf_counter()
    request = AwqRequest(
        scheme=Scheme(), source=resolve(asked["model"]), out=Path(asked["out"]), calib=asked["calib"],
        samples=asked["samples"], seq_len=gpu.SEQ_LEN, dtype="bfloat16" if on_gpu else "float32",
        device=asked["device"], force=True,
    )  # fmt: skip
    quantize_awq(request, Told())
    clock.enter("end")
    facts = {
        "seconds": time.perf_counter() - begun, "stages": clock.stages, "blocks": clock.blocks,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "card": torch.cuda.get_device_name() if on_gpu else "cpu",
    }  # fmt: skip
    Path(asked["facts"], f"{rank}.json").write_text(json.dumps(facts))


# ---- distillation ------------------------------------------------------------------------------------


def distill(work: Work, options: argparse.Namespace) -> None:
    """Each process has the same rows an update, however many there are.

    Speed alone: teacher and student are the same weights, and losses 0 unless the two are computed in other ways.
    """
    for shape in options.shape:
        for processes in options.processes:
            for engine in options.engine:
                name = f"distill {shape} {processes}{'' if engine == 'fsdp' else ' ' + engine}"
                name += " repeatable" * options.repeatable + " profiled" * options.profile
                work.job(name, functools.partial(_distill, work, options, shape, processes, engine, name))


def _distill(work: Work, options: argparse.Namespace, shape: str, processes: int, engine: str, name: str) -> Facts:
    model = str(model_of(options, shape))
    each = options.rows
    tokens = options.steps * each * processes * options.seq_len
    vocabulary = SHAPES[shape]["vocab_size"]
    text = made(
        options.models / f"text-{vocabulary}-{tokens}.jsonl",
        lambda part: one_gpu.random_text(part, vocabulary, tokens),
    )
    refused = []
    passes = PASSES.get(shape, [(options.micro_batch, {})])
    if len(passes) > 1 and torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < LARGE_CARD:
        passes = passes[1:]
    for micro, more in [(min(micro, each), more) for micro, more in passes]:
        request = {
            "teacher": model, "student": model, "data": [str(text)], "tokens": tokens, "seq_len": options.seq_len,
            "batch": each * processes, "micro_batch": micro, "checkpoint_minutes": 60.0, "engine": engine, **more,
        }  # fmt: skip
        try:
            found = _trained(work, options, request, processes, name, measure=True)
        except Failed as why:
            said = str(why).splitlines()[-1]
            print(f"{name}, {micro} rows a pass{' '.join(['', *more])}: {said}", flush=True)
            if not any(word in str(why) for word in ("predicted to need", "OutOfMemory", "out of memory")):
                raise
            refused.append({"micro_batch": micro, **more, "said": said})
        else:
            how = {"shape": shape, "processes": processes, "engine": engine}
            return {**found, **how, "micro_batch": micro, **more, "refused": refused}
    return {"shape": shape, "processes": processes, "engine": engine, "refused": refused}


def _trained(
    work: Work,
    options: argparse.Namespace,
    request: dict[str, Any],
    processes: int,
    name: str,
    *,
    measure: bool = False,
) -> Facts:
    """The curve, speed and memory of `compress distill`. measure: end behind the last update, nothing is written."""
    key = name.replace(" ", "-")
    with tempfile.TemporaryDirectory(dir=work.folder) as scratch:
        asked = {
            "request": {"device": options.device, "out": str(Path(scratch, "out")), **request},
            "facts": scratch, "measure": measure, "repeatable": getattr(options, "repeatable", False),
            "profile": getattr(options, "profile", False),
        }  # fmt: skip
        children = start(work, [sys.executable, __file__, "distill-child", json.dumps(asked)], processes, key)
        wait(work, children, key)
        found = [json.loads(Path(scratch, f"{rank}.json").read_text()) for rank in range(processes)]
    return {
        **found[0], "peak_GB": [f["peak_GB"] for f in found], "training_peak_GB": [f["training_peak_GB"] for f in found]
    }  # fmt: skip


class _Measured(Exception):
    """All updates are done and their speed is known."""


def distill_child(asked: dict[str, Any]) -> None:
    """One of the processes that `_trained` starts."""
    from compress.cli.distill import request_of
    from compress.distill import run
    from compress.distill.meter import Meter
    from compress.distill.request import DistillRequest
    from compress.workspace import resolve

    options = dict(asked["request"])
    teacher, student = resolve(options.pop("teacher")), resolve(options.pop("student"))
    usual: dict[str, Any] = {
        "mix": None, "dtype": "auto", "scheme": None, "rate": None, "compile": None, "out": Path(options.pop("out")),
        "data": tuple(options.pop("data")),
    }  # fmt: skip
    request: DistillRequest = request_of(student, teacher, **{**usual, **options})
    on_gpu = request.device.startswith("cuda")
    rank = int(os.environ.get("RANK", "0"))
    facts: Facts = {"losses": []}
    meters: list[Meter] = []
    watched = busy.Watched(*PROFILED) if asked["profile"] else None

    def heard(record: dict[str, float], ready: run.Prepared) -> None:
        if not meters:
            meters.append(ready.meter())
            facts["before_peak_GB"] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
        meters[0].step()
        facts["losses"].append(record["loss"])
        facts.update(
            tokens_per_second=meters[0].tokens_per_second, mfu=meters[0].mfu, gflop_per_token=ready.flops / 1e9
        )
        if watched is not None:
            watched.step(record["step"])
            facts["busy_ms"] = watched.found
        if asked["measure"] and record["step"] == ready.plan.steps:
            raise _Measured

    begun = time.monotonic()
    try:
        with _repeatable() if asked["repeatable"] else nullcontext():
            facts["gradient_bytes"] = run.distill(request, heard=heard).record["gradient_bytes"]
    except _Measured:
        pass
    facts["seconds"] = time.monotonic() - begun
    facts["training_peak_GB"] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    facts["peak_GB"] = max(facts["training_peak_GB"], facts.pop("before_peak_GB"))
    facts["card"] = torch.cuda.get_device_name() if on_gpu else "cpu"
    Path(asked["facts"], f"{rank}.json").write_text(json.dumps(facts))


# What NCCL may choose anew in each run, and cuBLAS's split sums.
FIXED_ORDER = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def _repeatable() -> Any:
    """Operations of fixed order, where PyTorch has them."""
    from compress import numerics

    return numerics.repeatable(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def repeatable_child(arguments: list[str]) -> None:
    """`compress ARGUMENTS` with operations of fixed order."""
    from compress.cli.main import main as command

    with _repeatable():
        command(arguments)


# ---- kill and resume ---------------------------------------------------------------------------------


def resume(work: Work, options: argparse.Namespace) -> None:
    """A run that is killed and one that is not; where they differ, two that are not, and with fixed orders."""
    processes = options.processes[0]
    for mode in options.modes:
        name = f"resume {options.shape} {processes} {mode}"
        found = work.job(name, functools.partial(_resume, work, options, processes, mode, name))
        if found["equal"]:
            break


def _resume(work: Work, options: argparse.Namespace, processes: int, mode: str, name: str) -> Facts:
    key = name.replace(" ", "-")
    shutil.rmtree(work.folder / key, ignore_errors=True)
    folder = work.folder / key
    folder.mkdir()
    fixed = mode == "repeatable"
    program = [__file__, "repeatable-child"] if fixed else ["-m", "compress"]
    teacher, student = (learner_of(options, options.shape, seed) for seed in (0, 1))
    text = prose(work, options)

    def command(out: str) -> list[object]:
        return [
            sys.executable, *program, "distill", "--teacher", teacher, "--student", student, "--data", text, "--tokens",
            options.steps * options.batch * options.seq_len, "--epochs", options.epochs, "--seq-len", options.seq_len,
            "--batch", options.batch, "--micro-batch", options.micro_batch, "--engine", "fsdp", "--ce", "1", "--lr",
            "1e-3", "--checkpoint-steps", options.every, "--device", options.device, "-o", folder / out,
        ]  # fmt: skip

    def run(out: str, count: int = processes) -> list[subprocess.Popen[str]]:
        return start(work, command(out), count, f"{key}-{out}", **(FIXED_ORDER if fixed else {}))

    wait(work, run("whole"), f"{key}-whole")
    found: Facts = {"processes": processes, "steps": options.steps, **_killed(work, options, folder, run, key)}
    found["refused"] = _refused(work, run, key, processes)
    wait(work, run("killed"), f"{key}-killed")
    log = (work.folder / "logs" / f"{key}-killed.0.log").read_text()
    found["went_on"] = next((line.split(":")[0] for line in log.splitlines() if ": read back" in line), None)
    if found["went_on"] is None:
        raise Failed("the same command began again instead of going on")
    found.update(_compared(folder / "whole", folder / "killed"))
    if not found["equal"]:
        wait(work, run("again"), f"{key}-again")
        found["two_unbroken"] = _compared(folder / "whole", folder / "again")
    shutil.rmtree(folder)
    return found


def _killed(
    work: Work, options: argparse.Namespace, folder: Path, run: Callable[[str], list[subprocess.Popen[str]]], key: str
) -> Facts:
    """SIGKILL of every process at a moment drawn behind a checkpoint that was drawn."""
    chance = random.Random(options.seed)
    after = options.every * chance.randint(1, max(1, options.steps // options.every // 2))
    delay = chance.uniform(0.0, options.delay)
    children = run("killed")
    while not [
        p for p in folder.glob(".killed*/checkpoints/step-*/checkpoint.json") if int(p.parent.name[5:]) >= after
    ]:
        if all(child.poll() is not None for child in children):
            wait(work, children, f"{key}-killed")
            raise Failed("the run that was to be killed ended before; pass more --steps")
        if time.monotonic() > work.until:
            kill(children)
            raise OutOfTime(key)
        time.sleep(0.002)
    time.sleep(delay)
    kill(children)
    codes = [child.returncode for child in children]
    if set(codes) != {-signal.SIGKILL}:
        raise Failed(f"the run that was to be killed ended before ({codes}); pass more --steps")
    kept = sorted(int(p.parent.name[5:]) for p in folder.glob(".killed*/checkpoints/step-*/checkpoint.json"))
    return {"killed_after": after, "delay_seconds": round(delay, 3), "checkpoints_left": kept}


def _refused(work: Work, run: Callable[[str, int], list[subprocess.Popen[str]]], key: str, processes: int) -> str:
    """What half as many processes say of the checkpoint."""
    try:
        wait(work, run("killed", max(1, processes // 2)), f"{key}-killed")
    except Failed as why:
        said = next((line for line in str(why).splitlines() if "was written by" in line), None)
        if said is None:
            raise
        return said.strip()
    raise Failed(f"{processes // 2} processes went on with a checkpoint of {processes}")


def _compared(one: Path, other: Path) -> Facts:
    """Whether curves and weights are bit-equal, and by how much losses differ at most."""
    curves = [(folder / "training.csv").read_text().splitlines() for folder in (one, other)]
    column = curves[0][0].split(",").index("loss")
    losses = [[float(row.split(",")[column]) for row in curve[1:]] for curve in curves]
    differing = [i + 1 for i, (a, b) in enumerate(zip(*losses, strict=True)) if a != b]
    weights = [_sha256(folder) for folder in (one, other)]
    return {
        "equal": curves[0] == curves[1] and weights[0] == weights[1],
        "curves_equal": curves[0] == curves[1],
        "first_step_that_differs": differing[0] if differing else None,
        "largest_relative_difference": max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True)),
        "losses": [losses[0][0], losses[0][-1], losses[1][-1]],
    }


# ---- gradients ---------------------------------------------------------------------------------------


def powersgd(work: Work, options: argparse.Namespace) -> None:
    """A fresh student on real text under DDP, the gradients sent whole or less than whole; the same rows for all."""
    processes = options.processes[0]
    for shape in options.shape:
        for way in options.ways:
            name = f"gradients {shape} {processes} {way}"
            work.job(name, functools.partial(_gradients, work, options, shape, processes, way, name))


def _gradients(work: Work, options: argparse.Namespace, shape: str, processes: int, way: str, name: str) -> Facts:
    model = str(learner_of(options, shape, 0))
    batch = options.rows * processes
    request = {
        "teacher": model, "student": model, "data": [str(prose(work, options))], "epochs": options.epochs,
        "tokens": options.steps * batch * options.seq_len, "seq_len": options.seq_len, "batch": batch,
        "micro_batch": options.micro_batch, "loss": "cross-entropy", "rate": options.lr, "engine": "ddp",
        "compress_gradients": {"whole": None, "bf16": "bf16"}.get(way, int(way) if way.isdigit() else None),
    }  # fmt: skip
    found = _trained(work, options, request, processes, name)
    return {**found, "shape": shape, "processes": processes, "way": way, "tokens_a_step": batch * options.seq_len}


# ---- tables ------------------------------------------------------------------------------------------


def print_table(work: Work) -> None:
    """Everything that is in the folder, shortly."""
    groups: dict[str, list[Facts]] = {}
    for name, found in sorted(work.results.items()):
        kind = name.split()[0]
        key = " ".join(name.split()[: {"awq": 3, "distill": 2, "gradients": 3}.get(kind, 9)])
        groups.setdefault(key, []).append(found)
    for key, rows in groups.items():
        print(f"\n{key}")
        {"awq": _awq_rows, "distill": _distill_rows, "resume": _resume_rows, "gradients": _gradient_rows}[
            key.split()[0]
        ](sorted(rows, key=lambda r: r["processes"]))


def _awq_rows(rows: list[Facts]) -> None:
    first = rows[0]
    print(
        f"{'':>4} {'seconds':>8} {'x':>5} {'forward, Gram':>14} {'x':>5} {'search':>8} {'rest':>7} {'GPU GB':>7}  bytes"
    )
    for row in rows:
        rest = row["seconds"] - row["forward_seconds"] - row["search_seconds"]
        same = [other["processes"] for other in rows if other["sha256"] == row["sha256"] and other is not row]
        equal = f"those of {same}" if same else f"sums in {row['parts']} parts"
        print(
            f"{row['processes']:>4} {row['seconds']:8.1f} {first['seconds'] / row['seconds']:5.2f} "
            f"{row['forward_seconds']:14.2f} {first['forward_seconds'] / row['forward_seconds']:5.2f} "
            f"{row['search_seconds']:8.2f} {rest:7.2f} {max(row['gpu_peak_GB']):7.2f}  {equal}"
        )
    for row in rows:
        print(f"  {row['processes']}: " + ", ".join(f"{name} {s:.2f}" for name, s in row["stages"].items()))


def _distill_rows(rows: list[Facts]) -> None:
    base = next((r for r in rows if r.get("tokens_per_second")), None)
    for row in rows:
        if not row.get("tokens_per_second") or base is None:
            print(f"{row['processes']:>4} refused: " + "; ".join(r["said"] for r in row["refused"]))
            continue
        use = "" if row["mfu"] is None else f"  MFU {100 * row['mfu']:.1f} %"
        ideal = base["tokens_per_second"] / base["processes"] * row["processes"]
        print(
            f"{row['processes']:>4} {row['tokens_per_second']:12,.0f} tokens/s{use}  x {base['processes']}'s each "
            f"{row['tokens_per_second'] / ideal:.3f}  peak {max(row['peak_GB']):.1f} GB (updates "
            f"{max(row['training_peak_GB']):.1f})  {row['micro_batch']} rows a pass"
            f"{', checkpointing' if row.get('checkpointing') else ''}"
            f"{'' if row.get('engine', 'fsdp') == 'fsdp' else ', ' + row['engine']}"
        )
        if row.get("busy_ms"):
            parts = {name: ms for name, ms in row["busy_ms"].items() if name != "top"}
            print("     ms a step: " + ", ".join(f"{name} {ms}" for name, ms in parts.items()))
            print("\n".join(f"     {ms:9.3f} {name}" for name, ms in row["busy_ms"]["top"].items()))


def _resume_rows(rows: list[Facts]) -> None:
    for row in rows:
        print(
            f"  killed behind step {row['killed_after']} (checkpoints {row['checkpoints_left']}), went on from "
            f"{row['went_on']}: "
            f"{'BIT-EQUAL' if row['equal'] else 'DIFFERS'}, losses by at most {row['largest_relative_difference']:.2e} "
            f"(first at step {row['first_step_that_differs']}); {row['losses']}"
        )
        if "two_unbroken" in row:
            other = row["two_unbroken"]
            print(
                f"  two unbroken runs: {other['equal']}, losses by at most {other['largest_relative_difference']:.2e}"
            )
        print(f"  refused: {row['refused']}")


def _gradient_rows(rows: list[Facts]) -> None:
    for row in sorted(rows, key=lambda r: (r["way"] != "whole", r["way"])):
        sent = row["gradient_bytes"]
        saved = "" if sent is None else f"  {100 * (1 - sent['sent'] / sent['uncompressed']):.1f} % of bytes saved"
        milliseconds = 1e3 * row["tokens_a_step"] / row["tokens_per_second"]
        last = sum(row["losses"][-5:]) / len(row["losses"][-5:])
        print(
            f"{row['way']:>6} {milliseconds:8.1f} ms a step  loss {row['losses'][0]:.3f} -> {last:.4f} (mean of last "
            f"{len(row['losses'][-5:])} of {len(row['losses'])})  peak {max(row['peak_GB']):.1f} GB{saved}"
        )


# ---- command -----------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="what", required=True)
    one = verbs.add_parser("awq")
    one.add_argument("--shape", default="llama-3-8b", choices=list(gpu.SHAPES))
    one.add_argument("--blocks", type=int, help="decoder blocks to make [all]")
    one.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    one.add_argument("--samples", type=int, default=gpu.SAMPLES)
    one.add_argument("--parts", type=int, default=4, help="that one process sums in, to compare bytes")
    two = verbs.add_parser("distill")
    two.add_argument("--shape", nargs="+", default=["1b"], choices=list(SHAPES))
    two.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    two.add_argument("--engine", nargs="+", default=["fsdp"], choices=["fsdp", "ddp", "deepspeed"])
    two.add_argument("--rows", type=int, default=8, help="of an update in each process")
    two.add_argument("--micro-batch", type=int, default=8, help="rows a pass; a shape of `PASSES` has its own")
    two.add_argument("--seq-len", type=int, default=2048)
    two.add_argument("--steps", type=int, default=20)
    two.add_argument("--repeatable", action="store_true", help="operations of fixed order: what do they cost?")
    two.add_argument("--profile", action="store_true", help="what a GPU does of the time (at least 14 steps)")
    three = verbs.add_parser("resume")
    three.add_argument("--shape", default="135m", choices=list(one_gpu.SHAPES))
    three.add_argument("--processes", nargs=1, type=int, default=[4])
    three.add_argument("--modes", nargs="+", default=["plain", "repeatable"], choices=["plain", "repeatable"],
                       help="the next one only where the one before is not bit-equal")  # fmt: skip
    three.add_argument("--batch", type=int, default=16)
    three.add_argument("--micro-batch", type=int, default=4)
    three.add_argument("--seq-len", type=int, default=512)
    three.add_argument("--steps", type=int, default=32)
    three.add_argument("--every", type=int, default=4, help="updates from checkpoint to checkpoint")
    three.add_argument("--delay", type=float, default=0.5, help="most seconds from a checkpoint to the kill")
    three.add_argument("--seed", type=int, default=0, help="of the moment of the kill")
    four = verbs.add_parser("powersgd")
    four.add_argument("--shape", nargs="+", default=["135m"], choices=list(one_gpu.SHAPES))
    four.add_argument("--processes", nargs=1, type=int, default=[4])
    four.add_argument("--ways", nargs="+", default=["whole", "bf16", "32"], help="whole, bf16, or ranks of PowerSGD")
    four.add_argument("--rows", type=int, default=8, help="of an update in each process")
    four.add_argument("--micro-batch", type=int, default=8)
    four.add_argument("--seq-len", type=int, default=512)
    four.add_argument("--steps", type=int, default=30)
    four.add_argument("--lr", type=float, default=1e-3)
    for verb in (three, four):
        verb.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the texts")
        verb.add_argument("--epochs", type=int, default=1, help="how often the text is read")
    for verb in (one, two, three, four):
        verb.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "scale-bench")
        verb.add_argument("--models", type=Path, help="[models in --work]")
        verb.add_argument("--out", type=Path, help="copy of the figures, written as they come")
        verb.add_argument("--deadline", type=float, default=1e9, help="seconds after which nothing goes on")
        verb.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        verb.add_argument("--threads", type=int, default=8, help="of a process on the CPU")
    return parser.parse_args()


def main() -> None:
    children = {"awq-child": awq_child, "distill-child": distill_child}
    if sys.argv[1:] and sys.argv[1] in children:
        children[sys.argv[1]](json.loads(sys.argv[2]))
        return
    if sys.argv[1:2] == ["repeatable-child"]:
        repeatable_child(sys.argv[2:])
        return
    options = parsed()
    options.work = options.work.absolute()
    options.models = (options.models or options.work / "models").absolute()
    work = Work(options.work, options.out, options.deadline)
    verbs = {"awq": awq, "distill": distill, "resume": resume, "powersgd": powersgd}
    try:
        with environment(OMP_NUM_THREADS=str(options.threads), NCCL_NVLS_ENABLE="0"):
            carry_out(verbs[options.what], work, options)
    finally:
        print_table(work)


if __name__ == "__main__":
    main()
