"""Where a run may write: the one place that decides it, and the only one that removes anything.

A run reads a model and texts, and makes one folder, OUT. Beside OUT, and nowhere else, it keeps

    .OUT.1a2b3c4d.partial/   its scratch folder, named by the run's identity: the same command finds it again
    .OUT.1a2b3c4d.old/       the artifact that OUT was, from the moment it is replaced until it is removed
    .OUT.compress-lock       held while the run lasts

What is not ours is never touched. A scratch folder is ours if it holds our run file; an artifact is ours file by file:
what its manifest lists, with the content that the manifest states. OUT appears, or is replaced, by one rename.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.artifact import MANIFEST, read_manifest
from compress.disk import disk_errors
from compress.errors import CompressError, ConfigError
from compress.files import IO_THREADS, file_sha256, fsync_path, json_bytes, read_json, write_bytes_atomically
from compress.lock import locked

RUN = "run.json"
FINAL = "final"
_KIND = "run of compress"
_PUBLISHED = "published"
_CONTENT = "content"
_SCRATCH = re.compile(r"\..+\.[0-9a-f]{8}\.(partial|old)")
_LOCK = ".compress-lock"
# Longest file name of the usual file systems, in bytes, and what a scratch name adds to OUT's.
_LONGEST_NAME = 255
_ADDED = len("..12345678.partial")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_C_LIBRARY = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

# Files by their path inside a folder: size, time of change, inode. Equal ones are taken to hold the same bytes.
_Seen = Mapping[str, tuple[int, int, int]]


def is_scratch(path: Path) -> bool:
    """Whether a name is one that runs use beside their output: no artifact is called so."""
    return _SCRATCH.fullmatch(path.name) is not None


# ---- what may be written -------------------------------------------------------------------------------


def check(out: Path, reads: Mapping[str, Path], *, force: bool) -> Path:
    """Refuse, in one sentence, an output folder that must not be written; nothing is changed on disk.

    reads: the files and folders that the run reads, by what the user knows them as ("the model"). Returns where the
    folder will lie, with every symbolic link above it resolved. Raises ConfigError.
    """
    here = _current_folder()
    real = _located(out)
    for what, path in {**reads, "the current folder": here}.items():
        _refuse_overlap(out, real, what, path)
    for above in real.parents:
        if _listed(above) is not None:
            raise ConfigError(f"-o {out} lies in the artifact {above}, which never changes; choose a place outside it")
    parent = next(p for p in real.parents if os.path.lexists(p))
    if not parent.is_dir():
        raise ConfigError(f"-o {out}: {parent} is not a folder; choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"-o {out}: {parent} cannot be written; choose another place, or change its permissions")
    if not os.path.lexists(real):
        return real
    if not os.path.isdir(real):
        raise ConfigError(f"-o {out} is a file; name a folder to make")
    if os.path.ismount(real):
        raise ConfigError(f"-o {out} is a mount point, which cannot be replaced; name a folder inside it")
    if not force and not _was_just_published(real):
        raise ConfigError(f"{out} exists already; pass --force to replace it, or -o for another place")
    return real


def check_apart(folder: Path, models: Mapping[str, Path], flag: str) -> None:
    """Refuse a folder for reports or caches that is, or lies in, a model or an artifact: those are only read.

    models: by what the user knows them as. Raises ConfigError; nothing is changed on disk.
    """
    real = Path(os.path.realpath(folder))
    for above in (real, *real.parents):
        what = next((f"{what}, {path}" for what, path in models.items() if above == path or _same(above, path)), None)
        if what is None and _listed(above) is not None:
            what = f"the artifact {above}"
        if what is not None:
            raise ConfigError(f"{flag} {folder} lies in {what}, which is only read; choose a place outside it")


def file_read(spec: str | None, watched: str | None = None) -> dict[str, Path]:
    """Texts as `reads` of `check` wants them: nothing for what is no file (`self`, `hf:...`, the default)."""
    texts = {"the text": spec, "the watched text": watched}
    return {name: Path(s) for name, s in texts.items() if not (s is None or s == "self" or s.startswith("hf:"))}


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the current folder is not there any more; change to one that is") from None


def _located(out: Path) -> Path:
    """The absolute path of `out`, its last part as it is. ConfigError for what cannot be a folder of ours."""
    text = os.fspath(out)
    if "\0" in text:
        raise ConfigError("-o: a path cannot hold a zero byte; name a folder to make")
    if out.name in ("", ".."):
        real = out.resolve()
        what = "the current folder" if real == Path.cwd().resolve() else f"{real}"
        raise ConfigError(f"-o {text or repr(text)} is {what}; name a folder to make, such as artifacts/NAME")
    if os.path.islink(out):
        raise ConfigError(f"-o {out} is a symbolic link; name the folder itself, or another place")
    if len(os.fsencode(out.name)) + _ADDED > _LONGEST_NAME:
        raise ConfigError(f"-o: a name of {len(os.fsencode(out.name))} bytes is too long; choose a shorter one")
    if is_scratch(out) or out.name.endswith(_LOCK):
        raise ConfigError(f"-o {out}: runs use such names for their scratch; choose another one")
    try:
        return out.parent.resolve() / out.name
    except (OSError, RuntimeError) as e:  # a loop of links, a part that is too long
        raise ConfigError(f"-o {out} cannot be a folder ({e}); choose another place") from None


def _refuse_overlap(out: Path, real: Path, what: str, path: Path) -> None:
    """ConfigError when `out`, or a scratch name beside it, is, holds or lies in what is read."""
    for place in (Path(os.path.abspath(path)), path.resolve()):
        inside = [p for p in (place, *place.parents) if p.parent == real.parent or _same(p.parent, real.parent)]
        for p in inside:
            if _SCRATCH.fullmatch(p.name) and p.name.startswith(f".{out.name}."):
                raise ConfigError(f"-o {out}: {what}, {path}, lies where this run keeps its scratch; choose another -o")
        if place == real or _same(place, real):
            raise ConfigError(f"-o {out} is {what} itself; choose another place")
        if any(p == real or _same(p, real) for p in place.parents):
            raise ConfigError(f"-o {out} holds {what}, {path}, which would be replaced; choose another place")
        if what != "the current folder" and any(p == place or _same(p, place) for p in real.parents):
            raise ConfigError(f"-o {out} lies in {what}, {path}, which is only read; choose a place outside it")


def _same(one: Path, other: Path) -> bool:
    """The same folder by another name: another case of letters, a bind mount."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _was_just_published(real: Path) -> bool:
    """Whether a run made `real` and was killed before its scratch was gone: the same command then only cleans up."""
    made = _manifest_sha256(real)
    return made is not None and any((_run_file(s) or {}).get(_PUBLISHED) == made for s in _scratches(real))


