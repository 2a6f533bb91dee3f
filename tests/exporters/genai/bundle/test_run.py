"""The bundle's run.py: as a user runs it, without torch and transformers, and piece by piece."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.model import StreamedModel
from exporters.genai.bundle import FILES, pins

pytest.importorskip("onnxruntime", reason="ONNXRUNTIME ABSENT: the bundle was not tested")

from exporters.genai.bundle import run  # noqa: E402

PROMPT = "The old house stood at the end of the lane"
ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def folder(exported: tuple[Path, Path]) -> Path:
    return exported[1]


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which torch and transformers cannot be imported and nothing of ours is on the path."""
    for name in ("torch", "transformers", "compress", "exporters"):
        (tmp_path / "banned" / name).mkdir(parents=True)
        (tmp_path / "banned" / name / "__init__.py").write_text(f"raise ImportError('{name} is banned here')")
    return os.environ | {"PYTHONPATH": str(tmp_path / "banned"), "OMP_NUM_THREADS": "1"}


def call(
    folder: Path, env: dict[str, str], *arguments: str, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "run.py", *arguments]
    return subprocess.run(command, cwd=folder, env=env, input=text, capture_output=True, encoding="utf-8")


@torch.no_grad()
def greedy(artifact: Path, ids: list[int], count: int) -> list[int]:
    """The artifact's own greedy continuation: the whole sequence anew for every token."""
    model = StreamedModel.open(artifact)
    made: list[int] = []
    for _ in range(count):
        hidden = model.embed(torch.tensor([ids + made]))
        for i in range(model.num_blocks):
            model.load_block(i)
            hidden = model.run_block(i, hidden)
        made.append(int(model.head(hidden)[0, -1].argmax()))
    return made


def test_greedy_without_torch(exported: tuple[Path, Path], bare: dict[str, str]) -> None:
    from tokenizers import Tokenizer

    artifact, folder = exported
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = greedy(artifact, tokenizer.encode(PROMPT).ids, 10)
    done = call(folder, bare, PROMPT, "--max-new-tokens", "10", "--ids", "--json")
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == wanted
    said = json.loads(done.stderr)
    assert said["new_tokens"] == 10 and 0 < said["prefill_seconds"] < said["first_token_seconds"]
    assert said["tokens_per_second"] > 0 and said["peak_rss_mib"] > 20
    spoken = call(folder, bare, "-", "--max-new-tokens", "10", text=PROMPT)
    assert spoken.stdout == tokenizer.decode(tokenizer.encode(PROMPT).ids + wanted)[len(PROMPT) :] + "\n"
    assert "tokens/s" in spoken.stderr


