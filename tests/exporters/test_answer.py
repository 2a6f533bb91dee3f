"""`fit` and `export` give one answer, before any work, and what they advise runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress.cli.main import main
from compress.model import StreamedModel
from compress.quantize.int8_stage import Int8Request, quantize_int8
from compress.workspace import resolve
from exporters import answer
from exporters.sizing.inventory import read_model
from exporters.sizing.predict import Plan, what_fits
from exporters.sizing.targets import TARGETS

SMALL = {"num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 1024}
SMOLLM2 = {**SMALL, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
GEMMA3 = {**SMALL, "hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1}
MIXTRAL = {**SMALL, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_local_experts": 2}


def config(family: str, sizes: dict[str, Any], folder: Path) -> Path:
    """A folder with a config.json alone, which is all that `fit` needs."""
    import transformers

    made = getattr(transformers, f"{family}Config")(
        **sizes, architectures=[f"{family.removesuffix('Text')}ForCausalLM"]
    )
    made.save_pretrained(folder)
    return folder


def compress(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def advised(text: str) -> list[list[str]]:
    """The commands after "this works:"; each must parse, options and values."""
    line = re.search(r"this works: (.*)", text)
    commands = [shlex.split(part)[1:] for part in line[1].split(" and then ")] if line else []
    for words in commands:
        command = main.get_command(None, words[0])  # type: ignore[arg-type]
        assert command is not None
        command.make_context(words[0], words[1:])
    return commands


def test_smollm2_on_orin(tmp_path: Path) -> None:
    """edge takes groups of 128, which do not divide 576; in float16 it takes the model, and onnx-trt takes both."""
    folder = config("Llama", SMOLLM2, tmp_path / "my model")
    done = compress("fit", folder, "--target", "orin")
    assert done.exit_code == 0
    rows = [line for line in done.stdout.splitlines() if "INT4" in line]
    assert rows and all("yes" not in row for row in rows)
    assert "groups of 128 only, which do not divide the 576 inputs" in done.stdout
    commands = advised(done.stdout)
    assert commands[0] == ["awq", str(folder), "--sym"]
    assert commands[1][-2:] == ["--format", "onnx-trt"]
    other = compress("fit", folder, "--target", "orin", "--format", "onnx-trt")
    assert other.exit_code == 0 and "cannot be made" not in other.stdout


def test_gemma3_on_orin(tmp_path: Path) -> None:
    folder = config("Gemma3Text", GEMMA3, tmp_path / "gemma")
    for target in ("orin", "orin-nano"):
        done = compress("fit", folder, "--target", target)
        assert done.exit_code == 1
        assert "gemma3_text is not supported by edge yet" in done.stdout
        assert advised(done.stdout)[-1][-2:] == ["--format", "onnx-trt"]
    onnx = compress("fit", folder, "--target", "orin", "--format", "onnx")
    assert onnx.exit_code == 1 and "not supported by onnx yet" in onnx.stdout
    assert advised(onnx.stdout)[-1][-2:] == ["--format", "onnx-trt"]


# 2880 is a multiple of 64 and not of 128: Edge-LLM's INT4 product cannot hold it.
WIDE = {
    "hidden_size": 2880, "intermediate_size": 8640, "num_attention_heads": 45, "num_key_value_heads": 9, "head_dim": 64,
    "num_hidden_layers": 40, "vocab_size": 512, "max_position_embeddings": 8192,
}  # fmt: skip


def test_nothing_is_suggested_that_export_refuses(tmp_path: Path) -> None:
    """8 GB of float16 do not fit an Orin NX of 8 GB; weights of 4 bits would, and edge cannot hold them."""
    folder = config("Llama", WIDE, tmp_path / "wide")
    model, target = StreamedModel.outline(folder), TARGETS["orin-nx-8g"]
    plan = Plan(format="edge", context=4096, num_bits=16)
    sizes = read_model(folder)
    assert any("awq --bits 4" in s.text for s in what_fits(sizes, plan, target)), "by bytes alone it would fit"
    for form in ("edge", "onnx-trt"):
        plan = Plan(format=form, context=4096, num_bits=16)
        found = [s for s in what_fits(sizes, plan, target, answer.taker(model)) if s.made]
        assert any("awq --bits 4" in s.text for s in found) == (form == "onnx-trt")
        assert all(answer.taker(model)(s.sizing.plan) for s in found)
    done = compress("fit", folder, "--target", "orin-nx-8g")
    assert done.exit_code == 1 and "cannot be made" in done.stdout
    assert advised(done.stdout)[-1][-2:] == ["--format", "onnx-trt"]


def test_the_nearest_thing_fits_too(tmp_path: Path) -> None:
    """What a reader takes and the machine has no room for is no way out."""
    folder = config("Llama", {**WIDE, "num_hidden_layers": 120}, tmp_path / "deep")
    model = StreamedModel.outline(folder)
    assert "in the memory that is there" in answer.nearest(model, folder, TARGETS["orin-nx-8g"], 4096)
    words = advised(answer.nearest(model, folder, TARGETS["orin"], 4096))[-1]
    assert words[-4:] == ["--format", "edge", "--context", "4096"], "in float16, which edge takes in any width"


@pytest.mark.parametrize(
    ("family", "sizes", "said"),
    [
        ("Bert", {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}, "not a causal language model"),
        ("ViT", {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}, "not a causal language model"),
        ("Mixtral", MIXTRAL, "mixture-of-experts models are not supported yet"),
    ],
)
def test_what_no_stage_takes(family: str, sizes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = config(family, sizes, tmp_path / "model")
    for target in ("orin", "a100", "cpu"):
        done = compress("fit", folder, "--target", target)
        assert done.exit_code == 1 and said in done.stderr and "yes" not in done.stdout


@pytest.mark.parametrize(
    ("changes", "target", "words"),
    [
        ({}, ["orin"], ["int8", "MODEL", "--static"]),
        ({"scheme": "w8a16"}, ["orin"], ["int8", "MODEL", "--static"]),
        ({}, ["orin", "--format", "onnx-trt"], ["int8", "MODEL", "--static"]),
        (
            {"scheme": "w8a16", "group_size": 32},
            ["orin", "--format", "onnx-trt"],
            ["int8", "MODEL", "--scheme", "w8a16"],
        ),
    ],
)
def test_int8_that_a_reader_does_not_take_is_refused_with_the_command_that_works(
    changes: dict[str, Any], target: list[str], words: list[str], build_model: Any, calib_text: Path, tmp_path: Path
) -> None:
    """`fit` says the same of the artifact, and a target whose reader takes it has no complaint."""
    folder, made = build_model(hidden_size=128, intermediate_size=256, head_dim=32), tmp_path / "made"
    options: dict[str, Any] = {"calib": str(calib_text), "samples": 2, "seq_len": 64, "effort": "fast", **changes}
    quantize_int8(Int8Request(source=resolve(str(folder)), out=made, **options))
    done = compress("export", made, "--target", *target, "-o", tmp_path / "out")
    assert done.exit_code == 1 and not (tmp_path / "out").exists()
    (said,) = re.findall(r"this makes what they take: (.*)", done.stderr)
    assert shlex.split(said) == ["compress", *(str(folder) if w == "MODEL" else w for w in words)]
    command = main.get_command(None, words[0])  # type: ignore[arg-type]
    assert command is not None
    command.make_context(words[0], shlex.split(said)[2:])
    fitted = compress("fit", made, "--target", *target)
    assert fitted.exit_code == 1 and said in fitted.stdout
    for other in ("cpu", "a100"):
        fitted = compress("fit", made, "--target", other)
        assert fitted.exit_code == 0 and "cannot be made" not in fitted.stdout, fitted.output


def test_export_gives_the_same_answer_before_any_work(build_model: Any, tmp_path: Path) -> None:
    folder = build_model("Gemma3Text")
    done = compress("export", folder, "--target", "orin", "-o", tmp_path / "out")
    assert done.exit_code == 1 and "gemma3_text is not supported by edge yet" in done.stderr
    commands = advised(done.stderr)
    assert commands == [
        ["awq", str(folder), "--sym"],
        ["export", "--target", "orin", "--format", "onnx-trt"],
    ] or commands == [["export", str(folder), "--target", "orin", "--format", "onnx-trt"]]
    assert not (tmp_path / "out").exists()
