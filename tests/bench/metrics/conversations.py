"""KL divergence from the original on conversations: PIQA's questions in the model's chat template, its own answers.

The original answers once, at temperature 1 with nothing cut off, and every quantizer is judged on the same file. No
quantizer is calibrated on PIQA. Only the tokens of answers count: what stands before them is the template's and PIQA's.
"""

# Shapes: B conversations answered together, T tokens, V vocabulary

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_NEW = 160  # tokens of an answer
TOGETHER = 50


def write(model: Path, questions: Path, count: int, device: str, out: Path) -> bool:
    """Let the model answer the first `count` different questions; False, and no file, where it has no chat template
    whose turns end with a token of their own (`compress.turns`).

    out: .json, a list of {"ids": [...], "answer": where the answer begins}.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compress.turns import turns_of

    encode = AutoTokenizer.from_pretrained(model)
    turns = turns_of(encode)
    if turns is None:
        return False
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(device)
    rows = [json.loads(line)["query"] for line in questions.read_text(encoding="utf-8").splitlines()]
    asked = list(dict.fromkeys(row.removeprefix("Question:").strip() for row in rows))[:count]
    prompts = [
        encode.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in asked
    ]
    ids = [encode(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    torch.manual_seed(0)
    said: list[dict[str, Any]] = []
    for start in range(0, len(ids), TOGETHER):
        said += answered(lm, ids[start : start + TOGETHER], turns.end)
    temporary = out.with_name(out.name + ".part")
    temporary.write_text(json.dumps(said) + "\n")
    temporary.replace(out)
    return True


def answered(lm: Any, prompts: list[list[int]], end: int) -> list[dict[str, Any]]:
    """The conversations of these prompts, each up to the token `end` of its answer, or with `MOST_NEW` of it.

    Rows are padded on the left here, with `end` and a mask: many tokenizers have no padding token.
    """
    import torch

    width = max(len(ids) for ids in prompts)
    ids_BT = torch.tensor([[end] * (width - len(ids)) + ids for ids in prompts], device=lm.device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=lm.device)
    made_BT = lm.generate(
        input_ids=ids_BT, attention_mask=mask_BT, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=MOST_NEW, pad_token_id=end, eos_token_id=end,
    )  # fmt: skip
    out = []
    for ids, row in zip(prompts, made_BT[:, width:].tolist(), strict=True):
        answer = row[: row.index(end) + 1] if end in row else row
        out.append({"ids": ids + answer, "answer": len(ids)})
    return out


def divergence(lm: Any, original: Any, file: Path) -> list[float]:
    """Of each conversation the mean KL of the answer's tokens, nats."""
    import torch
    from metrics.perplexity import kl

    out = []
    with torch.inference_mode():
        for row in json.loads(file.read_text()):
            ids_1T = torch.tensor([row["ids"]], device=lm.device)
            seen = slice(row["answer"] - 1, -1)  # the positions that predict the answer
            ours_TV, base_TV = (m(ids_1T, use_cache=False).logits[0, seen] for m in (lm, original))
            out.append(float(kl(ours_TV, base_TV).mean()))
    return out
