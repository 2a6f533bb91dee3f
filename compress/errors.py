"""What can go wrong, by whose fault. The command line turns these into exit codes in one place.

Each message is one sentence that names the thing, both values and a way out.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class CompressError(Exception):
    """Base of every error that a user can cause or mend; exit code 1."""

    exit_code = 1


class ConfigError(CompressError):
    """The options or the input text do not fit the model or each other."""


class UnsupportedError(CompressError):
    """A valid request that this version cannot honour; the message names what can."""


class ArtifactError(CompressError):
    """A model folder, shard or manifest is missing, damaged or inconsistent."""


class GateFailed(CompressError):
    """The accuracy gate did not pass: `exit_code` is 3 for FAIL and 4 for INCONCLUSIVE."""

    def __init__(self, message: str, exit_code: int = 3) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run that keeps what it has finished; the message says what the same command does then."""


@contextmanager
def resumable() -> Iterator[None]:
    """For the part of a run that a later one takes up: Ctrl-C in it says so."""
    try:
        yield
    except KeyboardInterrupt as e:
        raise Interrupted("the same command goes on from the last finished block") from e


# What of a foreign message is shown: some libraries print a whole file.
REASON_CHARS = 200


def reason(error: BaseException) -> str:
    """An exception's message on one line and cut, or its type where it has none."""
    if isinstance(error, OSError) and error.strerror:
        name = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{name}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it does not fit in memory"
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, KeyError):
        text = f"no entry {text}"
    return (text if len(text) <= REASON_CHARS else f"{text[:REASON_CHARS]}...") or type(error).__name__


@contextmanager
def explained(what: str, way_out: str, kind: type[CompressError] = ArtifactError) -> Iterator[None]:
    """Whatever code that is not ours raises inside becomes one sentence of ours: `what (its reason); way_out`.

    For calls into libraries on a user's files. They raise anything, from KeyError to bare Exception, and a list of what
    they raise today is wrong tomorrow. Our own errors pass; a full disk or memory is never called the file's fault.
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as e:
        full = out_of_room(e)
        if full is not None:
            raise full from e
        raise kind(f"{what} ({reason(e)}); {way_out}") from e


def out_of_room(error: BaseException) -> CompressError | None:
    """The sentence for a full disk, quota or memory, wherever it was met; None for anything else."""
    text = str(error)
    no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors gives the number in its text only
    if no_space or "No space left on device" in text or any(f"os error {n})" in text for n in (27, 28, 122)):
        where = getattr(error, "filename", None)
        return ArtifactError(
            f"the disk is full{f' at {where}' if where else ''}: what was being written is incomplete; free some space "
            "and run the same command again"
        )
    gpu = type(error).__name__ == "OutOfMemoryError"
    if gpu or isinstance(error, MemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        where = "the GPU's memory" if gpu else "memory"
        return ConfigError(
            f"{where} does not suffice ({reason(error)}); use a machine with more of it, or a smaller model"
        )
    return None
