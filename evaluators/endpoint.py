"""The same metrics of a server that speaks OpenAI's completions protocol, streamed, one request at a time.

Only the standard library is used. Every wait has a time-out: nothing hangs.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from compress.errors import ConfigError

TIMEOUT_SECONDS = 60.0


def models(url: str, timeout: float = TIMEOUT_SECONDS) -> list[str]:
    """Names of the models that the server offers. ConfigError when it cannot be reached or says something else."""
    found = _get(f"{_base(url)}/models", None, timeout)
    try:
        return [str(m["id"]) for m in json.loads(b"".join(found))["data"]]
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f"{url}: its /v1/models is not a list of models ({e}); is it an OpenAI-compatible server?"
        ) from e


def once(
    url: str, model: str, prompt: str, new_tokens: int, timeout: float = TIMEOUT_SECONDS
) -> tuple[float, list[float]]:
    """Seconds to the first text, and between the others. ConfigError for a refusal, a time-out or an empty answer."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    start = time.perf_counter()
    marks: list[float] = []
    for line in _get(f"{_base(url)}/completions", json.dumps(body).encode(), timeout):
        if time.perf_counter() - (marks[-1] if marks else start) > timeout:  # it may be pinged for ever
            raise ConfigError(f"{url}: no text for {timeout:g} seconds, though the stream goes on; ask a smaller model")
        if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
            continue
        try:
            choice = json.loads(line[5:])["choices"][0]
        except (ValueError, KeyError, IndexError) as e:
            raise ConfigError(f"{url}: a line of its stream is not a completion ({line[:80]!r}, {e})") from e
        if choice.get("text"):
            marks.append(time.perf_counter())
    if len(marks) < 2:
        raise ConfigError(f"{url}: the stream held {len(marks)} pieces of text, and timing needs at least 2")
    return marks[0] - start, [b - a for a, b in zip(marks, marks[1:], strict=False)]


def _base(url: str) -> str:
    """The address that paths follow, given with or without the /v1 that OpenAI's clients want in it."""
    return url.rstrip("/").removesuffix("/v1") + "/v1"


def _get(url: str, body: bytes | None, timeout: float) -> Iterator[bytes]:
    """Lines of an answer, as they come."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--endpoint {url}: is not an http address; pass one such as http://localhost:8000")
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            yield from answer
    except urllib.error.HTTPError as e:
        raise ConfigError(f"{url}: the server answered {e.code} ({_short(e.read())})") from e
    except (OSError, ValueError) as e:
        raise ConfigError(f"{url}: no answer ({_short(e)}); is the server running, and is the address right?") from e


def _short(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return " ".join(text.split())[:160]
