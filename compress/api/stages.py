"""Making models smaller from Python: `quantize_awq`, `quantize_int8`, `auto`, `prune_model`, `distill_model`.

In all of them model is a Hugging Face folder or hub id, None as on the command line: what the workspace was made from,
else the bundled reference model. out: the folder to make, None for the command's default below `artifacts/`. calib: the
calibration text as for `--calib`, None for the default; samples and seq_len count its rows and tokens a row. device
and dtype are `auto` or as on the command line. adapter: a LoRA adapter of the model, merged into a model of its own
first. revision: of a hub model. force replaces `out`, resume goes on with a run that was killed. tell
listens; None shows progress where the code runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.api.calls import PathLike, source_of, text_of, told
from compress.tell import Tell

if TYPE_CHECKING:
    from compress.distill.request import DistillOutcome
    from compress.search import Found
    from compress.stage import Outcome


def quantize_awq(
    model: PathLike | None = None,
    out: PathLike | None = None,
    *,
    num_bits: int = 4,
    group_size: int | None = None,
    symmetric: bool | None = None,
    effort: str = "balanced",
    calib: PathLike | None = None,
    samples: int = 128,
    seq_len: int = 512,
    self_samples: int | None = None,
    end_to_end: int | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    adapter: PathLike | None = None,
    revision: str | None = None,
    tell: Tell | None = None,
) -> Outcome:
    """Quantize a model's weights with AWQ scales, as `compress awq` does: to an AutoAWQ folder at 4 bits, at 8 to a
    compressed-tensors folder.

    model: a Hugging Face folder or hub id; None as on the command line: what the workspace was made from, else the
    bundled reference model. out: the folder to make, None for `artifacts/NAME-awq-w4g128`. group_size counts input
    channels that share a scale, None: the largest of 128, 64 and 32 that divides every layer's; symmetric None: at 8
    bits, not at 4; samples and seq_len count calibration rows and tokens a row; effort is fast, balanced or best;
    end_to_end counts updates of codes, scales and norms through the whole model, None: 400 with `best` at 4 bits on a
    GPU for a model of up to 4 GB, else none. The outcome has the folder (`out`), the
    manifest's record with each layer's error, sizes in bytes, and notes.
    """
    from compress.devices import pick_device, pick_dtype
    from compress.quantize.awq_stage import AwqRequest, check_codes
    from compress.quantize.awq_stage import quantize_awq as run
    from compress.quantize.group_size import asked_scheme
    from compress.workspace import WORKSPACE

    symmetric = check_codes(num_bits, symmetric)
    source = source_of(model, out, force=force, trust=trust_remote_code, adapter=adapter, revision=revision)
    found, _ = asked_scheme(source.path, num_bits, group_size, symmetric, skip, trust_remote_code=trust_remote_code)
    device = pick_device(device)
    options: dict[str, Any] = {
        "scheme": found, "calib": text_of(calib), "samples": samples, "seq_len": seq_len, "seed": seed,
        "dtype": pick_dtype(dtype, device), "device": device, "skip": tuple(skip), "effort": effort,
        "self_samples": self_samples, "end_to_end": end_to_end, "force": force, "resume": resume,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    place = Path(out or WORKSPACE / f"{source.name}-awq-{found.label()}")
    request = AwqRequest(source=source, out=place, **options)
    with told(tell) as listener:
        return run(request, listener)


def quantize_int8(
    model: PathLike | None = None,
    out: PathLike | None = None,
    *,
    scheme: str = "w8a8",
    group_size: int = -1,
    static: bool = False,
    symmetric_activations: bool | None = None,
    keep_inputs: int | None = 0,
    kv_cache: str | None = None,
    smoothing: float | None = None,
    effort: str = "auto",
    calib: PathLike | None = None,
    samples: int = 128,
    seq_len: int = 512,
    self_samples: int | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    adapter: PathLike | None = None,
    revision: str | None = None,
    tell: Tell | None = None,
) -> Outcome:
    """Quantize a model to INT8, as `compress int8` does: to a compressed-tensors folder.

    scheme: `w8a8` (weights and inputs as integers) or `w8a16` (weights only, in groups of group_size, -1 for a scale a
    row). static: one calibrated range a layer instead of one a token. symmetric_activations: inputs without zero
    points; None: with them by token, without where static. keep_inputs: how many groups of layers keep their inputs as
    floats, None for those that lose most. kv_cache: `int8` or None. smoothing: a strength for all, None to
    search. The outcome is as of `quantize_awq`.
    """
    from compress.devices import pick_device, pick_dtype
    from compress.quantize.int8_stage import Int8Request
    from compress.quantize.int8_stage import quantize_int8 as run
    from compress.workspace import WORKSPACE

    source = source_of(model, out, force=force, trust=trust_remote_code, adapter=adapter, revision=revision)
    device = pick_device(device)
    options: dict[str, Any] = {
        "scheme": scheme, "group_size": group_size, "static": static, "sym_activations": symmetric_activations,
        "keep_inputs": keep_inputs, "kv_cache": kv_cache, "smoothing": smoothing, "effort": effort,
        "calib": text_of(calib), "samples": samples, "seq_len": seq_len, "self_samples": self_samples, "seed": seed,
        "skip": tuple(skip), "device": device, "dtype": pick_dtype(dtype, device), "force": force, "resume": resume,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    request = Int8Request(source=source, out=Path(out or WORKSPACE), **options)
    if out is None:
        request = replace(request, out=WORKSPACE / f"{source.name}-int8-{request.label()}")
    with told(tell) as listener:
        return run(request, listener)


def auto(
    model: PathLike | None = None,
    out: PathLike | None = None,
    *,
    gate: float | None = 0.98,
    num_bytes: int | None = None,
    data: PathLike | None = None,
    max_tokens: int = 102_400,
    tries: int = 4,
    symmetric: bool = False,
    lm_head: bool = False,
    effort: str = "balanced",
    calib: PathLike | None = None,
    samples: int = 128,
    seq_len: int = 512,
    self_samples: int | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    adapter: PathLike | None = None,
    revision: str | None = None,
    tell: Tell | None = None,
) -> Found:
    """The smallest artifact that passes the gate, as `compress auto` finds it: INT4, INT8 or float16 where they count.

    gate: the least recovery on `data`, which is text held out (None: the bundled text, for the bundled model only);
    None: the best artifact within num_bytes, made once. num_bytes: of all weights, at most. tries: artifacts made and
    judged at most. symmetric: INT4 without zero points, for transformers. lm_head: the output matrix is chosen for
    too, where it is not the embedding. What is found has `out`, `best` (with what it was `judged`), all that was
    `tried`, and `choices.frontier()`. Where nothing passes, `best` is what misses least.
    """
    from compress.cli.judges import Judges, text_to_judge, unvetted
    from compress.devices import pick_device, pick_dtype
    from compress.quantize.auto_stage import AutoRequest
    from compress.quantize.menu import Menu
    from compress.search import Goal, search
    from compress.workspace import WORKSPACE

    source = source_of(model, out, force=force, trust=trust_remote_code, adapter=adapter, revision=revision)
    device = pick_device(device)
    text = text_to_judge(source, text_of(data), gate, text_of(calib))
    request = AutoRequest(
        source=source, out=Path(out or WORKSPACE / f"{source.name}-auto"), effort=effort,
        menu=Menu(symmetric=symmetric, lm_head=lm_head), calib=text_of(calib), samples=samples, seq_len=seq_len,
        self_samples=self_samples, seed=seed, skip=tuple(skip), device=device, dtype=pick_dtype(dtype, device),
        force=force, resume=resume, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    goal = Goal(gate=gate, most=num_bytes, tries=tries, judging={"data": text, "max_tokens": max_tokens})
    judges = None if text is None else Judges(source.path, text, gate, max_tokens, device, tries)
    with told(tell) as listener:
        found = search(
            request, goal, judges.judge(listener) if judges else None, listener, vet=judges.vet if judges else unvetted
        )  # fmt: skip
    if judges is not None:
        judges.keep(found)
    return found


def prune_model(
    model: PathLike | None = None,
    out: PathLike | None = None,
    *,
    depth: float | None = None,
    intermediate: float | None = None,
    heads: float | None = None,
    kv_heads: float | None = None,
    hidden: float | None = None,
    params: int | None = None,
    num_bytes: int | None = None,
    max_kl: float | None = None,
    candidates: int = 10,
    repair: bool = True,
    calib: PathLike | None = None,
    samples: int = 128,
    seq_len: int = 512,
    self_samples: int | None = None,
    watch: PathLike | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    adapter: PathLike | None = None,
    revision: str | None = None,
    tell: Tell | None = None,
) -> Outcome:
    """Remove blocks, neurons, heads or channels and refit the rest, as `compress prune` does: an ordinary model folder.

    depth, intermediate, heads, kv_heads, hidden: how much of each goes, a whole number or a share below 1. params,
    num_bytes: a goal for which shapes are tried (`candidates` of them). max_kl: nats a token; alone it is the goal.
    watch: a second text, on which what goes is judged as well and to which nothing is fitted.
    """
    from compress.cli.prune import asked_of, label
    from compress.devices import pick_device, pick_dtype
    from compress.prune.prune_stage import PruneRequest
    from compress.prune.prune_stage import prune as run
    from compress.workspace import WORKSPACE

    source = source_of(model, out, force=force, trust=trust_remote_code, adapter=adapter, revision=revision)
    device = pick_device(device)
    given = {"depth": depth, "intermediate": intermediate, "heads": heads, "kv_heads": kv_heads, "hidden": hidden}
    amounts = {name: None if value is None else f"{value:g}" for name, value in given.items()}
    goal = [None if value is None else str(value) for value in (params, num_bytes)]
    asked = asked_of(
        amounts, params=goal[0], num_bytes=goal[1], target=None, context=2048, max_kl=max_kl, candidates=candidates
    )  # fmt: skip
    request = PruneRequest(
        source=source, out=Path(out or WORKSPACE / f"{source.name}-prune-{label(amounts, *goal, max_kl)}"),
        asked=asked, max_kl=max_kl, repair=repair, calib=text_of(calib), samples=samples, seq_len=seq_len,
        self_samples=self_samples, watch=text_of(watch), seed=seed, device=device, dtype=pick_dtype(dtype, device),
        force=force, resume=resume, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    with told(tell) as listener:
        return run(request, listener)


def distill_model(
    student: PathLike | None = None,
    teacher: PathLike | None = None,
    out: PathLike | None = None,
    *,
    data: Sequence[PathLike] = (),
    mix: str | None = None,
    scheme: str | None = None,
    rate: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool | None = None,
    tell: Tell | None = None,
    **options: Any,
) -> DistillOutcome:
    """Train a student on what its teacher predicts over a text, as `compress distill` does.

    student: None for the workspace's newest pruned artifact, with a scheme its newest quantized one. teacher: None for
    the original that the student's manifest names. data: texts to learn on, with shares as for `--mix`. scheme: `w4a16`
    and the like, to train a quantized student's codes. options: fields of `compress.distill.request.DistillRequest`,
    such as `tokens=2_000_000, seq_len=512, batch=32, watch="other.txt"`.
    """
    from compress.cli.distill import request_of, student_of, teacher_of
    from compress.distill.run import distill as run
    from compress.errors import ConfigError

    texts = tuple(str(text_of(one)) for one in data)
    if not texts and options.get("cache") is None:
        raise ConfigError("no text to learn on; pass data=[FILE], or cache=FOLDER")
    learner = student_of(text_of(student), scheme, text_of(teacher))
    master = teacher_of(text_of(teacher), learner, scheme)
    request = request_of(
        learner, master, data=texts, mix=mix, out=None if out is None else Path(out), device=device, dtype=dtype,
        scheme=scheme, rate=rate, compile=compile, **options,
    )  # fmt: skip
    with told(tell) as listener:
        return run(request, tell=listener)
