"""What the verbs of `distill.py` share: a folder of finished results, children that end in time, texts, judging."""

from __future__ import annotations

import fcntl
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Facts = dict[str, Any]
# Articles at the end of the training text that nothing is trained on; what a run watches.
WATCHED_ARTICLES = 150


class OutOfTime(Exception):
    """The deadline came; what is finished is kept, and the same command goes on."""


class Work:
    """A folder with what is made, and the figures of each finished job, written as they come. Calls may share it.

    out: where a copy of the figures goes. deadline: seconds from now after which no child goes on.
    """

    def __init__(self, folder: Path, out: Path | None, deadline: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.out = folder, out
        self.until = time.monotonic() + deadline
        self._file = folder / "results.json"
        self.results = self._kept()

    def _kept(self) -> dict[str, Facts]:
        found: dict[str, Facts] = json.loads(self._file.read_text()) if self._file.exists() else {}
        return found

    def job(self, name: str, make: Callable[[], Facts]) -> Facts:
        """The figures of `name`, from an earlier call or made now."""
        if name not in self.results:
            if time.monotonic() > self.until:
                raise OutOfTime(name)
            started = time.monotonic()
            found = make()
            self.results[name] = {**found, "job_seconds": round(time.monotonic() - started, 1)}
            self.save()
            print(json.dumps({"job": name, **self.results[name]}), flush=True)
        return self.results[name]

    def save(self) -> None:
        """Write the figures, whole, with those that a call beside this one has written."""
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.results = {**self._kept(), **self.results}
            text = json.dumps(self.results, indent=1) + "\n"
            for path in (self._file, *([self.out] if self.out else [])):
                part = path.with_name(path.name + ".part")
                part.write_text(text)
                part.replace(path)

    def compress(self, *arguments: object, processes: int = 1) -> Facts:
        """What `compress ... --json` prints. At the deadline it gets SIGTERM, with time to write a checkpoint."""
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
        command = [sys.executable, *launch, "-m", "compress", *map(str, arguments), "--json"]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        printed = self.folder / f"printed-{os.getpid()}.json"
        with open(printed, "w+") as stdout:
            child = subprocess.Popen(command, stdout=stdout, cwd=self.folder, env={**os.environ, "PYTHONPATH": path})
            try:
                code = child.wait(max(1.0, self.until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGTERM)
                try:
                    child.wait(60)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
                raise OutOfTime(" ".join(command)) from None
        if code:
            raise SystemExit(f"{' '.join(command)} ended with {code}")
        text = printed.read_text()
        found: Facts = json.loads(text[text.index("{") :])
        return found


def carry_out(verb: Callable[[Work, Any], None], work: Work, options: Any) -> None:
    """Run a verb of a bench: what the deadline cuts off is said, and what is finished is kept."""
    try:
        verb(work, options)
    except OutOfTime as what:
        print(f"out of time in: {what}; the same command goes on", flush=True)
    finally:
        work.save()


# ---- text --------------------------------------------------------------------------------------------


def texts(work: Work, data: Path) -> tuple[Path, Path]:
    """(training, watched): articles of `data`/wikipedia-train.jsonl.xz, the last ones watched."""
    train, watched = work.folder / "wiki.jsonl", work.folder / "watched.jsonl"
    if not watched.exists():
        lines = lzma.open(data / "wikipedia-train.jsonl.xz", "rt", encoding="utf-8").readlines()
        train.write_text("".join(lines[:-WATCHED_ARTICLES]), encoding="utf-8")
        watched.write_text("".join(lines[-WATCHED_ARTICLES:]), encoding="utf-8")
    return train, watched


def sampled(work: Work, model: Path, rows: int, *, at_once: int, device: str) -> Path:
    """A text of `rows` rows of 512 tokens that the model writes, as documents; batches are kept as they are made."""
    out = work.folder / "self.jsonl"

    def make() -> Facts:
        import torch

        from compress.distill import models
        from compress.sampling import sample_from_model
        from compress.tokens import load_tokenizer

        tokenizer = load_tokenizer(model)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        loaded = models.load(model, dtype=dtype, device=device)
        parts = []
        for first in range(0, rows, at_once):
            part = work.folder / f"self-{first:06d}.jsonl"
            if not part.exists():
                count = min(at_once, rows - first)
                ids_NT = sample_from_model(
                    loaded.model, tokenizer, num_samples=count, seq_len=512, seed=0, batch_size=count, first_row=first
                )
                whole = part.with_suffix(".part")
                whole.write_text("".join(_documents(tokenizer, ids_NT.tolist())), encoding="utf-8")
                whole.replace(part)
            parts.append(part)
        out.write_text("".join(p.read_text(encoding="utf-8") for p in parts), encoding="utf-8")
        return {"rows": rows, "bytes": out.stat().st_size}

    work.job("sampled text", make)
    release()
    return out


def _documents(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    lines = []
    for row in rows:
        ends = [i for i, token in enumerate(row) if token == tokenizer.eos_token_id]
        for start, stop in zip([0, *ends], [*ends, len(row)], strict=True):
            text = tokenizer.decode(row[start:stop], skip_special_tokens=True).strip()
            if text:
                lines.append(json.dumps({"text": text}) + "\n")
    return lines


# ---- judging -----------------------------------------------------------------------------------------


def judged(work: Work, name: str, folder: Path, original: Path, options: Any) -> Facts:
    """Perplexity over the first windows of 512 tokens of two texts (float32, no BOS, tokenized line by line), LAMBADA,
    and the gate's verdict on the first text's perplexity and LAMBADA together."""

    def make() -> Facts:
        import compress

        data: Path = options.data
        texts = {"wiki": data / "wikitext-2/wiki.test.raw", "novels": data / "novels-heldout.txt"}
        found: Facts = {key: perplexity(folder, original, text, options) for key, text in texts.items()}
        found["model_MB"] = round(sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 1e6, 1)
        items = work.folder / "lambada.jsonl"
        lines = (data / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        items.write_text("".join(lines[: options.items]), encoding="utf-8")
        report = compress.evaluate(
            folder,
            original,
            data=texts["wiki"],
            gate=0.98,
            tasks=[f"lambada={items}"],
            max_tokens=512 * options.windows,
            device=options.device,
        ).to_json()
        release()
        return {**found, **verdict_of(report)}

    return work.job(f"judged {name}", make)


def verdict_of(report: Facts) -> Facts:
    """What a table shows of a report of `compress evaluate`."""
    metrics = {m["name"]: m["value"] for m in report["metrics"]}
    recovered = {v["metric"]: [v["outcome"], round(v["recovery"]["value"], 4)] for v in report["verdicts"]}
    return {"verdict": report["outcome"], "recovery": recovered, "metrics": metrics}


def perplexity(folder: Path, original: Path, text: Path, options: Any) -> float:
    import torch

    from compress.distill import models
    from compress.distill.models import head_of
    from compress.losses.in_blocks import Objective, losses
    from compress.tokens import load_tokenizer

    lines = [line + "\n" for line in text.read_text(encoding="utf-8").split("\n")]
    ids = [i for line in load_tokenizer(original)(lines, add_special_tokens=False)["input_ids"] for i in line]
    windows = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)[: options.windows].to(options.device)
    loaded = models.load(folder, dtype=torch.float32, device=options.device)
    total = 0.0
    with torch.no_grad():
        for some in windows.split(8):
            hidden = loaded.base(input_ids=some, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            nll = losses(hidden, head_of(loaded), None, some[:, 1:].flatten(), Objective())[1]
            total += float(nll.double().sum())
    return float(torch.tensor(total / windows[:, 1:].numel()).exp())


def release() -> None:
    """Give the GPU's memory back before a child asks for it."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
