"""One process at a time: a lock file that says who holds it.

The kernel gives the lock back when its holder ends, however it ends, so a lock file that a killed process left is no
obstacle. Nobody's file is written over: what lies under the lock's name must be such a lock, or the lock is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.errors import ConfigError

_KIND = "lock of compress"
_MOST_BYTES = 65_536


@contextmanager
def locked(path: Path, what: str, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` while the context lasts; it is removed at the end.

    what: what is locked, for the message. Where another process holds it, its name is given to `wait` and then it is
    waited for; without `wait`, ConfigError. ConfigError too when the file cannot be made or is not a lock.
    """
    fd = _take(path, what, wait)
    try:
        yield
    finally:
        # Removed while it is held: who waits for it finds that the name is gone, and begins again.
        path.unlink(missing_ok=True)
        os.close(fd)


def _take(path: Path, what: str, wait: Callable[[str], None] | None) -> int:
    while True:
        fd = _open(path)
        try:
            _refuse_strangers(fd, path)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if wait is None:
                    raise ConfigError(
                        f"{what} is being written by {_holder(fd)}; wait for it, or pass another place with -o"
                    ) from None
                wait(_holder(fd))
                fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_still(fd, path):
                _sign(fd)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its holder ended and removed the name: what we hold is nobody's lock any more


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as e:
        raise ConfigError(f"{path} cannot be made ({e.strerror}); choose a place that can be written") from None


def _refuse_strangers(fd: int, path: Path) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or (found.st_size and _read(fd) is None):
        raise ConfigError(f"{path} is in the way: it has a lock's name and is none; move it elsewhere")


def _is_still(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sign(fd: int) -> None:
    command = [part[:100] for part in sys.argv[:16]]
    facts = {"kind": _KIND, "pid": os.getpid(), "host": socket.gethostname(), "command": command}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(facts).encode(), 0)


def _read(fd: int) -> dict[str, Any] | None:
    try:
        facts = json.loads(os.pread(fd, _MOST_BYTES, 0))
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) and facts.get("kind") == _KIND else None


def _holder(fd: int) -> str:
    facts = _read(fd)
    if facts is None:  # taken, and not signed yet
        return "another process"
    command = " ".join(str(part) for part in facts.get("command", []))[:200]
    return f"process {facts.get('pid')} on {facts.get('host')} ({command})"
