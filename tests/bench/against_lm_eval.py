"""Our tasks beside EleutherAI's lm-evaluation-harness: the same requests to the same model, answer by answer.

    python tests/bench/against_lm_eval.py MODEL TASK.jsonl [TASK.jsonl ...] [--limit N]

Needs lm_eval in the environment. Each continuation's log-likelihood and greedy flag from lm_eval's `HFLM.loglikelihood`
is compared with what `evaluators.tasks` computes through `TorchRunner`; accuracies follow from both in the same way.
"""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from compress import tokens
from compress.runtime.streamed import TorchRunner
from evaluators.tasks import load_task, requests, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--limit", type=int, default=300)
    o = parser.parse_args()
    harness = HFLM(pretrained=str(o.model), dtype="float32", device="cpu", batch_size=8)
    tokenizer = tokens.load_tokenizer(o.model)
    runner = TorchRunner.open(o.model)
    print(f"lm_eval {metadata.version('lm_eval')}")
    print(
        "| task | items | acc, ours | acc, lm_eval | acc_norm, ours | acc_norm, lm_eval | differ | largest difference |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for spec in o.tasks:
        task = load_task(spec, o.limit)
        asked = requests(task, tokenizer, front=None, max_length=512)
        ours = score(task, asked, runner.read([r.tokens for r in asked]), 0)
        pairs = [(item.context, c) for item in task.items for c in item.continuations]
        instances = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)
        ]
        theirs = harness.loglikelihood(instances, disable_tqdm=True)
        start, acc, norm, gold = 0, [], [], []
        for item in task.items:
            part = theirs[start : start + len(item.continuations)]
            start += len(part)
            gold.append(part[item.gold][0])
            if task.kind == "last_word":
                acc.append(bool(part[0][1]))
                continue
            lengths = [len(c) - 1 for c in item.continuations]
            acc.append(int(np.argmax([p[0] for p in part])) == item.gold)
            norm.append(int(np.argmax([p[0] / n for p, n in zip(part, lengths, strict=True)])) == item.gold)
        mine = "-" if ours.correct_norm_N is None else f"{ours.correct_norm_N.mean():.4f}"
        print(
            f"| {task.name} | {len(acc)} | {ours.correct_N.mean():.4f} | {np.mean(acc):.4f} | {mine} | "
            f"{f'{np.mean(norm):.4f}' if norm else '-'} | {int((ours.correct_N != np.array(acc)).sum())} | "
            f"{np.abs(ours.gold_N - np.array(gold)).max():.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