CHAT = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}{{ '<|system|>\\n' }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# What templates out there use beyond plain loops.
TEMPLATES = {
    "plain": CHAT,
    "beginning of text": "{{ bos_token }}" + CHAT,
    "generation": "{{ messages[0].content }}\n  {% generation %}\n  words\n  {% endgeneration %}\nend",
    "loop controls": "{% for m in messages %}{% if not m.role %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}<\u00e9'>",
    "date": "{{ strftime_now('%Y') }} {{ messages[-1]['content'] | trim }}",
    "undefined": "{% if tools is not none %}no{% endif %}{{ bos_token or '' }}{{ messages[0].content }}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_transformers_does(name: str, reference_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference_model)
    text = '  Is <this> a "caf\u00e9"?\n '
    config = {k: {"content": v} if k == "bos_token" else v for k, v in tokenizer.special_tokens_map.items()}
    wanted = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    assert run.render(TEMPLATES[name], text, {**config, "model_max_length": 8}) == wanted


@pytest.fixture
def instruct(folder: Path, tmp_path: Path) -> Path:
    """The bundle with a chat template beside it."""
    copy = tmp_path / "it's a chat"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text(CHAT)
    return copy


def test_a_chat_template_is_used_unless_told_not_to(
    exported: tuple[Path, Path], instruct: Path, bare: dict[str, str]
) -> None:
    from transformers import AutoTokenizer

    artifact, folder = exported
    chat = AutoTokenizer.from_pretrained(instruct).apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    count = ("--max-new-tokens", "6", "--ids", "--json")
    for flags in ((), ("--chat",)):
        done = call(instruct, bare, PROMPT, *flags, *count)
        assert [int(line) for line in done.stdout.split()] == greedy(artifact, chat, 6), done.stderr
        said = json.loads(done.stderr)
        assert said["chat"] is True and said["prompt_tokens"] == len(chat)
    assert call(instruct, bare, PROMPT, "--no-chat", *count).stdout == call(folder, bare, PROMPT, *count).stdout
    assert "prompt tokens with the chat template" in call(instruct, bare, PROMPT, "--max-new-tokens", "1").stderr


def test_a_chat_that_cannot_be_is_one_sentence(folder: Path, instruct: Path, bare: dict[str, str]) -> None:
    def refused(where: Path, *flags: str) -> str:
        done = call(where, bare, PROMPT, *flags, "--max-new-tokens", "1")
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
        return done.stderr

    assert "has no chat template; leave --chat out" in refused(folder, "--chat")
    (instruct / "chat_template.jinja").write_text("{{ raise_exception('only in pairs') }}")
    assert "fails (only in pairs); pass --no-chat" in refused(instruct)
    banned = Path(bare["PYTHONPATH"]) / "jinja2"
    banned.mkdir()
    (banned / "__init__.py").write_text("raise ImportError('absent')")
    assert "needs jinja2, which is not installed" in refused(instruct)
    (banned / "__init__.py").write_text("__version__ = '3.1.5'")
    for name in ("ext", "nodes", "sandbox"):
        (banned / f"{name}.py").write_text("")
    assert "jinja2 3.1.5 has a sandbox with known holes" in refused(instruct)
    assert call(instruct, bare, PROMPT, "--no-chat", "--max-new-tokens", "1").returncode == 0


def test_a_template_is_found_where_transformers_finds_it(tmp_path: Path) -> None:
    assert run.chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]})
    )
    assert run.chat_template(tmp_path) == "d"
    config.write_text(json.dumps({"chat_template": "inside"}))
    assert run.chat_template(tmp_path) == "inside"
    (tmp_path / "chat_template.jinja").write_text("beside")
    assert run.chat_template(tmp_path) == "beside"


def test_waiting_threads_sleep_after_a_while(folder: Path, tmp_path: Path) -> None:
    for spin in (0, 50, run.SPIN):
        options = run.Decoder(folder, capacity=8, spin=spin).session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spin > 0))
        assert options.get_session_config_entry("session.intra_op.spin_duration_us") == str(spin)
    cores = run.available_cores(tmp_path)
    assert cores >= 1
    for text, wanted in (("max 100000", cores), ("100000 100000", 1), ("5000 100000", 1), ("no", cores)):
        (tmp_path / "cpu.max").write_text(text)
        assert run.available_cores(tmp_path) == wanted


