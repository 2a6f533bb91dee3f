"""What many tests need: the network off, the bundled model, tiny models, and data that is not part of the project."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# before any library of Hugging Face is imported, because they read it once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COMPRESS_DEBUG"] = "1"  # a bug shows its traceback

import pytest

import calibration_data

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


# With COMPRESS_CI=1 a test that skips for another reason than these fails the run: a missing package must not pass for
# a passed test. Listed is what CI's machine cannot have: a GPU, others' data and weights, gigabytes of another tool.
ACCEPTED_SKIPS = (
    "CUDA DEVICE", "TEST DATA ABSENT", "REAL MODEL ABSENT", "EDGE-LLM ABSENT", "SHELLCHECK ABSENT", "CHROMIUM ABSENT",
    "AUTOAWQ ABSENT", "GPTQMODEL ABSENT", "CPP ABSENT", "LoRA needs peft", "NO DEEPSPEED", "is installed",
    "could not import 'lm_eval'", "the group does not divide the columns",
)  # fmt: skip


def unaccepted_skips(reasons: Iterable[str]) -> list[str]:
    return sorted({r for r in reasons if not any(accepted in r for accepted in ACCEPTED_SKIPS)})


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("COMPRESS_CI") != "1" or reporter is None or hasattr(session.config, "workerinput"):
        return
    reasons = [str(r.longrepr[2]) for r in reporter.stats.get("skipped", []) if isinstance(r.longrepr, tuple)]
    wrong = unaccepted_skips(reasons)
    if wrong:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_sep("=", f"COMPRESS_CI: {len(wrong)} reasons for a skip are not accepted", red=True)
        for reason in wrong:
            reporter.write_line(reason)


@pytest.fixture(scope="session")
def reference_model() -> Path:
    """Folder of the bundled reference model."""
    return calibration_data.reference_model()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of third-party test data: $COMPRESS_DATA, or shared/data beside the project; skips without."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("COMPRESS_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"TEST DATA ABSENT: {folder} does not exist; set COMPRESS_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def tokenizer_files(reference_model: Path) -> dict[str, bytes]:
    return {name: (reference_model / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


Build = Callable[..., Path]


@pytest.fixture(scope="session")
def save_model(tokenizer_files: dict[str, bytes]) -> Build:
    """Saves a small randomly initialised model of a family, with the reference tokenizer, to a folder; returns it.

    Norms and biases are perturbed: at their initial 1 and 0 a wrong fold would go unseen.
    """

    def save(folder: Path, family: str = "Llama", dtype: str = "float32", **changes: Any) -> Path:
        import torch
        import transformers

        drop = changes.pop("drop", ())
        sizes = {k: v for k, v in {**SIZES, "vocab_size": 4096, **changes}.items() if k not in drop}
        config = getattr(transformers, f"{family}Config")(**sizes)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                else:
                    parameter.mul_(3)  # activations large enough for a wrong fold to show
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        for file, content in tokenizer_files.items():
            (folder / file).write_bytes(content)
        return folder

    return save


@pytest.fixture
def build_model(tmp_path: Path, save_model: Build) -> Build:
    """`save_model` to a folder of this test called `name`."""

    def build(family: str = "Llama", name: str = "model", **changes: Any) -> Path:
        return save_model(tmp_path / name, family, **changes)

    return build


@pytest.fixture(scope="session")
def rounded_student() -> Callable[..., Any]:
    """A model's folder as `end_to_end` trains it, each linear rounded to nearest, and lessons on rows of random ids."""
    import torch

    from compress import numerics
    from compress.linear import linears
    from compress.losses.heads import proven_head
    from compress.model import StreamedModel
    from compress.quantize.end_to_end import Student, lessons
    from compress.quantize.end_to_end_stage import is_norm
    from compress.quantized import QuantizedWeight
    from compress.scheme import Scheme

    scheme = Scheme(group_size=32)

    def rounded(w_OI: torch.Tensor) -> QuantizedWeight:
        w_OGg = numerics.to_groups(w_OI, scheme)
        scale, zero = numerics.scale_and_zero(*numerics.range_of(w_OGg), scheme)
        return QuantizedWeight.from_parts(numerics.quantize(w_OGg, scale, zero, scheme), scale, zero, scheme)

    def make(folder: Path, device: str = "cpu", rows: int = 10, seq_len: int = 24, dtype: Any = torch.float32) -> Any:
        opened = StreamedModel.open(folder, dtype=torch.float32, device=torch.device(device))
        opened.load_whole()
        head = proven_head(opened.model, opened.base, folder)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, len(head.weight_VH), (rows, seq_len), generator=generator)
        taught = lessons(opened.base, head, ids, 2, dtype)
        layers = {
            f"{opened.blocks_name}.{i}.{name}": rounded(module.weight.data.cpu())
            for i, block in enumerate(opened.blocks)
            for name, module in linears(block).items()
        }
        norms = {n: m.weight.data.half().cpu() for n, m in opened.model.named_modules() if is_norm(m)}
        student = Student(
            base=opened.base, head=head, blocks=opened.blocks, model=opened.model, layers=layers, norms=norms
        )
        return student, taught

    return make


