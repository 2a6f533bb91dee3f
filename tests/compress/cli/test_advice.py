"""Advice is tested: what an error or a closing line names is typed as it stands, and works.

Each situation is one that users met. The commands and options that its words name are taken from them, capitals
(MODEL, FILE) are filled in, and they run: on small models, with little text. One that fails may fail for another
reason, whose own advice is then followed; twice the same reason, or a third, is a fault.
"""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress.cli.main import main

SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 256, "vocab_size": 4096}
SMALL |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
# As SmolLM2-135M's 576 and 1536: 64 divides the widths, and 128 not all of them.
SMOLLM2 = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 3, "num_key_value_heads": 3}
GEMMA3 = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
TEXT, OTHER = "te xt.txt", "other text.txt"  # to calibrate and learn on, and to judge with
# Little of everything: what is tested is that the commands run, not what they find.
LITTLE = {
    "awq": ["--calib", TEXT, "--samples", "2", "--seq-len", "64", "--effort", "fast", "--force"],
    "int8": ["--calib", TEXT, "--samples", "2", "--seq-len", "64", "--force"],
    "prune": ["--calib", TEXT, "--samples", "2", "--seq-len", "64", "--self-samples", "2", "--force"],
    "evaluate": ["--max-tokens", "300"],
    "export": ["--force"],
    "distill": ["--epochs", "1", "--batch", "2", "--seq-len", "64", "--tokens", "512", "--force"],
}
AWQ = "artifacts/a w q"
NAMES = {"MODEL": "it's smol", "FILE": OTHER, "FILE.txt": OTHER}
VERDICTS = (0, 3, 4)  # of evaluate


def save(folder: Path, family: str, tokenizer: dict[str, bytes], **sizes: Any) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **sizes})
    transformers.AutoModelForCausalLM.from_config(config).half().save_pretrained(folder)
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
    return folder


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: dict[str, bytes]) -> Path:
    """A workspace whose names need quotes: models, artifacts of them, an export, a text."""
    root = tmp_path_factory.mktemp("it's here")
    words = "the old house stood by the river and nobody had lived there for many years since the war".split()
    text = "\n".join(" ".join(words[(i * 7 + j * j) % len(words)] for j in range(14)) for i in range(120))
    (root / TEXT).write_text(text, encoding="utf-8")
    (root / OTHER).write_text(text[::-1], encoding="utf-8")
    smol = save(root / "it's smol", "Llama", tokenizer_files, **SMOLLM2)
    save(root / "gem ma", "Gemma3Text", tokenizer_files, **GEMMA3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for words_ in (
            ["awq", smol, *LITTLE["awq"], "-o", AWQ],
            ["int8", smol, *LITTLE["int8"], "-o", "in t8"],
            ["prune", smol, "--depth", "1", *LITTLE["prune"], "-o", "pr uned"],
            ["export", AWQ, "--target", "orin", "--format", "onnx-trt", "--context", "64", "-o", "t rt"],
        ):
            done = call(*words_)
            assert done.exit_code == 0, done.output
        changed = root / "cha'nged since"
        shutil.copytree(smol, changed)
        assert call("awq", changed, *LITTLE["awq"], "-o", "of the chan ged").exit_code == 0
        weights = changed / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-2] + b"\x00\x30")  # another number, and still a float16
    return root


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(made)
    yield made
    for path in Path("artifacts").iterdir():
        if path.name not in (Path(AWQ).name, "for-export"):
            shutil.rmtree(path)


def commands(text: str) -> list[list[str]]:
    """What the words name: between backticks, or after a colon up to the end of the clause."""
    found = re.findall(r"`compress ([^`]+)`", text)
    for clause in re.findall(r"(?:this works|next|Judge them|what they take|anew): (compress .*)", text):
        found += [part.removeprefix("compress ") for part in clause.split("   or")[0].split(" and then ")]
    return [shlex.split(words) for words in found]


def retries(args: list[str], text: str) -> list[list[str]]:
    """The same command with each option that the advice gives a value to, or with the folder that it names."""
    out = []
    advice = text.split("; ", 1)[-1] if "; " in text else ""
    for option, value in re.findall(r"(--[a-z-]+) ([\w.]+)(?![\w.:])", advice):
        if value.isupper() and value not in NAMES:
            continue  # something that has to be made first
        again = list(args)
        if option in again:
            again[again.index(option) + 1] = value
        else:
            again += [option, value]
        out.append(again)
    for folder in re.findall(r"(?:made|exported) from, (.+)$", text, re.MULTILINE):
        again = list(args)
        again[1] = folder
        out.append(again)
    return out


def filled(words: list[str], here: Path) -> list[str]:
    """Capitals stand for what the user has; little text unless the command says otherwise."""
    out = [NAMES.get(word, word) for word in words]
    little = LITTLE.get(out[0], [])
    pairs = [
        little[i : i + 1 + (not little[i + 1 : i + 2] or not little[i + 1].startswith("--"))] for i in _starts(little)
    ]
    return out + [word for pair in pairs if pair[0] not in out for word in pair]


def _starts(words: list[str]) -> list[int]:
    return [i for i, word in enumerate(words) if word.startswith("--")]


def reason(done: Result) -> str:
    return next((line for line in done.stderr.splitlines() if line.lower().startswith("error: ")), "")


def works(words: list[str], here: Path, before: tuple[str, ...]) -> None:
    """The command runs, or fails for a reason that was not met yet and whose advice works."""
    typed = filled(words, here)
    done = call(*typed)
    if done.exit_code in (VERDICTS if typed[0] == "evaluate" else (0,)):
        return
    said = reason(done)
    assert said and "Traceback" not in done.output, (typed, done.output[-2000:])
    assert said not in before and len(before) < 3, (typed, said, before)
    following = commands(said) or retries(typed, said)
    assert following, (typed, said)
    works(following[0], here, (*before, said))


