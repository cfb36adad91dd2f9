"""The little HTTP that the launcher speaks: probes, and one streamed question."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any


def answers(host: str, port: int, path: str, timeout_s: float = 10.0) -> bool:
    """Whether a GET gives 200. Closes its connection: an idle one would hold up Triton's exit."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def answers_within(host: str, port: int, path: str, timeout_s: float) -> bool:
    """Whether a GET gives 200 before the time is over; a gateway that was asked early still waits to reconnect."""
    deadline_s = time.monotonic() + timeout_s
    while not answers(host, port, path, timeout_s):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.2)
    return True


def stream_events(host: str, port: int, path: str, body: dict[str, Any], timeout_s: float) -> Iterator[dict[str, Any]]:
    """POST `body` as JSON; the JSON of each server-sent event, until `[DONE]`.

    Raises OSError or HTTPException where no answer comes; an error answer is its one JSON object.
    """
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            yield json.loads(response.read())
            return
        for line in response:
            data = line.decode().removeprefix("data:").strip()
            if data == "[DONE]":
                return
            if line.startswith(b"data:"):
                yield json.loads(data)
    finally:
        connection.close()
