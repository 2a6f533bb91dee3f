"""What many tests need: the network off, the bundled model, tiny models, and data that is not part of the project."""

import os
from collections.abc import Callable, Iterable
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
    "AUTOAWQ ABSENT", "GPTQMODEL ABSENT", "CPP ABSENT", "LoRA needs peft", "is installed", "could not import 'lm_eval'",
    "the group does not divide the columns",
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


@pytest.fixture
def build_model(tmp_path: Path, tokenizer_files: dict[str, bytes]) -> Build:
    """Saves a small randomly initialised model of a family, with the reference tokenizer; returns its folder.

    Norms and biases are perturbed: at their initial 1 and 0 a wrong fold would go unseen.
    """

    def build(family: str = "Llama", name: str = "model", dtype: str = "float32", **changes: Any) -> Path:
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
        folder = tmp_path / name
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        for file, content in tokenizer_files.items():
            (folder / file).write_bytes(content)
        return folder

    return build


@pytest.fixture
def calib_text(tmp_path: Path) -> Path:
    """Calibration text of a few thousand tokens."""
    path = tmp_path / "calib.txt"
    words = "the old house stood by the river and nobody had lived there for many years since the war".split()
    lines = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(14)) for i in range(120)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


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