SITUATIONS: dict[str, tuple[list[str], int]] = {
    # the command, and how many ways out its words name at least
    "bits that nothing reads": (["awq", "it's smol", "--bits", "16"], 2),
    "a group that does not divide": (["awq", "it's smol", "--group-size", "128"], 2),
    "rows longer than the model": (["awq", "it's smol", "--seq-len", "512"], 1),
    "awq of an artifact": (["awq", AWQ], 1),
    "prune of an artifact": (["prune", AWQ, "--depth", "1"], 1),
    "prune of what was pruned": (["prune", "pr uned", "--depth", "1"], 0),
    "too many blocks": (["prune", "it's smol", "--depth", "9"], 1),
    "edge takes groups of 128": (["export", AWQ, "--target", "orin"], 1),
    "edge takes no Gemma 3": (["export", "gem ma", "--target", "orin"], 2),
    "onnx takes no Gemma 3": (["export", "gem ma", "--target", "orin", "--format", "onnx"], 2),
    "fit for edge": (["fit", "it's smol", "--target", "orin"], 2),
    "INT8 for edge": (["export", "in t8", "--target", "orin"], 1),
    "INT8 by token for TensorRT": (["export", "in t8", "--target", "orin", "--format", "onnx-trt"], 1),
    "an artifact whose original changed": (
        ["export", "of the chan ged", "--target", "orin", "--format", "onnx-trt"],
        1,
    ),
    "an export again": (["export", "t rt", "--target", "orin", "--format", "onnx-trt"], 1),
    "inspect of a graph": (["inspect", "t rt"], 1),
    "evaluate without a text": (["evaluate", AWQ], 1),
    "evaluate without a reference": (["evaluate", "it's smol", "--data", OTHER, "--context", "64"], 1),
    "evaluate beyond the positions": (["evaluate", AWQ, "--data", "self"], 1),
    "evaluate beyond the caches": (["evaluate", "t rt", "--data", "self", "--context", "128"], 1),
    "distill without a text": (["distill", "--student", "pr uned", "--teacher", "it's smol"], 1),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_is_named_runs(name: str, here: Path) -> None:
    args, least = SITUATIONS[name]
    typed = filled(args, here) if args[0] in ("evaluate", "distill") else args
    done = call(*typed)
    said = reason(done) or done.stdout
    if args[0] != "fit":
        assert done.exit_code == 1 and "Traceback" not in done.output, done.output
        assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    named = commands(said) or retries(typed, said)
    assert len(named) >= least, said
    for words in named:
        assert "edge" not in words, "a format that needs gigabytes of another tool cannot be tried here"
        works(words, here, (reason(done),))


def test_group_sizes_that_are_offered_work(here: Path) -> None:
    done = call("awq", "it's smol", "--group-size", "0")
    assert done.exit_code == 2
    offered = re.findall(r"\w+", done.stderr.split("choose ")[1])
    assert {"auto", "128", "64", "32"} == set(offered) - {"or"}
    for size in ("auto", "128"):
        works(["awq", "it's smol", "--group-size", size], here, ())


@pytest.mark.parametrize(
    "words",
    [
        ["awq", "it's smol"],
        ["int8", "it's smol"],
        ["prune", "it's smol", "--depth", "1"],
        ["export", AWQ, "--target", "orin", "--format", "onnx-trt", "--context", "64"],
    ],
    ids=lambda words: str(words[0]),
)
def test_what_comes_next_runs(words: list[str], here: Path) -> None:
    done = call(*filled(words, here))
    assert done.exit_code == 0, done.output
    (following,) = commands(done.stdout)
    assert following[0] == "evaluate"
    works(following, here, ())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bert", "reads a text in both directions (an encoder, as BERT is)"),
        ("vit", "ViTModel (type 'vit') is not a causal language model"),
        ("mixtral", "mixture-of-experts models are not supported yet, use a dense model"),
        ("lora", "is a LoRA adapter, not a model; pass org/base with --adapter "),
        ("gguf", "holds model-Q4_0.gguf, llama.cpp's own format, which is not read"),
        ("org/model", "no such folder here, and the hub did not give it"),
    ],
)
def test_what_is_no_model_for_us_is_named(kind: str, said: str, here: Path, tokenizer_files: dict[str, bytes]) -> None:
    import transformers

    folder = here / f"my {kind}"
    if kind in ("bert", "vit"):
        family, name = ("Bert", "BertModel") if kind == "bert" else ("ViT", "ViTModel")
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes)).save_pretrained(folder)
    elif kind == "mixtral":
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        save(folder, "Mixtral", tokenizer_files, num_local_experts=2, **sizes)
    elif "/" not in kind:
        folder.mkdir(exist_ok=True)
        files = {
            "lora": {"adapter_config.json": '{"base_model_name_or_path": "org/base"}'},
            "gguf": {"model-Q4_0.gguf": "GGUF"},
        }
        for name, content in files[kind].items():
            (folder / name).write_text(content)
    for words in (
        ["awq"],
        ["int8"],
        ["prune", "--depth", "1"],
        ["fit", "--target", "orin"],
        ["export", "--target", "orin"],
    ):
        done = call(words[0], kind if "/" in kind else folder, *words[1:])
        assert done.exit_code == 1 and said in reason(done), (words, done.output)
        assert not commands(reason(done)) and "incomplete" not in done.output and "Traceback" not in done.output
