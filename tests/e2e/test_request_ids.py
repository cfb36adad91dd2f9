"""A request's id leads from the client to the gateway's log and the decoder's."""

from __future__ import annotations

import json
import time

import httpx

from tests.e2e.running import ROOT, Running, picture, question


def test_a_request_s_id_is_in_the_answer_and_in_both_logs(service: Running) -> None:
    headers = {"x-request-id": "from-the-client.1"}
    reply = httpx.post(f"{service.url}/v1/generate", json=question(picture(31)), headers=headers, timeout=60)
    body = reply.json()
    assert reply.headers["x-request-id"] == "from-the-client.1" and body["id"] == "gen-from-the-client.1"
    logs = ROOT / ".cache" / "log" / str(service.port)
    deadline_s = time.monotonic() + 10
    while not (told := [line for line in _lines(logs / "triton.log") if "from-the-client.1" in line]):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert len(told) == 1 and body["finish_reason"] in told[0]
    entries = [json.loads(line) for line in _lines(logs / "gateway.log")]
    (entry,) = [entry for entry in entries if entry.get("request_id") == "from-the-client.1"]
    assert (entry["outcome"], entry["status"], entry["pictures"]) == ("finished", 200, 1)
    assert entry["completion_tokens"] == body["usage"]["completion_tokens"]
    assert entry["decode_ms"] == body["timings"]["decode_ms"]


def _lines(log) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()
