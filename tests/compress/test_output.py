"""Where a run may write: what is refused before any work, what a kill leaves, and that nothing else changes."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import output
from compress.artifact import Manifest, read_manifest, write_manifest
from compress.errors import ArtifactError, CompressError, ConfigError
from compress.files import file_sha256

IDENTITY = {"stage": "test", "content": "0" * 64, "effort": "fast"}


class Desk:
    """A folder as a user has it: a model, texts, results, and a current folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.here = root / "work"
        self.model = self.here / "models" / "m"
        self.text = self.here / "texts" / "calib.txt"
        for path in (self.model / "model.safetensors", self.model / "config.json", self.text, self.here / "notes.md"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"a month of work: {path.name}")

    def reads(self) -> dict[str, Path]:
        return {"the model": self.model, "the text": self.text}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk(tmp_path / "desk")
    monkeypatch.chdir(desk.here)
    return desk


def contents(folder: Path) -> dict[str, str]:
    """Everything below a folder: kind and content or target, by path."""
    out = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            out[name] = f"-> {os.readlink(path)}"
        else:
            out[name] = file_sha256(path) if path.is_file() else "folder" if path.is_dir() else "other"
    return out


def make(out: Path, desk: Desk, *, force: bool = False, body: str = "made", effort: str = "fast", **more: Any) -> Path:
    """One whole run that makes an artifact of two files."""
    with output.reserved(out, desk.reads(), force=force) as place:
        run = place.start({**IDENTITY, "effort": effort}, resume=more.get("resume", True))
        if run.is_published():
            run.close()
            return place.real
        staged = run.new_staged()
        (staged / "weights").write_text(f"{body} {effort}")
        (staged / "deep").mkdir()
        (staged / "deep" / "part").write_text(body)
        record = {"stage": "test", "parent": {"path": "../m", "sha256": ""}, "options": {"effort": effort}}
        write_manifest(staged, Manifest(lineage=[record], reports=[]))
        more.get("before", lambda place: None)(place)
        run.publish()
        more.get("notes", []).extend(place.notes)
    return place.real


# ---- sixty ways to destroy something -------------------------------------------------------------------


def link(desk: Desk, name: str, target: Path | str) -> None:
    (desk.here / name).symlink_to(target)


def files(desk: Desk, *names: str) -> None:
    for name in names:
        path = desk.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the user's own {name}")


def move_model(desk: Desk, name: str) -> None:
    new = desk.here / name
    new.parent.mkdir(parents=True, exist_ok=True)
    desk.model.rename(new)
    desk.model = new


def move_text(desk: Desk, name: str) -> None:
    new = desk.here / name
    new.parent.mkdir(parents=True, exist_ok=True)
    desk.text.rename(new)
    desk.text = new


def an_artifact(desk: Desk, name: str, *extra: str) -> None:
    make(desk.here / name, desk)
    files(desk, *(f"{name}/{e}" for e in extra))


