"""Imports point down: the layers of the design, checked on the source."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("compress", "exporters", "evaluators", "calibration_data")

# The rooms of `compress`, from the bottom up: a room imports only rooms that stand above it in this list. So levels
# keep their order, and there is no circle between rooms. A new room goes below the last one that it imports.
ROOMS = """
    errors
    recipe
    advice
    threads
    disk
    files
    headers
    linear
    lock
    scheme
    numerics
    plan
    kv_cache
    quantized
    learned
    activations
    siblings
    tell
    weights
    folders
    checkpoint
    formats
    shards

    artifact
    chat
    decoder
    dense
    devices
    contents
    distributed
    groups
    long_text
    names
    output
    passages
    positions
    rows
    turns
    one_query
    side_stream
    drawing
    sampling
    skeleton
    model
    divergence
    losses
    runtime
    doctor
    statistics
    block
    background
    blocks
    journal
    texts
    tokens
    calibration
    calibration_rows
    verify
    assemble
    workspace
    stage
    request
    adapter

    quantize prune distill

    foreseen
    pipeline search

    cli
    api
    __init__
    __main__
"""
# Rooms of one line are siblings, which never import each other.
ORDER = {name: row for row, line in enumerate(ROOMS.split("\n")) for name in line.split()}

MOST_LINES = 60
KERNELS = {f"compress.quantize.{name}_triton" for name in ("feedback", "refit", "tune")}

# What a module of ours imports inside a function, outside the command line and the Python API (which must be there at
# once, whatever they then need), and why.
LAZY = {
    ("exporters.answer", "exporters.trt.graph.architecture"): "needs the extra onnx",
    ("compress.doctor", "compress.runtime.kernels.weight_only"): "looks whether it can be loaded",
    ("compress.quantize.feedback_step", "compress.quantize.feedback_triton"): "Triton is there only with a GPU",
    ("compress.quantize.refit", "compress.quantize.refit_triton"): "Triton is there only with a GPU",
    ("compress.quantize.tune", "compress.quantize.tune_triton"): "Triton is there only with a GPU",
    ("compress.losses.at_once", "compress.losses.forward_kl_triton"): "Triton is there only with a GPU",
    ("compress.runtime.open", "compress.runtime.resident"): "one runtime of several, each with needs of its own",
    ("compress.runtime.open", "compress.runtime.ort_decoder"): "one runtime of several",
    ("compress.runtime.open", "compress.runtime.gpu_weights"): "one runtime of several",
    ("compress.runtime.open", "compress.runtime.tensorrt_decoder"): "one runtime of several",
    ("evaluators.written", "evaluators.page"): "matplotlib is an extra",
}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths)
    return dict(zip(names, paths, strict=True))


def own_imports(path: Path, known: dict[str, Path]) -> dict[str, bool]:
    """The modules of ours that a file imports, and whether only inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in whole]
        for name in names:
            if name in known:
                found[name] = found.get(name, True) and id(node) in inside
    return found


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
    return parts[1] if parts[0] == "compress" and len(parts) > 1 and parts[1] in ORDER else None


def test_every_room_has_a_place() -> None:
    rooms = {p.relative_to(ROOT / "compress").parts[0].removesuffix(".py") for p in (ROOT / "compress").rglob("*.py")}
    assert rooms - {"__init__"} <= set(ORDER), rooms - set(ORDER)


def test_imports_point_down() -> None:
    known = modules()
    wrong = []
    for name, path in known.items():
        mine = room(name)
        for module in own_imports(path, known):
            theirs = room(module)
            if mine and theirs and theirs != mine and ORDER[theirs] >= ORDER[mine]:
                wrong.append(f"{name} imports {module}, which does not stand above it")
            if mine and module.split(".")[0] in ("exporters", "evaluators") and ORDER[mine] < ORDER["pipeline"]:
                wrong.append(f"{name} imports {module}")
    assert not wrong


def test_there_is_no_circle() -> None:
    """Between any modules, imports inside functions and for types only included.

    `compress` itself is left out: what is imported of it is its version, and what it offers is loaded on first use.
    """
    known = modules()
    graph = {name: set(own_imports(path, known)) - {name, "compress"} for name, path in known.items()}
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_imports_inside_functions_have_a_reason() -> None:
    known = modules()
    lazy = {
        (name, module)
        for name, path in known.items()
        for module, inside in own_imports(path, known).items()
        if inside and not name.startswith(("compress.cli.", "compress.api")) and name != "compress"
    }
    assert lazy == set(LAZY), lazy ^ set(LAZY)


def test_a_function_fits_on_a_screen() -> None:
    """At most `MOST_LINES` from its `def` on, docstring included; kernels, which are one loop, excepted."""
    too_long = [
        f"{name}.{node.name}: {lines} lines"
        for name, path in modules().items()
        if name not in KERNELS and not name.startswith("compress.runtime.kernels.")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES
    ]
    assert not too_long


def test_only_the_command_line_knows_click() -> None:
    known = modules()
    users = {name for name, path in known.items() if "click" in {module.split(".")[0] for module in imports(path)}}
    assert users and all(name.startswith("compress.cli") for name in users), users


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
        "for name in ('', 'awq', 'prune', 'teach', 'distill', 'inspect', 'export', 'fit', 'targets', 'evaluate'):\n"
        "    args = [name, '--help'] if name else ['--help']\n"
        "    assert CliRunner().invoke(main, args).exit_code == 0, args\n"
        "print('torch' in sys.modules)"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "False"
