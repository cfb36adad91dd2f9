"""Requests against the running service: what only real Triton can show."""

from __future__ import annotations

import asyncio
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx

from tests.e2e.running import Running, descendants, picture, question


def generate(service: Running, body: dict[str, object]) -> dict[str, object]:
    response = httpx.post(f"{service.url}/v1/generate", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, object] = response.json()
    return answer


def test_a_streamed_answer_has_the_tokens_of_the_whole_one(service: Running) -> None:
    body = question(picture(1), max_tokens=16, ignore_eos=True)
    whole = generate(service, body)
    token_ids: list[int] = []
    with httpx.stream("POST", f"{service.url}/v1/generate", json={**body, "stream": True}, timeout=60) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    for event in events[:-1]:
        token_ids += json.loads(event).get("token_ids") or []
    assert events[-1] == "[DONE]"
    assert token_ids == whole["token_ids"]
    assert len(token_ids) == 16


def test_the_same_picture_again_is_not_encoded_again(service: Running) -> None:
    body = question(picture(2), ignore_eos=True)
    first = generate(service, body)
    executions = service.encoder_executions()
    second = generate(service, body)
    assert service.encoder_executions() == executions
    assert second["token_ids"] == first["token_ids"]
    assert first["usage"]["cached_images"] == 0  # type: ignore[index]
    assert second["usage"]["cached_images"] == 1  # type: ignore[index]


def test_another_prompt_with_a_known_picture_is_not_encoded_again(service: Running) -> None:
    generate(service, question(picture(3)))
    executions = service.encoder_executions()
    generate(service, question(picture(3), prompt="Look: <image> Is it red?"))
    assert service.encoder_executions() == executions


def test_concurrent_pictures_share_encoder_executions(service: Running) -> None:
    bodies = [question(picture(100 + number), ignore_eos=True) for number in range(16)]
    executions, encoded = service.encoder_executions(), service.encoded_pictures()
    with httpx.Client(timeout=60, limits=httpx.Limits(max_connections=16)) as client, ThreadPoolExecutor(16) as threads:
        replies = threads.map(lambda body: client.post(f"{service.url}/v1/generate", json=body), bodies)
        together = [reply.json() for reply in replies]
    assert service.encoded_pictures() - encoded == 16
    assert service.encoder_executions() - executions <= 10
    alone = [generate(service, body) for body in bodies]
    assert [answer["token_ids"] for answer in together] == [answer["token_ids"] for answer in alone]


def test_a_client_that_leaves_frees_its_slot_within_a_second(service: Running) -> None:
    took_s = min(_until_a_leaver_is_gone(service) for _ in range(2))  # the machine may stand still once
    assert took_s < 1.0
    assert service.metric("crossgate_kv_cache_usage_ratio") == 0
    steps = service.metric("crossgate_decoder_steps_total")
    time.sleep(0.3)
    assert service.metric("crossgate_decoder_steps_total") == steps


def _until_a_leaver_is_gone(service: Running) -> float:
    body = question(picture(4), max_tokens=3000, ignore_eos=True, stream=True)
    with httpx.stream("POST", f"{service.url}/v1/generate", json=body, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(10):
            next(lines)
        assert service.metric("crossgate_decoder_num_requests_running") == 1
    left_at_s = time.monotonic()
    while service.metric("crossgate_decoder_num_requests_running"):
        assert time.monotonic() - left_at_s < 10.0
        time.sleep(0.02)
    return time.monotonic() - left_at_s


def test_an_idle_service_uses_next_to_no_processor_time(service: Running) -> None:
    def ticks() -> int:
        total = 0
        for pid in [service.process.pid, *descendants(service.process.pid)]:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total

    time.sleep(1.0)
    before = ticks()
    time.sleep(5.0)
    assert (ticks() - before) / os.sysconf("SC_CLK_TCK") / 5.0 < 0.03


def test_garbage_sent_straight_to_triton_is_refused_and_harms_nobody(service: Running) -> None:
    infer = f"http://127.0.0.1:{service.triton_http_port}/v2/models/vision_encoder/infer"
    wrong_shape = {"name": "pixels", "shape": [1, 3, 2, 2], "datatype": "UINT8", "data": [0] * 12}
    assert httpx.post(infer, json={"inputs": [wrong_shape]}, headers={"connection": "close"}).status_code == 400
    assert generate(service, question(picture(5)))["finish_reason"] in ("stop", "length")


def test_triton_bears_to_be_asked_all_the_time_whether_a_connection_stands(service: Running) -> None:
    """Its own default is to end a connection after two such questions in five minutes."""
    options = [
        ("grpc.keepalive_time_ms", 200),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]

    async def ask() -> grpc.ChannelConnectivity:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.triton_grpc_port}", options=options) as channel:
            await channel.channel_ready()
            await asyncio.sleep(5)
            return channel.get_state()

    assert asyncio.run(ask()) is grpc.ChannelConnectivity.READY