def _scratches(real: Path) -> list[Path]:
    if not real.parent.is_dir():
        return []
    pattern = re.compile(re.escape(f".{real.name}.") + r"[0-9a-f]{8}\.partial")
    return sorted(p for p in real.parent.iterdir() if pattern.fullmatch(p.name) and not p.is_symlink() and p.is_dir())


def _manifest_sha256(folder: Path) -> str | None:
    path = folder / MANIFEST
    return file_sha256(path) if path.is_file() else None


# ---- one run at a time ---------------------------------------------------------------------------------


@contextmanager
def reserved(out: Path, reads: Mapping[str, Path], *, force: bool) -> Iterator[Place]:
    """Hold `out` for one run: everything is checked before anything is done, and the lock is ours until the end.

    Raises ConfigError for what `check` refuses, for another run on the same output, and under `force` when `out` holds
    what no manifest of ours lists. Inside the context, a full disk becomes one sentence.
    """
    real = check(out, reads, force=force)
    with disk_errors():
        made = _make_parents(real.parent)
        try:
            with locked(real.with_name(f".{real.name}{_LOCK}"), str(out)):
                notes = _recover(real)
                check(out, reads, force=force)
                old = _replaceable(out, real) if os.path.lexists(real) and force else None
                yield Place(out=out, real=real, force=force, old=old, notes=notes)
        finally:
            for folder in made:  # only if the run left nothing there
                _remove_empty(folder)