def special(desk: Desk, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(desk.here / "q")
    else:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind("q")


def edit(desk: Desk, name: str) -> None:
    (desk.here / name).write_text("a month of training, saved over what was there")


def a_list_for_a_manifest(desk: Desk) -> None:
    files(desk, "q/compress.json")
    (desk.here / "q" / "compress.json").write_text("[]")


def older_manifest(desk: Desk, name: str) -> None:
    an_artifact(desk, name)
    path = desk.here / name / "compress.json"
    value = json.loads(path.read_text())
    del value["lineage"][0]["files"], value["sha256"]
    path.write_text(json.dumps(value))


def through_a_link(desk: Desk) -> None:
    link(desk, "l", desk.model)
    desk.model = desk.here / "l"


def nothing(desk: Desk) -> None:
    pass


# Each: how the desk is laid out, what is passed as OUT. All are refused, with and without --force unless said.
Way = tuple[str, Callable[[Desk], object], str]
ALWAYS: list[Way] = [
    ("nothing", nothing, ""),
    ("a dot", nothing, "."),
    ("a dot and a slash", nothing, "./"),
    ("above", nothing, ".."),
    ("far above", nothing, "../.."),
    ("the root", nothing, "/"),
    ("a way back here", nothing, "models/.."),
    ("a way back to the model", nothing, "texts/../models/m"),
    ("the model", nothing, "models/m"),
    ("the model with a slash", nothing, "models/m/"),
    ("the folder of models", nothing, "models"),
    ("in the model", nothing, "models/m/out"),
    ("deep in the model", nothing, "models/m/a/b/c"),
    ("the folder of texts", nothing, "texts"),
    ("the text", nothing, "texts/calib.txt"),
    ("below the text", nothing, "texts/calib.txt/out"),
    ("a file", nothing, "notes.md"),
    ("below a file", nothing, "notes.md/out"),
    ("a link to a folder", lambda d: ((d.here / "real").mkdir(), link(d, "q", "real")), "q"),
    ("a link to the model", lambda d: link(d, "q", d.model), "q"),
    ("a link to a file", lambda d: link(d, "q", "notes.md"), "q"),
    ("a link to nothing", lambda d: link(d, "q", "gone"), "q"),
    ("a link to itself", lambda d: link(d, "q", "q"), "q"),
    ("below a link to itself", lambda d: link(d, "q", "q"), "q/out"),
    ("below a link to the model", lambda d: link(d, "q", d.model), "q/out"),
    ("the model by way of a link", lambda d: link(d, "q", d.model.parent), "q/m"),
    ("a model read through a link", through_a_link, "models/m"),
    ("the link that the model is read through", through_a_link, "l"),
    ("a folder of links to the model", lambda d: (
        (d.here / "q").mkdir(), link(d, "q/m", d.model), setattr(d, "model", d.here / "q" / "m")), "q"),
    ("a folder of links to the text", lambda d: (
        (d.here / "q").mkdir(), link(d, "q/t.txt", d.text), setattr(d, "text", d.here / "q" / "t.txt")), "q"),
    ("a fifo", lambda d: special(d, "fifo"), "q"),
    ("a socket", lambda d: special(d, "socket"), "q"),
    ("a name that is too long", nothing, "x" * 250),
    ("a scratch name", nothing, ".q.0123abcd.partial"),
    ("a name of old results", nothing, ".q.0123abcd.old"),
    ("a lock's name", nothing, ".q.compress-lock"),
    ("the model in a scratch folder of OUT", lambda d: move_model(d, ".q.0123abcd.partial/final"), "q"),
    ("the model is a scratch folder of OUT", lambda d: move_model(d, ".q.0123abcd.old"), "q"),
    ("the text in a scratch folder of OUT", lambda d: move_text(d, ".q.0123abcd.partial/t.txt"), "q"),
    ("in an artifact", lambda d: an_artifact(d, "a"), "a/out"),
    ("deep in an artifact", lambda d: an_artifact(d, "a"), "a/deep/out"),
    ("a stranger's file for a lock", lambda d: files(d, ".q.compress-lock"), "q"),
    ("a stranger's folder for a lock", lambda d: files(d, ".q.compress-lock/x"), "q"),
    ("a stranger's link for a lock", lambda d: link(d, ".q.compress-lock", "notes.md"), "q"),
]  # fmt: skip
FORCED: list[Way] = [
    ("another model", lambda d: files(d, "q/config.json", "q/model.safetensors"), "q"),
    ("a user's files", lambda d: files(d, "q/thesis.tex"), "q"),
    ("a user's files, deep", lambda d: files(d, "q/a/b/c/thesis.tex"), "q"),
    ("a hidden file", lambda d: files(d, "q/.git/HEAD"), "q"),
    ("a link in OUT", lambda d: ((d.here / "q").mkdir(), link(d, "q/l", "../notes.md")), "q"),
    ("a link to a folder in OUT", lambda d: ((d.here / "q").mkdir(), link(d, "q/l", d.model)), "q"),
    ("an artifact and a file", lambda d: an_artifact(d, "q", "notes.txt"), "q"),
    ("an artifact and a deep file", lambda d: an_artifact(d, "q", "deep/more/notes.txt"), "q"),
    ("an artifact and a link", lambda d: (an_artifact(d, "q"), link(d, "q/deep/l", d.model)), "q"),
    ("an artifact trained on", lambda d: (an_artifact(d, "q"), edit(d, "q/weights")), "q"),
    ("an artifact whose deep file changed", lambda d: (an_artifact(d, "q"), edit(d, "q/deep/part")), "q"),
    ("an artifact with another's manifest", lambda d: (
        an_artifact(d, "q"), make(d.here / "r", d, body="other"),
        shutil.copy(d.here / "r" / "compress.json", d.here / "q" / "compress.json")), "q"),
    ("a foreign compress.json", lambda d: files(d, "q/compress.json", "q/x"), "q"),
    ("a compress.json that is a list", a_list_for_a_manifest, "q"),
    ("an older version's artifact", lambda d: older_manifest(d, "q"), "q"),
    ("a file in place of a folder", lambda d: (
        an_artifact(d, "q"), (d.here / "q/weights").unlink(), files(d, "q/weights/thesis.tex")), "q"),
    ("a link in place of a file", lambda d: (
        an_artifact(d, "q"), shutil.copy(d.here / "q/weights", d.here / "w"), (d.here / "q/weights").unlink(),
        link(d, "q/weights", "../w")), "q"),
]  # fmt: skip
# Those that are fine: they run, and nothing but OUT is new.
FINE: list[Way] = [
    ("beside", nothing, "q"),
    ("deep and new", nothing, "a/b/q"),
    ("a stranger's OUT.partial", lambda d: files(d, "q.partial/x", "q.partial/run.json"), "q"),
    ("a stranger's .OUT.old", lambda d: files(d, ".q.old/x"), "q"),
    ("a stranger's OUT.old", lambda d: files(d, "q.old/x"), "q"),
    ("a stranger's .OUT.partial", lambda d: files(d, ".q.partial/x"), "q"),
    ("a stranger's scratch by name", lambda d: files(d, ".q.0123abcd.partial/x"), "q"),
    ("a stranger's run file", lambda d: files(d, ".q.0123abcd.partial/run.json"), "q"),
    ("a stranger's old results by name", lambda d: files(d, ".q.0123abcd.old/x"), "q"),
    ("the model is OUT.partial", lambda d: move_model(d, "q.partial"), "q"),
    ("the model is .OUT.old", lambda d: move_model(d, ".q.old"), "q"),
    ("the text is OUT.partial", lambda d: move_text(d, "q.partial"), "q"),
]  # fmt: skip
WAYS = [
    *((f"{name}{', forced' * force}", layout, out, force, True) for name, layout, out in ALWAYS for force in (0, 1)),
    *((f"{name}, forced", layout, out, 1, True) for name, layout, out in FORCED),
    *((f"{name}{', forced' * force}", layout, out, force, False) for name, layout, out in FINE for force in (0, 1)),
]


@pytest.mark.parametrize(("layout", "out", "force", "refused"), [w[1:] for w in WAYS], ids=[w[0] for w in WAYS])
def test_nothing_but_out_changes(
    layout: Callable[[Desk], object], out: str, force: int, refused: bool, desk: Desk
) -> None:
    """More than sixty ways to lose something: each is refused in one sentence, or makes OUT and nothing else."""
    layout(desk)
    before = contents(desk.root)
    if refused:
        with pytest.raises(ConfigError) as error:
            make(Path(out), desk, force=bool(force))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
        assert contents(desk.root) == before
        return
    real = make(Path(out), desk, force=bool(force))
    after = contents(desk.root)
    assert real == (desk.here / out) and (real / "weights").read_text() == "made fast"
    name = real.relative_to(desk.root).as_posix()
    made = {k for k in after if k == name or k.startswith(f"{name}/") or (k not in before and name.startswith(f"{k}/"))}
    assert {k: v for k, v in after.items() if k not in made} == before


def test_there_are_sixty_ways() -> None:
    assert len(WAYS) >= 60 and len({w[0] for w in WAYS}) == len(WAYS)


def test_a_stranger_at_this_runs_own_scratch_name(desk: Desk) -> None:
    with output.reserved(Path("q"), desk.reads(), force=False) as place:
        name = place.start(IDENTITY, resume=True).folder.name
    shutil.rmtree(name)
    for content in ("{}", "not JSON", json.dumps({"kind": "run of compress", "id": "another"})):
        files(desk, f"{name}/x")
        (desk.here / name / "run.json").write_text(content)
        before = contents(desk.root)
        for resume in (True, False):
            with pytest.raises(ConfigError, match="is in the way and is not this run's scratch"):
                make(Path("q"), desk, resume=resume)
            assert contents(desk.root) == before


def test_a_parent_that_cannot_be_written(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(desk.here))
    with pytest.raises(ConfigError, match="cannot be written; choose another place"):
        output.check(Path("a/b/q"), {}, force=False)


def test_the_current_folder_is_gone(desk: Desk) -> None:
    gone = desk.root / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="the current folder is not there any more"):
        output.check(Path("q"), {}, force=False)


