"""A small HTTP server that answers as Crossgate's two routes do, on time, and wrongly when asked to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "images": 1, "cached_images": 1, "total_tokens": 10}
TIMINGS = {"queue_ms": 1.0, "encode_ms": 0.0, "prefill_ms": 20.0, "decode_ms": 30.0}


@dataclass
class Behaviour:
    """`fault`: "" | "error_chunk" | "no_done" | "overloaded" | "cut"."""

    first_token_s: float = 0.03
    between_tokens_s: float = 0.01
    fault: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)  # of the clients, one a request
    num_broken: int = 0  # clients that hung up in mid-answer


@contextmanager
def fake_server(behaviour: Behaviour) -> Iterator[str]:
    """The server's base URL."""

    class Handler(_Handler):
        told = behaviour

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that come at once; with the default of 5 some are refused


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    told: Behaviour

    def handle(self) -> None:
        with suppress(OSError):  # the client hung up between two answers
            super().handle()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.told.bodies.append(body)
        self.told.ports.append(self.client_address[1])
        chat = self.path == "/v1/chat/completions"
        if self.told.fault == "overloaded":
            self._json(429, {"error": {"code": "overloaded", "message": "Try later."}})
        elif body["stream"]:
            try:
                self._stream(body, chat)
            except OSError:
                self.told.num_broken += 1
                self.close_connection = True
        else:
            time.sleep(self.told.first_token_s)
            whole = {"choices": [{"message": {"content": "a red circle"}, "finish_reason": "stop"}]}
            self._json(200, {**(whole if chat else {"text": "a red circle"}), "usage": USAGE, "timings": TIMINGS})

    def log_message(self, *_: Any) -> None:
        pass

    def _json(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, body: dict[str, Any], chat: bool) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        if chat:
            self._chunk({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        num_tokens = body["max_tokens"] if body["ignore_eos"] else 3
        for index in range(num_tokens):
            time.sleep(self.told.between_tokens_s if index else self.told.first_token_s)
            if index == 1 and self.told.fault == "cut":
                self.close_connection = True
                return
            if index == 1 and self.told.fault == "error_chunk":
                self._send("event: error\ndata: " + json.dumps({"error": {"code": "unavailable"}}) + "\n\n")
                self._send("")
                return
            text = "word "
            self._chunk({"choices": [{"delta": {"content": text}}]} if chat else {"text": text, "finish_reason": None})
        end = {"choices": [{"delta": {}, "finish_reason": "stop"}]} if chat else {"text": "", "finish_reason": "stop"}
        self._chunk({**end, "timings": TIMINGS, **({} if chat else {"usage": USAGE})})
        if chat:
            self._chunk({"choices": [], "usage": USAGE})
        if self.told.fault != "no_done":
            self._send("data: [DONE]\n\n")
        self._send("")

    def _chunk(self, data: dict[str, Any]) -> None:
        self._send("data: " + json.dumps(data) + "\n\n")

    def _send(self, text: str) -> None:
        content = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()
