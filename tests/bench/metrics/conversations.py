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
    """Let the model answer the first `count` different questions; False, and no file, where it has no chat template.

    out: .json, a list of {"ids": [...], "answer": where the answer begins}.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    encode = AutoTokenizer.from_pretrained(model, padding_side="left")
    if not encode.chat_template:
        return False
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(device)
    rows = [json.loads(line)["query"] for line in questions.read_text(encoding="utf-8").splitlines()]
    asked = list(dict.fromkeys(row.removeprefix("Question:").strip() for row in rows))[:count]
    prompts = [
        encode.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in asked
    ]
    torch.manual_seed(0)
    said: list[dict[str, Any]] = []
    for start in range(0, len(prompts), TOGETHER):
        said += answered(lm, encode, prompts[start : start + TOGETHER])
    temporary = out.with_name(out.name + ".part")
    temporary.write_text(json.dumps(said) + "\n")
    temporary.replace(out)
    return True


def answered(lm: Any, encode: Any, prompts: list[str]) -> list[dict[str, Any]]:
    """The conversations of these prompts, each ending with the token that ends a turn or after `MOST_NEW`."""
    padded = encode(prompts, add_special_tokens=False, return_tensors="pt", padding=True).to(lm.device)
    pad = encode.pad_token_id
    made_BT = lm.generate(
        **padded, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MOST_NEW, pad_token_id=pad
    )
    out = []
    width = padded["input_ids"].shape[1]
    for ids_T, mask_T in zip(made_BT.tolist(), padded["attention_mask"].tolist(), strict=True):
        before = [token for token, kept in zip(ids_T[:width], mask_T, strict=True) if kept]
        answer = ids_T[width:]
        if encode.eos_token_id in answer:
            answer = answer[: answer.index(encode.eos_token_id) + 1]
        out.append({"ids": before + answer, "answer": len(before)})
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
