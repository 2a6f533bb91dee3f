"""Runs that end early: killed at any file operation, their scratch damaged, the disk full. Then the same command again.

    python tests/fuzz/interrupted.py kills --rounds 60        # each command in turn, killed one to three times
    python tests/fuzz/interrupted.py disk --moments 12        # needs root: mounts small disks

What must hold: the last run ends well and its folder is byte for byte that of a run that nothing stopped, or it is
refused in one sentence; nothing of ours is left beside it. Prints every fault; exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# What a run does to files through `os`; it is killed before one of these.
OPERATIONS = ("open", "replace", "rename", "unlink", "rmdir", "fsync", "mkdir", "utime", "pwrite", "link")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
LONGEST = 300  # seconds; what takes longer hangs, and its stack is printed
Arguments = tuple[Any, ...]


def commands(root: Path) -> dict[str, Arguments]:
    """Every command that writes a folder, without its `-o`."""
    text = ("--calib", root / "text.txt", "--samples", 4, "--seq-len", 32, "--device", "cpu")
    prune = ("--depth", 1, *text, "--self-samples", 0)
    return {
        "awq": ("awq", root / "m", *text),
        "awq best": ("awq", root / "m", *text, "--effort", "best", "--self-samples", 0),
        "int8": ("int8", root / "m", *text),
        "prune": ("prune", root / "m", *prune),
        "export hf": ("export", root / "q", "--target", "a100", "--format", "hf"),
        "export onnx": ("export", root / "q", "--target", "cpu", "--format", "onnx"),
        "export onnx-trt": ("export", root / "q", "--target", "orin", "--format", "onnx-trt"),
        "export edge": ("export", root / "q", "--target", "orin", "--format", "edge"),
    }


def make(root: Path) -> None:
    """A model of three blocks, its text, and an artifact of it."""
    import bases

    bases.SIZES.update(SIZES)
    bases.MODELS.clear()
    bases.MODELS["m"] = ("Llama", False, 2)
    bases.make(root, set())
    done = in_child((*commands(root)["awq"], "--sym", "-o", root / "q"))
    assert done == 0, "the artifact that exports start from was not made"


def in_child(arguments: Arguments, before: Callable[[], None] = lambda: None, said: Path | None = None) -> int:
    """Exit code of a command in a fork of this process, which has everything imported; -9 when it was killed."""
    child = os.fork()
    if child == 0:
        from compress.cli.main import main

        with open(said or os.devnull, "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        if said is not None:
            faulthandler.dump_traceback_later(LONGEST, exit=True)
        before()
        try:
            main([str(a) for a in arguments], standalone_mode=True)
        except SystemExit as e:
            os._exit(e.code if isinstance(e.code, int) else 0 if e.code is None else 1)
        finally:
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counted(total: Path | None, kill_at: int | None) -> None:
    """Count this process's file operations into `total`, or be killed before the `kill_at`-th."""
    operations = 0

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **options: Any) -> Any:
            nonlocal operations
            operations += 1
            if operations == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return inner

    def ended(code: int, end: Callable[[int], Any] = os._exit) -> None:
        if total is not None:
            total.write_text(str(operations))
        end(code)

    for name in OPERATIONS:
        setattr(os, name, wrapped(getattr(os, name)))
    os._exit = ended  # type: ignore[assignment]


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def scratch_of(place: Path) -> list[Path]:
    """What a run left beside its output."""
    return sorted(p for p in place.iterdir() if p.name != "out")


def damage_scratch(rng: random.Random, place: Path) -> str:
    """One file of a stopped run changed: cut, a bit of it flipped, emptied or gone."""
    files = sorted(
        p for left in scratch_of(place) for p in ([left] if left.is_file() else left.rglob("*")) if p.is_file()
    )
    if not files:
        return ""
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    path.unlink()  # an export's files may be links to the artifact's own, which are not to be touched
    way = rng.choice(("cut", "flip", "empty", "gone"))
    if way == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif way != "gone":
        path.write_bytes(data[: rng.randrange(len(data)) if way == "cut" and data else 0])
    return f"{way} {path.relative_to(place)}"


def one_sentence(said: str) -> bool:
    return sum(line.startswith("error: ") for line in said.splitlines()) == 1 and "Traceback" not in said