@dataclass(kw_only=True)
class Place:
    """An output that is ours to write, inside `reserved`. notes: for the user, about what earlier runs left."""

    out: Path
    real: Path
    force: bool
    old: _Seen | None
    notes: list[str] = field(default_factory=list)

    def start(self, identity: Mapping[str, Any], *, resume: bool, content: Callable[[], str] | None = None) -> Run:
        """The scratch folder of the run with this `identity`, which decides every byte that it makes.

        It is the one that the same run left when it was killed, or a new one; with `resume` False always a new one.
        Other runs' scratch folders are left alone and named in `notes`.

        content: what completes the identity and takes long to find, the hash of what is read. It is asked for only
        where a run that is otherwise the same left something. Else the run may begin without it, and says it with
        `Run.settle` once it is known; what a run left that was killed before cannot be shown to be of the same bytes,
        and is removed (`Run.anew`).
        """
        # As a run file gives it back: with lists where there were tuples.
        stated = json.loads(json_bytes({"kind": _KIND, "out": self.real.name, **identity}))
        run = self._run_of(stated)
        if content is not None and any(_agrees(_run_file(s), stated) for s in _scratches(self.real)):
            found = _run_file(run.folder) or {}
            stated[_CONTENT] = run.content = content()
            if found.get("id") == run.id and _CONTENT not in found:
                run.discard()
                run.anew = True
            elif found.get(_CONTENT) != run.content:  # that one is of other bytes: a folder apart
                run = self._run_of(stated)
        if os.path.lexists(run.folder) and not _is_empty(run.folder):
            if (_run_file(run.folder) or {}).get("id") != run.id:
                raise ConfigError(f"{run.folder} is in the way and is not this run's scratch; move it elsewhere")
            if resume:
                run.resumed = True
            else:
                run.discard()
        if os.path.lexists(self.real) and not self.force and not run.is_published():
            raise ConfigError(f"{self.out} exists already; pass --force to replace it, or -o for another place")
        if not run.resumed:
            run.folder.mkdir(exist_ok=True)
            write_bytes_atomically(run.folder / RUN, json_bytes({"id": run.id, **stated}))
            fsync_path(run.folder.parent)
        self.notes += [_left_alone(s, stated) for s in _scratches(self.real) if s != run.folder and _run_file(s)]
        return run

    def _run_of(self, stated: Mapping[str, Any]) -> Run:
        """The run that what is stated decides, whether or not it has a scratch folder."""
        run_id = hashlib.sha256(json_bytes(stated)).hexdigest()
        folder = self.real.with_name(f".{self.real.name}.{run_id[:8]}.partial")
        return Run(place=self, folder=folder, id=run_id, content=stated.get(_CONTENT))


