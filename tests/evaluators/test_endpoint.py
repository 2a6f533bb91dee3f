"""A server that speaks the protocol, one that does not, one that is silent, and none: each over a real socket."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner

from compress.cli.main import main
from compress.errors import ConfigError
from evaluators import endpoint

GAP = 0.02


class Server(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(json.dumps({"data": [{"id": "small"}]}).encode() if self.path == "/v1/models" else b"hello")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] == "broken":
            self.send_error(500, "out of memory")
            return
        if asked["model"] == "silent":
            time.sleep(2)
            return
        self.send_response(200)
        self.end_headers()
        time.sleep(3 * GAP)
        if asked["model"] == "pinging":
            for _ in range(60):
                self.wfile.write(b": still here\n\n")
                self.wfile.flush()
                time.sleep(GAP)
            return
        for _ in range(asked["max_tokens"] if asked["model"] != "short" else 1):
            self.wfile.write(b'data: {"choices": [{"text": "the "}]}\n\n')
            self.wfile.flush()
            time.sleep(GAP)
        self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_times_are_those_of_the_stream(url: str) -> None:
    assert endpoint.models(url) == ["small"]
    first, gaps = endpoint.once(url, "small", "a prompt", 6)
    assert first > 3 * GAP and len(gaps) == 5 and min(gaps) > 0.5 * GAP


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("broken", "answered 500"),
        ("silent", "no answer"),
        ("short", "held 1 pieces of text"),
        ("pinging", "no text for 0.5 seconds"),
    ],
)
def test_what_goes_wrong_is_one_sentence(url: str, model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        endpoint.once(url, model, "a prompt", 4, timeout=0.5)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_an_address_may_hold_the_version_as_clients_give_it(url: str, end: str) -> None:
    assert endpoint.models(url + end) == ["small"]
    assert len(endpoint.once(url + end, "small", "a prompt", 2)[1]) == 1


def test_no_server_and_no_address() -> None:
    with pytest.raises(ConfigError, match="is the server running"):
        endpoint.models("http://127.0.0.1:9", timeout=2)
    with pytest.raises(ConfigError, match="is not an http address"):
        endpoint.models("localhost:8000")


def test_command(url: str) -> None:
    args = ["bench", "--endpoint", url, "--new-tokens", "3", "--rounds", "2", "--json"]
    done = CliRunner().invoke(main, args)
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["results"][0]["completed"] == 2
    assert found["results"][0]["median_itl_ms"] > 500 * GAP