def test_the_command_of_the_readme_runs(folder: Path, bare: dict[str, str]) -> None:
    """As it is typed: through a shell, in the export's folder."""
    from exporters.genai.write import USAGE

    env = bare | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(USAGE.line(), shell=True, cwd=folder, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.strip() and "tokens/s" in done.stderr
    assert all(pin in USAGE.needs[0] for pin in pins())


def test_sampling_is_repeatable(folder: Path, bare: dict[str, str]) -> None:
    draw = ("--max-new-tokens", "12", "--ids", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.95")
    first, again, other = (call(folder, bare, PROMPT, *draw, "--seed", s).stdout for s in ("1", "1", "2"))
    assert first == again != other
    plain = call(folder, bare, PROMPT, "--max-new-tokens", "12", "--ids").stdout
    assert call(folder, bare, PROMPT, *draw, "--top-k", "1").stdout == plain


def test_stops_at_end_of_text(folder: Path, bare: dict[str, str], tmp_path: Path) -> None:
    made = call(folder, bare, PROMPT, "--max-new-tokens", "8", "--ids").stdout.split()
    stop = next(i for i in range(2, 8) if made[i] not in made[:i])
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = [4095, int(made[stop])]
    (copy / "genai_config.json").write_text(json.dumps(config))
    assert call(copy, bare, PROMPT, "--max-new-tokens", "8", "--ids").stdout.split() == made[:stop]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x " * 400,), "the model's context is 256; shorten it"),
        (("",), "the prompt has no token"),
        (("x", "--top-p", "0"), "--top-p 0.0: must be more than 0"),
        (("x", "--max-new-tokens", "0"), "--max-new-tokens 0: must be at least 1"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, folder: Path, bare: dict[str, str]) -> None:
    done = call(folder, bare, *arguments)
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr


def test_generation_ends_with_the_context(folder: Path) -> None:
    decoder = run.Decoder(folder, capacity=10_000)
    assert decoder.capacity == 256
    prompt = [3 + i % 50 for i in range(250)]
    made = list(run.generate(decoder, prompt, 100, {"temperature": 0.0, "top_k": 0, "top_p": 1.0}, seed=0))
    assert len(made) <= 7  # six rows are left in the cache, and the last token needs none


def test_a_prompt_in_chunks_is_the_same_prompt(folder: Path) -> None:
    """Chunks, single tokens and the whole at once: one sequence, so the same logits."""
    ids = [(7 * i * i + 3) % 4096 for i in range(2 * run.CHUNK // 2 + 40)]
    every = run.Decoder(folder, capacity=200).forward(ids).copy()
    some = run.Decoder(folder, capacity=200).forward(ids, last=3)
    assert every.shape == (len(ids), 4096) and some.shape == (3, 4096)  # the graph leaves out the others
    whole = every[-1]
    chunked = run.Decoder(folder, capacity=200).prefill(ids)
    single = run.Decoder(folder, capacity=200)
    for token in ids:
        last = single.forward([token])[-1]
    scale = float(np.abs(whole).max())
    assert len(ids) > run.CHUNK
    assert float(np.abs(some - every[-3:]).max()) < 1e-5 * scale
    assert float(np.abs(chunked - whole).max()) < 1e-5 * scale
    assert float(np.abs(last - whole).max()) < 1e-5 * scale


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_no_half_characters(reference_tokenizer: Any, text: str) -> None:
    """Every piece is whole, and together they are what decoding all at once gives."""
    ids = reference_tokenizer.encode("Before: " + text).ids
    start = len(reference_tokenizer.encode("Before:").ids)
    stream = run.TextStream(reference_tokenizer, ids[:start])
    pieces = [stream.add(token) for token in ids[start:]]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    joined = "".join(pieces) + stream.finish()
    assert reference_tokenizer.decode(ids[:start]) + joined == reference_tokenizer.decode(ids)


@pytest.fixture(scope="session")
def reference_tokenizer(tokenizer_files: dict[str, bytes]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_buffer(tokenizer_files["tokenizer.json"])


def test_an_unfinished_character_is_held_until_the_end(reference_tokenizer: Any) -> None:
    ids = reference_tokenizer.encode("a \U0001f642").ids
    stream = run.TextStream(reference_tokenizer, [])
    shown = "".join(stream.add(token) for token in ids[:-1])
    assert shown == "a " and stream.finish() == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True),
    st.integers(0, 12), st.floats(0.05, 1.0), st.floats(0.2, 3.0), st.integers(0, 10),
)  # fmt: skip
def test_pick_draws_from_the_nucleus(values: list[float], top_k: int, top_p: float, t: float, seed: int) -> None:
    """Against the definition, written as a loop: the likeliest tokens until their share reaches top_p."""
    logits = np.array(values, np.float32)
    ranked = sorted(range(len(values)), key=lambda i: -logits[i])[: top_k or None]
    weights = [np.exp((float(logits[i]) - float(logits.max())) / t) for i in ranked]
    allowed, share = set(), 0.0
    for token, weight in zip(ranked, weights, strict=True):
        allowed.add(token)
        share += weight / sum(weights)
        if share >= top_p + 1e-9:
            break
    drawn = run.pick(logits, t, top_k, top_p, np.random.default_rng(seed))
    assert drawn in allowed
    assert run.pick(logits, 0.0, top_k, top_p, np.random.default_rng(seed)) == ranked[0]


def test_pick_follows_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    rng = np.random.default_rng(0)
    counts = np.bincount([run.pick(logits, 1.0, 0, 1.0, rng) for _ in range(20_000)], minlength=3)
    assert np.abs(counts / 20_000 - [0.5, 0.3, 0.2]).max() < 0.015  # four standard errors of 0.0035


def test_pins_are_the_tested_versions() -> None:
    """What the bundle asks for is what the project is tested with."""
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split(";")[0].strip().split("==") for line in reversed(constraints) if "==" in line)
    assert {p.split("==")[0] for p in pins()} == {"onnxruntime", "numpy", "tokenizers", "jinja2"}
    assert all(tested[name] == version for name, version in (p.split("==") for p in pins()))
    assert FILES == ("run.py", "requirements.txt")
