"""Two processes that share the calibration set make what one process makes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from compress.block import BlockResult, LoadedBlock
from compress.blocks import stream
from compress.cli.main import main
from compress.distributed import add_up, bounds, from_first, num_processes, owners, rank
from compress.files import read_json
from compress.linear import linears
from compress.model import StreamedModel
from compress.plan import LayerPlan, LayerScheme
from compress.quantize.awq_block import AwqOptions, awq_block
from compress.scheme import Scheme
from compress.statistics import Wanted

WORLD = 2

# What each process does; the first one saves what it found.
PROCESS = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from compress.distributed import joined, rank, wait_for_all
from test_distributed import outcome
torch.set_num_threads(1)
with joined(sys.argv[4]) as device:
    found = {effort: outcome(sys.argv[2], effort, device=device) for effort in ("fast", "balanced")}
    torch.save(found, f"{sys.argv[3]}.{rank()}.pt")
    wait_for_all()
"""


class Kept:
    """A store in memory."""

    def __init__(self) -> None:
        self.blocks: dict[int, BlockResult] = {}

    def load(self, index: int) -> BlockResult | None:
        return None

    def save(self, index: int, prefix: str, result: BlockResult) -> None:
        self.blocks[index] = result


def outcome(folder: str, effort: str, num_parts: int = 1, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Gram matrices, codes, scales and errors of every block."""
    model = StreamedModel.open(folder, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    # three batches of at most 2048 tokens (8192 on a GPU), so that two processes get unequal parts
    rows = 20 if device == "cpu" else 80
    ids_NT = torch.randint(0, 4096, (rows, 256), generator=torch.Generator().manual_seed(1))
    seen: dict[str, torch.Tensor] = {}
    options = AwqOptions(scheme=Scheme(group_size=32), effort=effort)

    def method(loaded: LoadedBlock) -> BlockResult:
        for group, statistics in zip(loaded.groups, loaded.statistics, strict=True):
            seen[f"{loaded.index}.{group.name}.gram"] = statistics.gram_II.clone()
            seen[f"{loaded.index}.{group.name}.tokens"] = torch.tensor(statistics.num_tokens)
            assert statistics.low_I is not None and statistics.high_I is not None and statistics.rows_SI is not None
            seen[f"{loaded.index}.{group.name}.ranges"] = torch.stack([statistics.low_I, statistics.high_I])
            seen[f"{loaded.index}.{group.name}.rows"] = statistics.rows_SI.clone()
        seen[f"{loaded.index}.check"] = loaded.check_output.clone()
        plan = {loaded.prefix + name: LayerScheme(weight=options.scheme) for name in linears(loaded.module)}
        return awq_block(loaded, LayerPlan(plan), options)

    store = Kept()
    wanted = Wanted(ranges=True, rows=100)
    for done in stream(model, ids_NT, method, store, paths=options.paths, num_parts=num_parts, wanted=wanted):
        seen[f"{done.index}.errors"] = torch.tensor([layer["error"] for layer in done.report["layers"]])
    for index, block in store.blocks.items():
        for name, q in block.quantized.items():
            seen[f"{index}.{name}.codes"], seen[f"{index}.{name}.scale"] = q.codes_OI, q.scale_OG
    return {name: value.cpu() for name, value in seen.items()}


def several(folder: Path, tmp_path: Path, device: str = "cpu") -> list[dict[str, dict[str, torch.Tensor]]]:
    """What each process found, by effort."""
    together([sys.executable, "-c", PROCESS, str(Path(__file__).parent), str(folder), str(tmp_path / "found"), device])
    return [torch.load(tmp_path / f"found.{i}.pt") for i in range(WORLD)]


def together(command: list[str], code: int = 0) -> list[str]:
    """Run a command in two processes that meet, as torchrun starts them; what each wrote to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(WORLD)}
    running = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, env={**os.environ, **meeting, "RANK": str(i), "LOCAL_RANK": str(i)}
        )
        for i in range(WORLD)
    ]
    told = [process.communicate(timeout=240)[1].decode() for process in running]
    assert {process.returncode for process in running} == {code}, told
    return told


def test_two_processes_equal_one(build_model: Any, tmp_path: Path) -> None:
    """Bit for bit, when the one process adds the calibration set up in two parts; in one part, sums are rounded in
    another order, so Gram matrices agree to float32 noise and errors with them."""
    folder = build_model()
    found = several(folder, tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = {effort: outcome(str(folder), effort, num_parts=WORLD) for effort in found[0]}
        plain = outcome(str(folder), "fast")
    finally:
        torch.set_num_threads(threads)
    for effort, expected in one.items():
        assert int(expected["0.o_proj.tokens"]) == 20 * 256
        assert expected["0.o_proj.rows"].shape[0] == 100  # from both processes' tokens
        for mine in found:
            assert mine[effort].keys() == expected.keys()
            assert not [key for key in expected if not torch.equal(mine[effort][key], expected[key])]
    for key in (k for k in plain if k.startswith("0.") and k.endswith("gram")):
        norm = plain[key].diagonal().sqrt()
        assert float(((one["fast"][key] - plain[key]) / (norm[:, None] * norm)).abs().max()) < 1e-5
    torch.testing.assert_close(one["fast"]["0.errors"], plain["0.errors"], rtol=0.02, atol=0)


def test_the_command_in_two_processes(build_model: Any, tmp_path: Path) -> None:
    """One of them reads the text, keeps the journal and writes; a single process made the same rows and codes."""
    folder, text = build_model(), tmp_path / "rows.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"Row {i} tells of ship number {7 * i}. " * 9}) + "\n" for i in range(150))
    )
    options = ["--calib", str(text), "--samples", "40", "--seq-len", "128", "--group-size", "32", "--device", "cpu"]
    command = [sys.executable, "-m", "compress", "awq", str(folder), *options, "-o"]
    told = together([*command, str(tmp_path / "two")])
    assert [bool(said.strip()) for said in told] == [True, False]  # the second process is silent
    alone = CliRunner().invoke(main, [*command[3:], str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    one, two = (read_json(tmp_path / name / "compress.json")["lineage"][-1] for name in ("one", "two"))
    assert one["calibration"] == two["calibration"] and one["plan"] == two["plan"]
    errors = [[layer["error"] for layer in record["layers"]] for record in (one, two)]
    torch.testing.assert_close(*(torch.tensor(e) for e in errors), rtol=0.02, atol=0)
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    said = sorted(
        told[-1] for told in map(str.splitlines, together([*command, str(tmp_path / "x"), "--samples", "1"], 1))
    )
    assert "another process of this run has ended" in said[1] and "pass more --samples" in said[0]


@given(st.integers(0, 50), st.integers(1, 9))
def test_parts_are_contiguous_and_even(num_items: int, count: int) -> None:
    cut = bounds(num_items, count)
    assert [item for first, last in cut for item in range(first, last)] == list(range(num_items)) and len(cut) == count
    sizes = [last - first for first, last in cut]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(1, 1000)), st.integers(1, 9))
def test_work_is_shared_out_evenly(costs: list[int], count: int) -> None:
    """No process has more than the mean and one piece (Graham's bound), and each piece has one owner."""
    found = owners(costs, count)
    loads = [sum(c for c, o in zip(costs, found, strict=True) if o == i) for i in range(count)]
    assert max(loads) <= sum(costs) / count + max(costs, default=0)


def test_alone_nothing_is_exchanged() -> None:
    x = torch.arange(4.0)
    add_up(x)
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0] and from_first(x) is x
    assert (rank(), num_processes()) == (0, 1)
