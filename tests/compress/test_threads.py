"""How threads wait, how many there are, and that no byte follows their number."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress import threads
from compress.numerics import mean_of
from compress.quantize.feedback import inverse_factor


def test_waiting_threads_sleep_unless_the_user_said_how_they_wait() -> None:
    environ: dict[str, str] = {}
    threads.configure(environ)
    assert environ == threads.WAITING
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        environ = {name: "mine"}
        threads.configure(environ)
        assert environ == {name: "mine"}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_a_container_s_quota_limits_the_threads(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "affinity", lambda: list(range(8)))
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert threads.available_cores(tmp_path) == cores
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)
    environ: dict[str, str] = {}
    monkeypatch.setattr(threads, "available_cores", lambda: cores)
    threads.configure(environ)
    assert environ.get("OMP_NUM_THREADS") == (str(cores) if cores < 8 else None)
    environ = {"OMP_NUM_THREADS": "5"}
    threads.configure(environ)
    assert environ["OMP_NUM_THREADS"] == "5"


def test_it_is_said_before_torch_is_loaded() -> None:
    code = (
        "import sys, os\nfrom compress.cli import main\nassert 'torch' not in sys.modules\n"
        "try:\n    main.main(['targets', '--json'])\nexcept SystemExit:\n    pass\n"
        "print(os.environ['GOMP_SPINCOUNT'])"
    )
    environ = {"PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.stdout.splitlines()[-1] == threads.WAITING["GOMP_SPINCOUNT"], done.stderr


def test_no_bit_follows_the_number_of_threads() -> None:
    """The factor of error feedback and the means that decide, with 1 to 5 threads."""
    x = torch.randn(3000, 512, generator=torch.Generator().manual_seed(0))
    gram = x.t() @ x / len(x)
    before = torch.get_num_threads()
    factors, means = [], []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            factors.append(inverse_factor(gram.clone()))
            means.append(mean_of(x.square()))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(factors[0], other) for other in factors[1:])
    assert len(set(means)) == 1
    assert means[0] == pytest.approx(float(x.double().square().mean()), rel=1e-7)
