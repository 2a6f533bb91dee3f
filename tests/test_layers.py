"""Imports point down: the layers of the design, checked on the source."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEVEL = {
    "errors": 0, "siblings": 0, "tell": 0, "scheme": 0, "plan": 0, "numerics": 0, "quantized": 0, "activations": 0,
    "files": 0, "checkpoint": 0, "shards": 0, "formats": 0, "linear": 0, "headers": 0, "weights": 0, "folders": 0,
    "lock": 0, "disk": 0,
    "names": 1, "dense": 1, "skeleton": 1, "decoder": 1, "texts": 1, "tokens": 1, "sampling": 1,
    "model": 1, "groups": 1, "statistics": 1, "block": 1, "blocks": 1, "calibration": 1, "artifact": 1, "workspace": 1,
    "devices": 1, "doctor": 1, "output": 1,
    "journal": 1, "verify": 1, "assemble": 1, "runtime": 1, "background": 1, "distributed": 1,
    "rows": 1, "chat": 1, "long_text": 1, "passages": 1, "positions": 1,
    "quantize": 2, "prune": 2, "distill": 2,
    "cli": 4, "pipeline": 3, "__main__": 4, "__init__": 0,
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def room(module: str) -> str | None:
    """The room of `compress` that a dotted name belongs to."""
    parts = module.split(".")
    return parts[1] if parts[0] == "compress" and len(parts) > 1 and parts[1] in LEVEL else None


def test_every_room_has_a_level() -> None:
    rooms = {p.relative_to(ROOT / "compress").parts[0].removesuffix(".py") for p in (ROOT / "compress").rglob("*.py")}
    assert rooms <= set(LEVEL), rooms - set(LEVEL)


def test_imports_point_down() -> None:
    wrong = []
    for path in sorted((ROOT / "compress").rglob("*.py")):
        mine = path.relative_to(ROOT / "compress").parts[0].removesuffix(".py")
        for module in imports(path):
            theirs = room(module)
            if theirs and LEVEL[theirs] > LEVEL[mine]:
                wrong.append(f"{mine} imports {module}")
            if theirs and theirs != mine and LEVEL[theirs] == LEVEL[mine] == 2:
                wrong.append(f"{mine} imports {module}, a sibling stage")
            if module.split(".")[0] in ("exporters", "evaluators") and LEVEL[mine] < 4:
                wrong.append(f"{mine} imports {module}")
    assert not wrong


def test_siblings_and_data_stand_alone() -> None:
    for package, banned in (
        ("exporters", {"evaluators"}),
        ("evaluators", {"exporters"}),
        ("calibration_data", {"compress", "exporters", "evaluators"}),
    ):
        for path in (ROOT / package).rglob("*.py"):
            tops = {module.split(".")[0] for module in imports(path)}
            assert not tops & banned, path
            assert not any((room(m) or "").startswith("cli") for m in imports(path)), path


def test_help_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from click.testing import CliRunner; from compress.cli.main import main\n"
        "for name in ('', 'awq', 'teach', 'distill', 'inspect', 'export', 'fit', 'targets', 'evaluate'):\n"
        "    args = [name, '--help'] if name else ['--help']\n"
        "    assert CliRunner().invoke(main, args).exit_code == 0, args\n"
        "print('torch' in sys.modules)"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "False"
