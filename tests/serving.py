"""A chat endpoint on this machine, in a thread: it says what a test wants, and keeps what it was asked."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Served:
    """answer: a request's body -> what the model says, or a whole (status, headers, content)."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}/v1"
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[dict[str, Any]], Any] = lambda body: str(len(asked(body)) % 10 / 10)


def asked(body: dict[str, Any]) -> str:
    """The user's message."""
    return str(body["messages"][-1]["content"])


def completion(text: Any, finish: str = "stop", usage: bool = True) -> dict[str, Any]:
    """A chat completion as vLLM gives it."""
    told: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
    return {**told, "usage": {"total_tokens": 10}} if usage else told


@contextmanager
def served() -> Iterator[Served]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            place.bodies.append(body)
            place.headers.append(dict(self.headers))
            said = place.answer(body) if self.path == "/v1/chat/completions" else (404, {}, b"{}")
            status, headers, content = said if isinstance(said, tuple) else (200, {}, said)
            if isinstance(content, str):
                content = completion(content)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError):  # who asked has gone
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    place = Served(server.server_address[1])
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield place
    finally:
        server.shutdown()
        server.server_close()
