"""Hostile heads and connections, and those who probe."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from contextlib import ExitStack, closing, suppress

from tests.reliability.attack import Answers, Target, at_once, head, send

SLOW_S = 8.0


def heads_of_thirty_megabytes(target: Target) -> Answers:
    header = b"x-a: b\r\n"
    start = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"
    return send(target, [start, *[header * 10_000] * 400]) + send(target, [start, b"x-a: ", *[b"a" * (1 << 20)] * 30])


def request_lines_of_a_megabyte(target: Target) -> Answers:
    return send(target, [b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n"]) + send(
        target, [b"A" * (4 << 20)]
    )


def half_open_connections(target: Target) -> Answers:
    start = b"POST /v1/generate HTTP/1.1\r\nHost: x\r\n"
    with ExitStack() as stack:
        for number in range(300):
            connection = stack.enter_context(closing(socket.create_connection(("127.0.0.1", target.port))))
            connection.sendall(start[: number % len(start)])
        time.sleep(3.0)
    return Counter({"left": 300})


def heads_that_come_byte_by_byte(target: Target) -> Answers:
    pieces = [b"GET /v1/models HTTP/1.1\r\n", *[b"x"] * int(SLOW_S / 0.2)]
    return at_once(50, lambda _: send(target, pieces, pause_s=0.2, patience_s=SLOW_S + 2))


def a_thousand_requests_in_one_go(target: Target) -> Answers:
    return send(target, [b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n" * 1000 + b"GET /livez HTTP/1.0\r\n\r\n"])


def who_asks_and_leaves_at_once(target: Target) -> Answers:
    body = json.dumps({"prompt": "Tell me all.", "max_tokens": 1000, "ignore_eos": True, "stream": True}).encode()
    for _ in range(150):
        with suppress(OSError), socket.create_connection(("127.0.0.1", target.port)) as connection:
            connection.sendall(head(target, "/v1/generate", len(body), "application/json") + body)
    return Counter({"left": 150})


def who_asks_and_does_not_read(target: Target) -> Answers:
    body = json.dumps({"prompt": "All.", "max_tokens": 300, "ignore_eos": True, "stream": True}).encode()
    with ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(closing(socket.socket()))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", target.port))
            connection.sendall(head(target, "/v1/generate", len(body), "application/json") + body)
        time.sleep(SLOW_S)
    return Counter({"left": 4})


def five_hundred_probes(target: Target) -> Answers:
    request = b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    return at_once(100, lambda _: sum((send(target, [request]) for _ in range(5)), Counter()))


def many_scrapes(target: Target) -> Answers:
    request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    return at_once(20, lambda _: sum((send(target, [request]) for _ in range(5)), Counter()))