# ---- replacing -----------------------------------------------------------------------------------------


def test_force_replaces_what_a_run_of_ours_made(desk: Desk) -> None:
    out = make(Path("q"), desk)
    with pytest.raises(ConfigError, match="q exists already; pass --force"):
        make(Path("q"), desk)
    before = contents(desk.root)
    make(Path("q"), desk, force=True, effort="best")
    assert (out / "weights").read_text() == "made best"
    assert set(contents(desk.root)) == set(before)
    (desk.here / "empty").mkdir()
    make(Path("empty"), desk, force=True)
    assert (desk.here / "empty" / "weights").exists()


def test_without_an_exchange_of_two_folders(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot swap two names: two renames, and the same end."""
    make(Path("q"), desk)
    before = contents(desk.root)
    monkeypatch.setattr(output, "_exchange", lambda one, other: False)
    make(Path("q"), desk, force=True, effort="best")
    assert (desk.here / "q" / "weights").read_text() == "made best" and set(contents(desk.root)) == set(before)


def test_what_is_put_into_out_while_the_run_works_is_not_lost(desk: Desk) -> None:
    make(Path("q"), desk)
    done = []

    def user_writes(place: output.Place) -> None:
        files(desk, "q/thesis.tex")
        done.append(place)

    with pytest.raises(ConfigError, match="q was changed while this run worked"):
        make(Path("q"), desk, force=True, effort="best", before=user_writes)
    assert (
        done and (desk.here / "q" / "thesis.tex").exists() and (desk.here / "q" / "weights").read_text() == "made fast"
    )
    (desk.here / "q" / "thesis.tex").unlink()
    make(Path("q"), desk, force=True, effort="best")
    assert (desk.here / "q" / "weights").read_text() == "made best"
    with pytest.raises(ConfigError, match="new was changed while this run worked"):
        make(Path("new"), desk, before=lambda place: files(desk, "new/thesis.tex"))
    assert contents(desk.here / "new") == {"thesis.tex": file_sha256(desk.here / "new" / "thesis.tex")}


def test_what_is_put_into_out_at_the_last_moment_is_kept_beside_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    make(Path("q"), desk)
    exchange = output._exchange

    def user_writes(one: Path, other: Path) -> bool:
        files(desk, "q/thesis.tex")
        return exchange(one, other)

    monkeypatch.setattr(output, "_exchange", user_writes)
    notes: list[str] = []
    make(Path("q"), desk, force=True, effort="best", notes=notes)
    kept = next(desk.here.glob(".q.*.old"))
    assert (kept / "thesis.tex").exists() and any("thesis.tex" in n and str(kept) in n for n in notes)
    make(Path("q"), desk, force=True, effort="fast")
    assert (kept / "thesis.tex").exists()


# ---- kills ---------------------------------------------------------------------------------------------

STEPS = ("replace", "rename", "unlink", "rmdir", "fsync", "mkdir", "utime", "open")


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run `work` in a process that kills itself before its `step`-th change of the file system; whether it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def inner(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count > step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return inner

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        output._exchange = counted(output._exchange)
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(7)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_killed_before_any_step(old: bool, exchange: bool, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill at any step OUT is the old or the new one, whole; the same command ends it and leaves nothing."""
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda one, other: False)
    earlier = make(Path("q"), desk).rename(desk.root / "earlier")
    start = contents(desk.here)
    step = 0
    while True:
        if old:
            shutil.copytree(earlier, "q")
        work = lambda: make(Path("q"), desk, force=old, effort="best")  # noqa: E731
        killed = killed_at(step, work)
        if (desk.here / "q").exists():
            manifest = read_manifest(desk.here / "q")
            assert manifest is not None and manifest.files is not None
            assert {n: file_sha256(desk.here / "q" / n) for n in manifest.files} == manifest.files
        elif old:  # between two renames: the old one is whole, and put back before anything else
            assert not exchange and [p for p in desk.here.glob(".q.*.old") if (p / "weights").exists()]
        if killed:
            try:
                make(Path("q"), desk, force=old, effort="best")
            except ConfigError as e:  # the new one is there, and nothing is left of the run that could tell
                assert "exists already" in str(e)
                make(Path("q"), desk, force=True, effort="best")
        assert (desk.here / "q" / "weights").read_text() == "made best"
        left = [p.name for p in desk.here.iterdir() if p.name.startswith(".q")]
        assert not left, f"step {step}: {left}"
        shutil.rmtree(desk.here / "q")
        assert contents(desk.here) == start
        if not killed:
            break
        step += 1
    assert step > 20, "the steps were not counted"


