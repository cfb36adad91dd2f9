"""One deadline for a request, from its arrival, whatever it is waiting for."""

from __future__ import annotations

import asyncio

import pytest

from service.errors import Unavailable
from tests.gateway.conftest import Connect
from tests.gateway.fakes import FakeBackend
from tests.gateway.picture_files import RED

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits_for", ["a place", "the encoder", "a place at the encoder", "a stage", "the decoder"])
async def test_the_deadline_covers(connect: Connect, backend: FakeBackend, waits_for: str, stream: bool) -> None:
    body = {"prompt": "<image>Hi", "images": [RED], "stream": stream}
    async with connect(request_timeout_s=0.4, max_concurrent_requests=1, max_concurrent_encodes=1) as client:
        if waits_for == "a place":
            await client.app.state.admission.enter(None)
        elif waits_for == "the encoder":
            backend.encode_s = 60
        elif waits_for == "a place at the encoder":
            backend.encode_gate = asyncio.Event()
            asyncio.get_running_loop().call_later(0.3, backend.encode_gate.set)
            backend.step_s = 60
        elif waits_for == "a stage":
            backend.failures = [Unavailable("gone")] * 100
        else:
            backend.step_s = 60
        began = asyncio.get_running_loop().time()
        reply = await client.post("/v1/generate", json=body)
        assert asyncio.get_running_loop().time() - began < 10
    assert reply.status_code in (503, 504), reply.text
    assert backend.num_running == 0
