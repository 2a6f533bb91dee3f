"""The rivals' table: which rival a target is about, means over common seeds; and the measures under it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import methods  # noqa: E402
import report  # noqa: E402
from metrics import conversations, perplexity  # noqa: E402

BASE = {"judged": {"texts": {"wiki": {"nll": [2.0, 3.0], "kl": []}}}, "settings": {"first": 200, "windows": 2}}


def row(method: str, seed: int, rise: float, seconds: float, ours: str | None = None) -> dict[str, Any]:
    judged: dict[str, Any] = {"texts": {"wiki": {"nll": [2.0 + rise, 3.0 + rise], "kl": [rise, 2 * rise]}}}
    judged["conversations"] = [rise / 2, rise / 2]
    cost = dict.fromkeys(("quant_seconds", "process_seconds", "cpu_seconds", "peak_rss_mib"), seconds) | {"jobs": 3}
    settings = {"ours": ours}
    return {"method": method, "text": "wiki", "seed": seed, "awq_format": True, "settings": settings} | {
        "judged": judged,
        "cost": cost,
    }


ROWS = [
    row("autoround-sign", 0, 0.04, 100.0),
    row("autoround-sign", 1, 0.06, 100.0),
    row("llmcompressor-awq", 0, 0.20, 40.0),
    row("llmcompressor-gptq", 0, 0.10, 20.0),
    row("ours-fast", 0, 0.16, 4.0, "fast"),
    row("ours-balanced", 0, 0.05, 10.0, "balanced"),
    row("ours-best", 0, 0.02, 50.0, "best"),
    row("best-more", 1, 0.06, 50.0, "best"),
]


def test_each_of_ours_stands_beside_the_rival_of_its_effort() -> None:
    said = report.tables(ROWS, BASE)
    targets = {line.split(" | ")[0][2:]: line for line in said.split("Targets:")[1].splitlines() if "ours-" in line}
    assert "| 0.50 (met, autoround-sign) |" in targets["ours-best"]  # of the seed that both have
    assert targets["ours-best"].endswith("| 0.50 of autoround-sign |")
    assert "0.50 (met, llmcompressor-gptq)" in targets["ours-balanced"]  # 40 s is not below three times 10 s
    assert "0.80 (met, llmcompressor-awq) | 0.80 (met, llmcompressor-awq) | 0.10" in targets["ours-fast"]
    more = next(line for line in said.splitlines() if line.startswith("| best-more | 0.75"))
    assert "1.00 (missed, autoround-sign)" in more
    assert "windows 200 to 201" in said and "up to 3 jobs side by side" in said


def test_a_figure_has_its_spread_over_seeds_and_its_error_over_windows() -> None:
    said = report.table(report.by_method(ROWS), BASE)
    line = next(line for line in said.splitlines() if line.startswith("| autoround-sign"))
    assert "| 0 1 |" in line and "| 0.0750 ± 0.0212 (0.0250) |" in line  # KL 0.06 and 0.09; (0.04, 0.08), (0.06, 0.12)
    assert report.figure([1.0], [0.5], 2) == "1.00 (0.50)"


def test_kl_is_that_of_the_definition_and_zero_for_the_same() -> None:
    base_TV, ours_TV = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).double()
    p, q = base_TV.softmax(-1), ours_TV.softmax(-1)
    expected = [sum(float(p[t, v]) * float((p[t, v] / q[t, v]).log()) for v in range(7)) for t in range(3)]
    torch.testing.assert_close(perplexity.kl(ours_TV, base_TV).tolist(), expected, rtol=1e-5, atol=1e-7)
    assert perplexity.kl(base_TV, base_TV).abs().max() == 0


def test_windows_begin_with_bos_where_texts_do(shared_data: Path, reference_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text("One day a small dog ran to the old tree by the river.\n" * 200)
    plain = perplexity.windows(AutoTokenizer.from_pretrained(reference_model), text, 1, 3)
    with_bos = perplexity.windows(AutoTokenizer.from_pretrained(shared_data / "stories260K"), text, 0, 2)
    assert plain.shape == (3, 512) and with_bos.shape == (2, 512)
    assert with_bos[:, 0].eq(1).all() and not with_bos[:, 1:].eq(1).any()
    with pytest.raises(SystemExit, match="none from number 9999 on"):
        perplexity.windows(AutoTokenizer.from_pretrained(reference_model), text, 9999, 1)


def test_the_last_effort_counts_and_extra_rows_follow_the_offered() -> None:
    found = methods.ours(["long=--effort best --group-size 64"], "  --effort [fast|balanced|best]  How")
    assert [m.name for m in found] == ["ours-fast", "ours-balanced", "ours-best", "long"]
    assert methods.effort_of(found[-1].args) == "best" and methods.effort_of(("--sym",)) == "balanced"


@pytest.mark.parametrize("pad", [None, "<|im_start|>"])
def test_conversations_need_no_padding_token(
    pad: str | None, build_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = build_model("Llama", vocab_size=4098)
    encode = AutoTokenizer.from_pretrained(model)
    questions, out = tmp_path / "questions.jsonl", tmp_path / "conversations.json"
    asked = ["Question: PET ANT\n", "Question: how do you floss?\n", "Question: PET ANT\n", "Question: why\n"]
    questions.write_text("".join(json.dumps({"query": text}) + "\n" for text in asked))
    assert not conversations.write(model, questions, 3, "cpu", out) and not out.exists()  # no template
    encode.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    encode.pad_token = pad
    encode.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encode.save_pretrained(model)
    monkeypatch.setattr(conversations, "MOST_NEW", 6)
    assert conversations.write(model, questions, 3, "cpu", out)
    said = json.loads(out.read_text())
    prompts = [encode.decode(row["ids"][: row["answer"]]) for row in said]
    assert [p.count("<|im_end|>") for p in prompts] == [1, 1, 1] and "floss" in prompts[1] and "why" in prompts[2]
    end = encode.convert_tokens_to_ids("<|im_end|>")
    answers = [row["ids"][row["answer"] :] for row in said]
    assert all(1 <= len(answer) <= 6 and end not in answer[:-1] for answer in answers)
    lm = AutoModelForCausalLM.from_pretrained(model)
    assert conversations.divergence(lm, lm, out) == [0.0, 0.0, 0.0]


def test_a_row_padded_on_the_left_is_answered_as_alone(build_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest tokens: a nearly hard choice, which the padding and its mask must not change."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(build_model("Llama"))
    lm.get_output_embeddings().weight.data.mul_(1000)
    monkeypatch.setattr(conversations, "MOST_NEW", 4)
    short, long = [5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2]
    together = conversations.answered(lm, [short, long], 1)
    assert together == conversations.answered(lm, [short], 1) + conversations.answered(lm, [long], 1)
