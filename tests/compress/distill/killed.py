"""Runs `distill` again and again in processes of its own, some of which kill themselves with SIGKILL at given steps.

    python killed.py JSON

JSON: `{"processes": 1 or 2, "kills": [[step, ...], ...], "outs": [...], "request": {...}}` and, if wanted, of each out
"more" of its request, and "room" for `memory.ROOM` (0: all is shared out). For each out, one run that is killed at each
of its steps in turn, then one that ends. Everything is imported once, what runs import when they come to it included;
each run is a fork.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.fsdp
import transformers

from compress.distill import memory
from compress.distill.data import Mix
from compress.distill.request import DistillRequest
from compress.distill.run import distill
from compress.workspace import resolve

GRACE = 5.0


def request_of(asked: dict[str, Any], out: Path) -> DistillRequest:
    options = dict(asked)
    return DistillRequest(
        teacher=resolve(options.pop("teacher")),
        student=resolve(options.pop("student")),
        data=Mix.of(options.pop("data"), options.pop("mix", None)),
        out=out,
        **options,
    )


def run(asked: dict[str, Any], out: str, kill: int | None) -> None:
    number = asked["outs"].index(out)
    more = asked["more"][number] if "more" in asked else {}
    request = request_of({**asked["request"], **more}, Path(out))
    if "room" in asked:
        memory.ROOM = asked["room"][number]

    def heard(record: dict[str, float], ready: object) -> None:
        if record["step"] == kill and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    distill(request, heard=heard)


def free_port() -> int:
    """A port that nobody listens on: other tests meet at ports of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(asked: dict[str, Any], out: str, kill: int | None) -> list[int]:
    """Exit codes of the processes, negative for signals."""
    port = free_port()
    children = []
    for rank in range(asked["processes"]):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if asked["processes"] > 1:
                    more = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": asked["processes"], "MASTER_PORT": port}
                    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in more.items()}})
                run(asked, out, kill)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return ended(children)


def ended(children: list[int]) -> list[int]:
    """Their exit codes. Once one has failed the others have `GRACE` seconds: NCCL does not notice that one is gone."""
    codes: dict[int, int] = {}
    until = None
    while len(codes) < len(children):
        for child in (c for c in children if c not in codes):
            if until is not None and time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        if until is None and any(codes.values()):
            until = time.monotonic() + GRACE
        time.sleep(0.02)
    return [codes[child] for child in children]


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    assert all(
        (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.AutoTokenizer)
    )  # imports
    codes = []
    for out, kills in zip(asked["outs"], asked["kills"], strict=True):
        found = []
        for kill in [*kills, None]:
            found.append(launch(asked, out, kill))
        codes.append(found)
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