@pytest.fixture(scope="session")
def save_text() -> Callable[[Path], Path]:
    """Writes calibration text of a few thousand tokens to a file; returns it."""

    def save(path: Path) -> Path:
        words = "the old house stood by the river and nobody had lived there for many years since the war".split()
        lines = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(14)) for i in range(120)]
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return save


@pytest.fixture
def calib_text(tmp_path: Path, save_text: Callable[[Path], Path]) -> Path:
    """Calibration text of a few thousand tokens."""
    return save_text(tmp_path / "calib.txt")


@pytest.fixture(scope="session")
def small_workspace(
    save_model: Build, save_text: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`model`, `calib.txt` and `artifacts/small`, an asymmetric AWQ artifact of it with one layer skipped.

    Made once and never changed: who changes something, or writes beside it, copies the folder (`in_workspace`).
    """
    from compress.quantize.awq_stage import AwqRequest, quantize_awq
    from compress.scheme import Scheme
    from compress.workspace import resolve

    root = tmp_path_factory.mktemp("workspace")
    request = AwqRequest(
        source=resolve(str(save_model(root / "model"))), out=root / "artifacts" / "small",
        scheme=Scheme(group_size=32), calib=str(save_text(root / "calib.txt")), samples=8, seq_len=64,
        skip=("layers.0.mlp.down_proj",),
    )  # fmt: skip
    quantize_awq(request)
    return root


@pytest.fixture
def in_workspace(small_workspace: Path, tmp_path: Path) -> Path:
    """A copy of `small_workspace` that is this test's own: its `tmp_path`."""
    shutil.copytree(small_workspace, tmp_path, dirs_exist_ok=True)
    return tmp_path


FORKS = """
import os, sys, traceback
{code}
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """A process that has imported what `work` needs and computed nothing; each run of `work` is a fork of it."""

    def __init__(self, code: str, words: Iterable[object]) -> None:
        import torch

        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-c", FORKS.replace("{code}", code), *map(str, words)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        assert self._line() == "ready"

    def start(self) -> int:
        """The process id of a new run."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return int(self._line())

    def code(self) -> int:
        """How the run ended; negative for a signal."""
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def forks() -> Iterator[Callable[..., Forks]]:
    """`forks(code, word, ...)`: Python code that defines `work()` and prints nothing; words are its `sys.argv[1:]`."""
    made: list[Forks] = []

    def make(code: str, *words: object) -> Forks:
        made.append(Forks(code, words))
        return made[-1]

    yield make
    for one in made:
        one.process.communicate()  # end of its input, which ends it


@pytest.fixture
def valid_json() -> Callable[[str, str], Any]:
    """Parses what a command printed with `--json`, which must be as its schema in `compress/schemas` says."""
    import json

    import jsonschema

    schemas = Path(__file__).resolve().parents[1] / "compress" / "schemas"

    def parse(command: str, text: str) -> Any:
        value = json.loads(text)
        jsonschema.validate(value, json.loads((schemas / f"{command}.json").read_text(encoding="utf-8")))
        return value

    return parse