@dataclass(kw_only=True)
class Run:
    """One run's scratch folder. id: hash of its identity. content: of what it reads; None until it is known (`settle`).

    resumed: whether an earlier, killed run made it. anew: whether what such a run left had to go; see `Place.start`.
    """

    place: Place
    folder: Path
    id: str
    content: str | None = None
    resumed: bool = False
    anew: bool = False

    @property
    def staged(self) -> Path:
        """What will become OUT."""
        return self.folder / FINAL

    def new_staged(self) -> Path:
        """`staged`, made anew and empty."""
        if self.staged.exists():
            shutil.rmtree(self.staged)
        self.staged.mkdir()
        return self.staged

    def settle(self, content: str) -> None:
        """Say of which bytes everything here was made: from here on it can be taken up after a kill."""
        write_bytes_atomically(self.folder / RUN, json_bytes({**(_run_file(self.folder) or {}), _CONTENT: content}))
        self.content = content

    def is_published(self) -> bool:
        """Whether OUT is what this very run made, so that only its scratch is left to be removed."""
        made = (_run_file(self.folder) or {}).get(_PUBLISHED)
        return made is not None and made == _manifest_sha256(self.place.real)

    def publish(self) -> None:
        """Rename `staged` to OUT, in the place of what was there, and remove that and the scratch folder.

        A kill at any moment leaves the old OUT or the new one whole. ConfigError, with the finished work kept for the
        same command, when something was put into OUT meanwhile.
        """
        real = self.place.real
        facts = {**(_run_file(self.folder) or {}), _PUBLISHED: _manifest_sha256(self.staged)}
        write_bytes_atomically(self.folder / RUN, json_bytes(facts))
        for folder, _, _ in os.walk(self.staged):
            fsync_path(Path(folder))
        os.utime(self.staged / MANIFEST)  # the time of publishing, by which the newest artifact is known
        if not os.path.lexists(real):
            os.rename(self.staged, real)
            fsync_path(real.parent)
        else:
            self._replace(real)
        self._clean_up(self.place.old)

    def _replace(self, real: Path) -> None:
        if self.place.old is None or real.is_symlink() or not real.is_dir() or _seen(real) != self.place.old:
            raise ConfigError(
                f"{self.place.out} was changed while this run worked; move what is there elsewhere and run the same "
                "command again, which only has to publish"
            )
        aside = self._free_aside()
        if not _exchange(self.staged, real):
            os.rename(real, aside)
            os.rename(self.staged, real)
            self.place.notes += _remove_artifact(aside, self.place.old)
        fsync_path(real.parent)

    def _free_aside(self) -> Path:
        names = (hashlib.sha256(f"{self.id} {n}".encode()).hexdigest()[:8] for n in itertools.count())
        places = (self.folder.with_name(f".{self.place.real.name}.{name}.old") for name in names)
        return next(p for p in places if not os.path.lexists(p))

    def close(self) -> None:
        """Remove what an earlier process left of this run, which is published: scratch, and what was replaced."""
        self._clean_up(None)

    def _clean_up(self, known: _Seen | None) -> None:
        if self.staged.exists():  # exchanged with OUT: what is here now is the old one
            aside = self._free_aside()
            os.rename(self.staged, aside)
            self.place.notes += _remove_artifact(aside, known)
        self.discard()

    def discard(self) -> None:
        """Remove the scratch folder; its run file goes last, so that what a kill leaves is still ours."""
        for path in sorted(self.folder.iterdir()):
            if path.name == RUN:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        (self.folder / RUN).unlink(missing_ok=True)
        self.folder.rmdir()


def _run_file(folder: Path) -> dict[str, Any] | None:
    """What the run file of a scratch folder says, or None when there is none of ours."""
    try:
        facts = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    except CompressError:
        return None
    return facts if facts.get("kind") == _KIND else None


def _agrees(facts: Mapping[str, Any] | None, stated: Mapping[str, Any]) -> bool:
    """Whether a run file states all of `stated`, whatever more it states."""
    return facts is not None and all(key in facts and facts[key] == stated[key] for key in stated)


def _left_alone(scratch: Path, mine: Mapping[str, Any]) -> str:
    theirs = _run_file(scratch) or {}
    differing = [k for k in mine if theirs.get(k) != mine[k]]
    what = ", ".join(f"{k}={_short(theirs.get(k))} and not {_short(mine[k])}" for k in differing[:2])
    return f"{scratch} holds an unfinished run ({what or 'of another version'}); remove it if you do not want it"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_empty(folder: Path) -> bool:
    """Nothing in it but, at most, a run file that was never finished: a kill between two steps of ours leaves that."""
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and all(p.name.startswith(f".{RUN}.") and p.name.endswith(".tmp") for p in folder.iterdir())
    )


def _make_parents(folder: Path) -> list[Path]:
    """Make `folder`; returns those that were not there, the innermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return


def _recover(real: Path) -> list[str]:
    """Undo or finish what a kill inside `publish` left beside `real`; returns notes."""
    notes: list[str] = []
    for scratch in _scratches(real):
        _remove_empty(scratch)  # a run was killed when only that was left to do
    pattern = re.compile(re.escape(f".{real.name}.") + r"[0-9a-f]{8}\.old")
    for aside in sorted(p for p in real.parent.iterdir() if pattern.fullmatch(p.name)):
        if aside.is_symlink() or not aside.is_dir() or (_seen(aside) and _listed(aside) is None):
            continue
        if os.path.lexists(real) or not _seen(aside):
            notes += _remove_artifact(aside)
        else:
            os.rename(aside, real)
            fsync_path(real.parent)
            notes.append(f"{real} was put back: a run had been killed while it replaced it")
    return notes


# ---- what is ours, file by file ------------------------------------------------------------------------


def _replaceable(out: Path, real: Path) -> _Seen:
    """What lies in `real`, if all of it is an artifact of ours; else ConfigError with the names of what is not."""
    seen = _seen(real)
    if (real / MANIFEST).is_file() and _listed(real) is None:
        raise ConfigError(
            f"{out} is not replaced: its {MANIFEST} does not list its files (an older version's, or damaged), so "
            "nothing shows what would be lost; move the folder elsewhere, or pass another place with -o"
        )
    strangers = _strangers(real, seen)
    if strangers:
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        raise ConfigError(
            f"{out} is not replaced: {', '.join(strangers[:5])}{more} would be lost, which no run made or which was "
            "changed since; move it elsewhere, or pass another place with -o"
        )
    return seen


def _seen(folder: Path) -> _Seen:
    """Everything below `folder` that is not a plain subfolder."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in [*files, *(f for f in folders if os.path.islink(os.path.join(where, f)))]:
            path = Path(where, name)
            info = path.lstat()
            found[path.relative_to(folder).as_posix()] = (info.st_size, info.st_mtime_ns, info.st_ino)
    return found


