"""The peers that serve: same body, right tokens, and workers that say what failed."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from loadtest.bench.client import body
from loadtest.bench.judge import Judge
from loadtest.bench.peers.fastapi_lock import make_app
from loadtest.bench.scenario import Scenario
from loadtest.bench.systems import Server
from loadtest.bench.worker import Worker
from service.families import load_family

SCENARIO = Scenario("peers", 3, 2, num_tokens=(4, 9))


async def test_fastapi_answers_the_body_that_the_service_takes(checkpoint: Path) -> None:
    request, *_ = SCENARIO.requests(load_family(checkpoint).image_token_id, 0)
    transport = httpx.ASGITransport(make_app(checkpoint, "float32"))
    async with httpx.AsyncClient(transport=transport, base_url="http://peer") as client:
        assert (await client.get("/health")).status_code == 200
        answer = (await client.post("/v1/generate", json=body(request, stream=False))).json()
    assert Judge(checkpoint).judge(request, tuple(answer["token_ids"])).first_wrong is None


def test_litserve_answers_a_batch_over_http(checkpoint: Path) -> None:
    pytest.importorskip("litserve", reason="in the extra `bench`")
    requests = SCENARIO.requests(load_family(checkpoint).image_token_id, 0)
    users = Worker("loadtest.bench.client")
    server = Server("litserve", checkpoint, "float32", users, knows_users=True)
    try:
        measured = server.run(requests)
    finally:
        server.stop()
        users.stop()
    judge = Judge(checkpoint)
    for request, tokens in zip(requests, measured.tokens, strict=True):
        assert judge.judge(request, tuple(tokens)).first_wrong is None
    assert measured.client_cpu_s is not None and measured.client_cpu_s < measured.seconds


def test_a_worker_that_fails_says_how_and_goes_on() -> None:
    worker = Worker("loadtest.bench.client")
    try:
        with pytest.raises(RuntimeError, match="KeyError: 'requests'"):
            worker.ask(url="http://127.0.0.1:9")
        assert worker.ask(url="http://127.0.0.1:9", requests=[])["tokens"] == []
    finally:
        worker.stop()


def test_a_worker_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with status 1"):
        Worker("loadtest.bench.judge", str(tmp_path))