# ---- scratch -------------------------------------------------------------------------------------------


def test_the_same_command_finds_its_scratch_again_and_others_leave_it(desk: Desk) -> None:
    with pytest.raises(KeyboardInterrupt), output.reserved(Path("q"), desk.reads(), force=False) as place:
        run = place.start(IDENTITY, resume=True)
        (run.folder / "block").write_text("an hour")
        raise KeyboardInterrupt
    scratch = run.folder
    assert output.is_scratch(scratch) and scratch.parent == desk.here and not (desk.here / "q").exists()
    with output.reserved(Path("q"), desk.reads(), force=False) as place:
        other = place.start({**IDENTITY, "effort": "best"}, resume=True)
        assert other.folder != scratch and not other.resumed
        assert place.notes == [
            f"{scratch} holds an unfinished run (effort='fast' and not 'best'); remove it if you do not want it"
        ]
        other.discard()
    with output.reserved(Path("q"), desk.reads(), force=False) as place:
        run = place.start(IDENTITY, resume=True)
        assert run.resumed and (run.folder / "block").read_text() == "an hour" and not place.notes
    with output.reserved(Path("q"), desk.reads(), force=False) as place:
        run = place.start(IDENTITY, resume=False)
        assert not run.resumed and sorted(p.name for p in run.folder.iterdir()) == ["run.json"]