def kills(root: Path, rounds: int, seed: int) -> int:
    """Each command killed one to three times, then run to its end."""
    count, faults = Counter[str](), 0
    whole, length = {}, {}
    total, log = root / "operations", root / "log"
    place = root / "work"  # one place for all: a manifest names its parent from where it lies
    for name, arguments in commands(root).items():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        assert in_child((*arguments, "-o", place / "out"), lambda: counted(total, None), log) == 0, log.read_text()
        whole[name], length[name] = contents(place / "out"), int(total.read_text())
    print("file operations of a whole run:", ", ".join(f"{n} {c}" for n, c in length.items()), flush=True)
    for number in range(rounds):
        rng = random.Random(f"kills {seed + number}")
        name = list(whole)[number % len(whole)]
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        command = (*commands(root)[name], "-o", place / "out")
        history = []
        for _ in range(rng.randint(1, 3)):
            at = rng.randint(1, length[name])
            code = in_child(command, lambda at=at: counted(None, at))  # type: ignore[misc]
            history.append(f"killed at {at}" if code == -9 else f"ended with {code}")
            count["kills"] += code == -9
            if rng.random() < 0.3:
                history.append(damage_scratch(rng, place))
                count["damaged"] += bool(history[-1])
        code = in_child(command, said=log)
        equal = (place / "out").is_dir() and contents(place / "out") == whole[name]
        refused = code == 1 and one_sentence(log.read_text())
        count["equal"] += equal
        count["refused"] += refused and not equal
        if refused and not equal:
            print(
                f"{name}, round {seed + number}: refused: {log.read_text().strip().splitlines()[-1][:300]}", flush=True
            )
        left = [p.name for p in scratch_of(place)] if equal and not refused else []
        if not (equal or refused) or left or code not in (0, 1):
            faults += 1
            print(f"{name}, round {seed + number}: {history}: exit code {code}, equal {equal}, left {left}")
            print(log.read_text()[-600:], flush=True)
    print(
        f"{rounds} rounds: "
        + ", ".join(f"{count[k]} {k}" for k in ("kills", "damaged", "equal", "refused"))
        + f", {faults} at fault"
    )
    return faults


def disk(root: Path, moments: int, only: str | None) -> int:
    """Each command on disks from nearly none to a little more than it needs, then again with room."""
    faults, count = 0, Counter[str]()
    evaluate = ("evaluate", root / "q", "--reference", root / "m", "--data", root / "other.txt", "--context", 16,
                "--max-tokens", 64, "--device", "cpu")  # fmt: skip
    for name, arguments in {**commands(root), "evaluate": evaluate}.items():
        if only not in (None, name):
            continue
        place = root / "disk"
        place.mkdir(exist_ok=True)

        def command(place: Path = place, arguments: Arguments = arguments, name: str = name) -> Arguments:
            if name == "evaluate":
                return (*arguments, "--cache", place / "cache", "--report", place / "out" / "report.html")
            return (*arguments, "-o", place / "out")

        with mounted(place, 256 << 10):
            assert in_child(command(), enough_at_first, root / "log") == 0, (root / "log").read_text()
            needed = sum(p.stat().st_size for p in place.rglob("*") if p.is_file()) >> 10
            want = contents(place / "out")
        for moment in range(moments):
            with mounted(place, max(16, needed * (2 * moment + 1) // moments)):
                code = in_child(command(), enough_at_first, root / "log")
                said = (root / "log").read_text()
                fine = code == 0 or code == 1 and one_sentence(said)
                if name == "evaluate" and code:
                    fine &= "recovery" in said.lower()  # the verdict was printed before the disk was needed
                again = code
                if code:
                    subprocess.run(["mount", "-o", "remount,size=256M", place], check=True)
                    again = in_child(command(), said=root / "log2")
                equal = (place / "out").is_dir() and (name == "evaluate" or contents(place / "out") == want)
                count["full" if code else "enough"] += 1
                if not (fine and again == 0 and equal):
                    faults += 1
                    print(
                        f"{name}, moment {moment}: exit code {code}, again {again}, equal {equal}\n{said[-600:]}",
                        flush=True,
                    )
        print(f"{name}: {moments} sizes around {needed} KiB", flush=True)
    print(f"{sum(count.values())} moments: {count['full']} full, {count['enough']} with room, {faults} at fault")
    return faults


def enough_at_first() -> None:
    """The disk fills while the run works: what is checked before it is another test's."""
    import compress.disk
    import compress.stage
    import exporters.export

    for module in (compress.disk, compress.stage, exporters.export):
        if hasattr(module, "check_free_space"):
            module.check_free_space = lambda *_: None  # type: ignore[attr-defined]


class mounted:
    """A disk of `kib` KiB at `place`."""

    def __init__(self, place: Path, kib: int) -> None:
        self.place, self.kib = place, kib

    def __enter__(self) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.kib}k", "tmpfs", self.place], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self.place], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "disk"])
    parser.add_argument("--rounds", type=int, default=60, help="kills: how many rounds, the commands in turn")
    parser.add_argument("--moments", type=int, default=12, help="disk: sizes a command")
    parser.add_argument("--seed", type=int, default=0, help="number of the first round")
    parser.add_argument("--only", help="disk: this command alone")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", PYTHONPATH=f"{ROOT}{os.pathsep}{HERE}")
    import torch

    import compress.api
    import compress.cli.main
    import compress.prune.prune_stage
    import compress.quantize.awq_stage
    import compress.quantize.int8_stage  # noqa: F401  (imported once, not by every child)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make(root)
        return (
            1
            if (kills(root, args.rounds, args.seed) if args.what == "kills" else disk(root, args.moments, args.only))
            else 0
        )


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(HERE)]
    raise SystemExit(main())
