"""The environment that TensorRT Edge-LLM's exporter runs in: a virtual environment of its own, made once and reused.

The exporter pins transformers, onnx and numpy to versions that cannot stand beside ours. So it gets a folder in the
user's cache, made under another name and renamed when it is complete, with a stamp that says what is in it. pip's own
configuration (index, proxy, certificates) is honoured.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import ConfigError, UnsupportedError, out_of_room
from compress.files import json_bytes, read_json, write_bytes_atomically
from compress.lock import locked

VERSION = "0.11.0"
# The `export` extra of tensorrt-edgellm 0.11.0, and three packages that it leaves open and that shape the bytes of an
# ONNX file. torch comes first, by itself.
PINS = {
    "torch": "2.13.0",
    "tensorrt-edgellm": VERSION,
    "transformers": "5.14.1",
    "onnx": "1.19.0",
    "onnxscript": "0.7.1",
    "onnx-graphsurgeon": "0.6.1",
    "safetensors": "0.8.0",
    "numpy": "2.2.6",
    "onnx-ir": "1.1.0",
    "ml-dtypes": "0.6.0",
    "protobuf": "7.36.2",
}
PYTHONS = ((3, 10), (3, 11), (3, 12))  # the wheels of tensorrt-edgellm 0.11.0
STAMP = "compress-edge.json"
MODULE = "tensorrt_edgellm.scripts.export"  # what its `tensorrt-edgellm-export` command calls
# Measured: 1.9 GB installed with a CPU build of torch, which pip also unpacks once. CUDA builds bring their libraries.
DISK_BYTES = {"cpu": 3_500_000_000, "cuda": 12_000_000_000}

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A complete environment. versions: distribution -> version, as installed."""

    folder: Path
    versions: Mapping[str, str]

    @property
    def python(self) -> Path:
        return python_of(self.folder)


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the environment lies: in $XDG_CACHE_HOME or ~/.cache, by exporter and Python version."""
    root = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "compress" / f"edge-{VERSION}-py{sys.version_info[0]}{sys.version_info[1]}"


def ready(environ: Mapping[str, str] = os.environ) -> Environment | None:
    """The environment if it is there and complete, else None; installs nothing.

    COMPRESS_EDGE_ENV names one to use instead; ConfigError when it is not what PINS asks for.
    """
    own = environ.get("COMPRESS_EDGE_ENV")
    if own:
        return _existing(Path(own))
    folder = cache_folder(environ)
    if not (folder / STAMP).exists() or not python_of(folder).exists():
        return None
    stamp = read_json(folder / STAMP)
    return Environment(folder=folder, versions=stamp["versions"]) if stamp.get("pins") == PINS else None


def ensure(say: Say, environ: Mapping[str, str] = os.environ) -> Environment:
    """The environment, made if need be. Raises ConfigError or UnsupportedError with the way out."""
    found = ready(environ)
    if found is not None:
        return found
    if sys.version_info[:2] not in PYTHONS:
        raise UnsupportedError(
            f"tensorrt-edgellm {VERSION} has no wheel for Python {sys.version_info[0]}.{sys.version_info[1]} (3.10 to "
            "3.12 have one); make an environment with one of these and name it in COMPRESS_EDGE_ENV"
        )
    folder = cache_folder(environ)
    _make_parent(folder)

    def wait(holder: str) -> None:
        say(f"waiting for {holder}, which makes the environment")

    with locked(folder.with_name(folder.name + ".lock"), str(folder), wait=wait):
        found = ready(environ)  # another process may have made it while we waited
        return found if found is not None else _make(folder, say, environ)


def _existing(folder: Path) -> Environment:
    if not python_of(folder).exists():
        raise ConfigError(f"COMPRESS_EDGE_ENV={folder}: no bin/python there; name the folder of a virtual environment")
    versions = installed(folder)
    for name, pin in PINS.items():
        if _public(versions.get(name, "")) != pin:
            raise ConfigError(
                f"COMPRESS_EDGE_ENV={folder} has {name} {versions.get(name) or '(none)'}, but {pin} is needed; install "
                f"it there (pip install {name}=={pin}), or unset COMPRESS_EDGE_ENV to have one made"
            )
    return Environment(folder=folder, versions=versions)


def installed(folder: Path) -> dict[str, str]:
    """Versions of the pinned distributions in an environment, without importing them; absent ones are left out."""
    code = (
        "import json, sys, importlib.metadata as m\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    command = [str(python_of(folder)), "-c", code, *PINS]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environ(), check=False)
    if done.returncode:
        raise ConfigError(f"{python_of(folder)} does not run ({_last_line(done.stderr)}); name another environment")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def clean_environ(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The caller's variables without those that would lead another Python to this one's packages."""
    return {
        k: v for k, v in environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    }


