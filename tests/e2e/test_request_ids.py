"""A request's id leads from the client to the gateway's log and the decoder's."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx

from tests.e2e.running import ROOT, Running, picture, question


def test_a_request_s_id_is_in_the_answer_and_in_both_logs(service: Running) -> None:
    headers = {"x-request-id": "from-the-client.1"}
    reply = httpx.post(f"{service.url}/v1/generate", json=question(picture(31)), headers=headers, timeout=60)
    body = reply.json()
    assert reply.headers["x-request-id"] == "from-the-client.1" and body["id"] == "gen-from-the-client.1"
    logs = ROOT / ".cache" / "log" / str(service.port)
    (told,) = _lines_about("from-the-client.1", logs / "triton.log")
    assert body["finish_reason"] in told
    (line,) = _lines_about('"request_id": "from-the-client.1"', logs / "gateway.log")
    entry = json.loads(line)
    assert (entry["outcome"], entry["status"], entry["pictures"]) == ("finished", 200, 1)
    assert entry["completion_tokens"] == body["usage"]["completion_tokens"]
    assert entry["decode_ms"] == body["timings"]["decode_ms"]


def _lines_about(what: str, log: Path) -> list[str]:
    """Waits for the first: a log may lag behind the answer."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        if found := [line for line in lines if what in line]:
            return found
        time.sleep(0.05)
    return []