def test_what_a_run_reads_may_be_hashed_while_it_works(desk: Desk) -> None:
    """With nothing to take up, the hash is not asked for; what was made before it was known is never gone on from."""
    asked: list[str] = []
    identity = {"stage": "test", "effort": "fast", "files": ("a", "b")}

    def killed(content: str, *, settle: bool, block: str) -> output.Run:
        """A run on such a model; what it finds, what it keeps, and then it is killed."""

        def found() -> str:
            asked.append(content)
            return content

        with pytest.raises(KeyboardInterrupt), output.reserved(Path("q"), desk.reads(), force=False) as place:
            run = place.start(identity, resume=True, content=found)
            if settle and run.content is None:
                run.settle(content)
            (run.folder / "block").write_text(block) if not run.resumed else None
            notes[:] = place.notes
            raise KeyboardInterrupt
        return run

    notes: list[str] = []
    first = killed("A", settle=False, block="of A, as nobody knows")
    assert not asked and first.content is None and not (first.resumed or first.anew)
    second = killed("B", settle=True, block="of B")
    assert asked == ["B"] and second.anew and not second.resumed and not notes
    assert sorted(p.name for p in second.folder.iterdir()) == ["block", "run.json"]
    third = killed("B", settle=True, block="")
    assert asked == ["B", "B"] and third.resumed and (third.folder / "block").read_text() == "of B"
    other = killed("A", settle=True, block="of A")
    assert not (other.resumed or other.anew) and other.folder != third.folder
    assert notes == [
        f"{third.folder} holds an unfinished run (content='B' and not 'A'); remove it if you do not want it"
    ]
    shutil.rmtree(third.folder)
    again = killed("A", settle=True, block="")
    assert again.resumed and (again.folder / "block").read_text() == "of A" and again.folder == other.folder