def _listed(folder: Path) -> Mapping[str, str] | None:
    """What the manifest of an artifact of ours lists: the hash of each file by name. None where there is none."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(folder)
    except CompressError:
        return None
    return manifest.files if manifest else None


def _strangers(folder: Path, seen: _Seen) -> list[str]:
    """Which of the files `seen` in `folder` its own manifest does not list, or lists with other content."""
    listed = _listed(folder)

    def is_ours(name: str) -> bool:
        if listed is None or name == MANIFEST:
            return listed is not None
        path = folder / name
        return name in listed and stat.S_ISREG(path.lstat().st_mode) and file_sha256(path) == listed[name]

    with ThreadPoolExecutor(IO_THREADS) as pool:
        names = sorted(seen)
        return [name for name, ours in zip(names, pool.map(is_ours, names), strict=True) if not ours]


def _remove_artifact(folder: Path, known: _Seen | None = None) -> list[str]:
    """Remove what the manifest of `folder` lists, the manifest last; what else is there stays, and a note says so.

    known: what was seen there when the files were compared with the manifest, so that they need not be read again.
    """
    seen = _seen(folder)
    strangers = _strangers(folder, seen) if known is None else [n for n in seen if known.get(n) != seen[n]]
    if strangers:
        return [f"{folder} was not removed: it holds {', '.join(strangers[:5])}, which no run made"]
    for name in sorted(set(seen) - {MANIFEST}):
        (folder / name).unlink()
    (folder / MANIFEST).unlink(missing_ok=True)
    for where, _, _ in os.walk(folder, topdown=False):
        os.rmdir(where)
    return []


# ---- what may go ---------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[Path]:
    """Scratch folders and replaced artifacts of ours that lie in a folder: of runs that were killed, or still work."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if is_scratch(path) and path.is_dir() and not path.is_symlink():
            is_ours = _run_file(path) is not None if path.name.endswith(".partial") else _listed(path) is not None
            found += [path] if is_ours else []
    return found


def remove(path: Path) -> list[str]:
    """Remove an artifact, a scratch folder or a replaced artifact of ours; returns notes on what stays, and why.

    Of an artifact only what its manifest lists, unchanged. Raises ConfigError when a run holds it, or for what is not
    ours.
    """
    real = _located(path) if not is_scratch(path) else path.parent.resolve() / path.name
    out = real.name.rpartition(".")[0].rpartition(".")[0].removeprefix(".") if is_scratch(real) else real.name
    with locked(real.with_name(f".{out}{_LOCK}"), str(path)):
        if real.name.endswith(".partial") and is_scratch(real):
            if _run_file(real) is None:
                raise ConfigError(f"{path} is not removed: no run of ours made it; move it elsewhere yourself")
            Run(place=Place(out=real, real=real, force=False, old=None), folder=real, id="").discard()
            return []
        if _listed(real) is None:
            raise ConfigError(f"{path} is not removed: no manifest lists its files; move it elsewhere yourself")
        return _remove_artifact(real)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step. False where the system or the file system cannot."""
    rename = getattr(_C_LIBRARY, "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))


__all__ = [
    "Place", "Run", "check", "check_apart", "file_read", "is_scratch", "leftovers", "remove", "reserved",
]  # fmt: skip
