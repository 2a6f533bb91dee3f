"""`compress generate`: text from an artifact, an export or a model."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click

from compress.cli.help import Command


@click.command("generate", cls=Command)
@click.argument("model")
@click.argument("prompt")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens to make at most."
)
@click.option("--chat/--no-chat", default=None, help="Use the chat template [default: where the tokenizer has one].")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw from so many likeliest tokens; 0: all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the fewest that reach this share.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option(
    "--runtime",
    type=click.Choice(["auto", "gpu", "torch", "onnx", "tensorrt"]),
    default="auto",
    show_default=True,
    help="gpu: our decode kernels; torch: transformers' forward; onnx: ONNX Runtime; tensorrt: an engine.",
)
@click.option(
    "--graphs/--no-graphs", default=True, show_default=True, help="CUDA Graphs, with --runtime gpu or tensorrt."
)
@click.option("--json", "as_json", is_flag=True, help="Print text and figures as one JSON object.")
def command(
    model: str,
    prompt: str,
    max_new_tokens: int,
    chat: bool | None,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    runtime: Any,
    graphs: bool,
    as_json: bool,
) -> None:
    """Continue PROMPT (`-` reads standard input) with MODEL: a folder or hub id, quantized, exported or neither.

    \b
      compress generate artifacts/reference-lm-awq-w4g128 "Once upon a time"

    Text goes to standard output as it is made, figures to standard error.
    """
    from compress.runtime.generate import Sampling, generate
    from compress.runtime.open import open_decoder
    from compress.tell import Heard
    from compress.tokens import load_tokenizer
    from compress.workspace import is_judgeable, resolve

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    folder = resolve(model, accept=is_judgeable).path
    tokenizer = load_tokenizer(folder)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = _prompt_ids(tokenizer, text, chat)
    heard = Heard()
    capacity = len(ids) + max_new_tokens
    decoder = open_decoder(folder, capacity=capacity, runtime=runtime, graphs=graphs, tell=heard)
    for note in heard.notes:
        print(f"note: {note}", file=sys.stderr)
    made: list[int] = []
    shown = ""
    started = time.monotonic()
    first = None
    for token in generate(decoder, ids, limit=max_new_tokens, eos=_ends(tokenizer, folder), sampling=sampling):
        first = first or time.monotonic() - started
        made.append(token)
        whole = tokenizer.decode(made, skip_special_tokens=True)
        if not as_json and not whole.endswith("\ufffd"):  # half a character waits for its other half
            sys.stdout.write(whole[len(shown) :])
            sys.stdout.flush()
            shown = whole
    seconds = time.monotonic() - started
    figures = _figures(decoder, ids, made, first, seconds)
    if as_json:
        text = str(tokenizer.decode(made, skip_special_tokens=True))
        print(json.dumps({"text": text, "ids": made, **figures}, indent=2, ensure_ascii=False))
    else:
        print()
        print(_line(figures), file=sys.stderr)


def _prompt_ids(tokenizer: Any, text: str, chat: bool | None) -> list[int]:
    from compress.errors import ConfigError

    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ConfigError("--chat: the model's tokenizer has no chat template; leave it out, or pass --no-chat")
    if chat is None:
        chat = has_template
    if not chat:
        return list(tokenizer(text).input_ids)
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False).input_ids)


def _ends(tokenizer: Any, folder: Any) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, and those of generation_config.json."""
    from compress.files import read_json

    ends = {tokenizer.eos_token_id}
    path = folder / "generation_config.json"
    stated = read_json(path).get("eos_token_id") if path.is_file() else None
    ends.update(stated if isinstance(stated, list) else [stated])
    return frozenset(int(e) for e in ends if e is not None)


def _figures(decoder: Any, ids: list[int], made: list[int], first: float | None, seconds: float) -> dict[str, Any]:
    graph = getattr(decoder, "graph", None)
    after = len(made) - 1
    return {
        "runtime": decoder.runtime,
        "prompt_tokens": len(ids),
        "new_tokens": len(made),
        "first_token_seconds": first and round(first, 4),
        "tokens_per_second": round(after / (seconds - first), 2) if first and after > 0 and seconds > first else None,
        "graph_replays": graph.replays if graph is not None else 0,
    }


def _line(figures: dict[str, Any]) -> str:
    rate, first = figures["tokens_per_second"], figures["first_token_seconds"]
    parts = [figures["runtime"], f"{figures['prompt_tokens']} + {figures['new_tokens']} tokens"]
    parts += [f"first token after {1000 * first:.0f} ms"] if first else []
    parts += [f"then {rate:.1f} tokens/s"] if rate else []
    parts += [f"{figures['graph_replays']} CUDA graph replays"] if figures["graph_replays"] else []
    return ", ".join(parts)