def test_identity_is_looked_at_before_any_mark_of_publishing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed after publishing `fast` must not pass for the finished `best`."""
    monkeypatch.setattr(output.Run, "_clean_up", lambda self, known: None)
    make(Path("q"), desk, effort="fast")
    monkeypatch.undo()
    os.chdir(desk.here)
    assert len(list(desk.here.glob(".q.*.partial"))) == 1
    with pytest.raises(ConfigError, match="q exists already; pass --force"):
        make(Path("q"), desk, effort="best")
    make(Path("q"), desk, effort="best", force=True)
    assert (desk.here / "q" / "weights").read_text() == "made best"
    make(Path("q"), desk, effort="fast", force=True)
    assert (desk.here / "q" / "weights").read_text() == "made fast"


def test_a_refused_run_leaves_no_folder_behind(desk: Desk) -> None:
    before = contents(desk.root)
    with pytest.raises(ArtifactError), output.reserved(Path("a/b/q"), desk.reads(), force=False):
        raise ArtifactError("the model is damaged")
    assert contents(desk.root) == before


# ---- one run at a time ---------------------------------------------------------------------------------


def test_the_second_run_says_who_holds_it(desk: Desk) -> None:
    with output.reserved(Path("q"), desk.reads(), force=False):
        child = os.fork()
        if child == 0:
            try:
                make(Path("../work/q"), desk)
            except CompressError as e:
                (desk.root / "said").write_text(str(e))
            os._exit(0)
        os.waitpid(child, 0)
        said = (desk.root / "said").read_text()
        assert f"is being written by process {os.getpid()} on {socket.gethostname()} (" in said and "\n" not in said
        make(Path("r"), desk)  # another output is free
    assert not list(desk.here.glob(".q*"))
    make(Path("q"), desk)


def test_a_lock_that_a_kill_left_is_no_obstacle(desk: Desk) -> None:
    child = os.fork()
    if child == 0:
        with output.reserved(Path("q"), desk.reads(), force=False):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (desk.here / ".q.compress-lock").exists()
    make(Path("q"), desk)
    assert not (desk.here / ".q.compress-lock").exists()


def test_reports_and_caches_stay_out_of_models_and_artifacts(desk: Desk) -> None:
    make(Path("q"), desk)
    models = {"the candidate": desk.model}
    for inside in ("models/m", "models/m/reports", "q", "q/deep/more"):
        with pytest.raises(ConfigError, match="which is only read; choose a place outside it"):
            output.check_apart(Path(inside), models, "--report")
    output.check_apart(Path("q.reports"), models, "--report")
    output.check_apart(Path("models"), models, "--report")