def _make(folder: Path, say: Say, environ: Mapping[str, str]) -> Environment:
    """Make, check and publish. What is there under the final name is complete; anything else is removed first."""
    check_disk(folder.parent)
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists() and not (folder / STAMP).is_file():
        raise ConfigError(f"{folder} is in the way and was not made by this tool; move it elsewhere")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    say(f"making an environment for TensorRT Edge-LLM {VERSION} (once)")
    try:
        _venv(partial)
        for requirements, extra in install_steps(environ):
            say(f"pip install {' '.join(requirements)}")
            command = [str(python_of(partial)), "-m", "pip", "install", "--disable-pip-version-check", *extra]
            code, tail = stream([*command, *requirements], say=_pip_progress(say), environ=clean_environ(environ))
            if code:
                refuse_full("\n".join(tail))
                raise ConfigError(
                    f"pip could not install {requirements[0]} ({reason(tail)}); check pip's index and network, give "
                    "torch's index in COMPRESS_TORCH_ARGS, or name an environment that has it in COMPRESS_EDGE_ENV"
                )
        versions = installed(partial)
        wrong = [n for n, pin in PINS.items() if _public(versions.get(n, "")) != pin]
        if wrong:
            raise ConfigError(
                f"pip installed {wrong[0]} {versions.get(wrong[0])}, but {PINS[wrong[0]]} is needed; a constraint in "
                "pip's configuration may forbid it (pip config list)"
            )
        write_bytes_atomically(partial / STAMP, json_bytes({"pins": PINS, "versions": versions}))
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"environment ready: torch {versions['torch']}, tensorrt-edgellm {versions['tensorrt-edgellm']}")
    if _running_cpu_build() and "+cpu" not in versions["torch"]:
        say("pip's index gave a CUDA build of torch, which is not needed; COMPRESS_TORCH_ARGS can name another index")
    return Environment(folder=folder, versions=versions)


def _pip_progress(say: Say) -> Say:
    """Passes on what takes time: each download, and the unpacking at the end."""

    def told(line: str) -> None:
        text = line.strip()
        if text.startswith("Downloading "):
            say(f"pip: downloading {text.split('/')[-1].removeprefix('Downloading ')}")
        elif text.startswith("Installing collected packages"):
            say("pip: installing")

    return told


def install_steps(environ: Mapping[str, str]) -> list[tuple[list[str], list[str]]]:
    """What pip installs, in order: (requirements, further arguments).

    torch comes first and alone, so that COMPRESS_TORCH_ARGS (an index of CPU builds, say) reaches nothing else.
    """
    rest = [f"{name}=={pin}" for name, pin in PINS.items() if name not in ("torch", "tensorrt-edgellm")]
    return [
        ([f"torch=={PINS['torch']}"], shlex.split(environ.get("COMPRESS_TORCH_ARGS", ""))),
        ([f"tensorrt-edgellm[export]=={VERSION}", *rest], []),
    ]


def check_disk(folder: Path) -> None:
    """Refuse to start an installation that the disk cannot hold."""
    kind = "cpu" if _running_cpu_build() else "cuda"
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES[kind]:
        raise ConfigError(
            f"{folder} has {free / 1e9:.1f} GB free, and TensorRT Edge-LLM's environment needs about "
            f"{DISK_BYTES[kind] / 1e9:.1f}; free some, or point XDG_CACHE_HOME at a larger disk"
        )


def _running_cpu_build() -> bool:
    """Whether the running torch is a CPU build: pip probably finds the same kind for the environment."""
    import torch

    return torch.version.cuda is None


def _venv(folder: Path) -> None:
    """A virtual environment with pip: by the standard library, else by virtualenv (Debian splits ensurepip off)."""
    reasons = []
    for module in ("venv", "virtualenv"):
        command = [sys.executable, "-m", module, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=clean_environ(), check=False)
        if done.returncode == 0:
            return
        reasons.append(f"{module}: {_last_line(done.stderr or done.stdout)}")
        shutil.rmtree(folder, ignore_errors=True)
    raise ConfigError(
        f"cannot make a virtual environment ({'; '.join(reasons)}); install python3-venv, or pip install "
        '"compress-toolkit[edge]"'
    )


def stream(
    command: Sequence[str], *, say: Say | None, environ: Mapping[str, str], log: Path | None = None
) -> tuple[int, list[str]]:
    """Run a command, passing each line of its output to `say` and to the file `log`; returns its code and last lines.

    Its output never reaches our stdout, which is for results.
    """
    tail: deque[str] = deque(maxlen=400)
    with open(log or os.devnull, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(environ), text=True, errors="replace"
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                tail.append(line.rstrip())
                if say is not None:
                    say(line.rstrip())
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return code, list(tail)


def refuse_full(output: str) -> None:
    """Raise the sentence for a full disk or memory, if a program's output speaks of one."""
    full = out_of_room(RuntimeError(output))
    if full is not None:
        raise full


def _make_parent(folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(
            f"{folder.parent} cannot be made ({e.strerror}); point XDG_CACHE_HOME at a folder that can be written"
        ) from None


def _public(version: str) -> str:
    """A version without its local part: 2.13.0 for 2.13.0+cpu."""
    return version.split("+")[0]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


def reason(tail: Sequence[str]) -> str:
    """The line that says why a program ended: pip's own error, the last exception, or the last line."""
    errors = [line for line in tail if line.startswith("ERROR:")]
    raised = [line for line in tail if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (errors[0] if errors else raised[-1] if raised else _last_line("\n".join(tail))).strip()[:300]


def log_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the exporter's last log lies, whatever environment it ran in."""
    folder = cache_folder(environ)
    _make_parent(folder)
    return folder.with_name("edge-export.log")
