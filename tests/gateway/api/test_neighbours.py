"""A key that asks much does not keep another waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from service.contract import TokenEvent, ValidRequest
from service.families import Family
from service.gateway.app import create_app
from service.gateway.settings import Settings
from tests.gateway.fakes import FakeBackend

MAX_RUNNING = 8  # of the decoder: no more than the places that keys share
STEP_S = 0.2


class BatchBackend(FakeBackend):
    """A decoder with a batch of so many: who comes later waits behind who came first, whoever that is."""

    def __init__(self, script: tuple[int, ...]) -> None:
        super().__init__(script=script, step_s=STEP_S)
        self.batch = asyncio.Semaphore(MAX_RUNNING)
        self.num_at_once = 0

    async def generate(self, request: ValidRequest, latents: Mapping[str, Any]) -> AsyncGenerator[TokenEvent, None]:
        async with self.batch:
            self.num_at_once = max(self.num_at_once, MAX_RUNNING - self.batch._value)
            async for event in super().generate(request, latents):
                yield event


@pytest.mark.parametrize("num_hogs", [1, 3])
async def test_one_key_s_500_requests_do_not_delay_another_key_s_first_token(
    family: Family, tokenizer: Tokenizer, num_hogs: int
) -> None:
    """With the default settings."""
    backend = BatchBackend((5,) * 150)
    hogs = [f"hog{number}" for number in range(num_hogs)]
    keys = ",".join(f"{name}:key-of-{name}" for name in (*hogs, "guest"))
    app = create_app(Settings(model_path=family.folder, api_keys=keys), family, tokenizer, backend)

    async def ask(name: str, max_tokens: int) -> int:
        body = {"prompt": "Hi", "max_tokens": max_tokens, "stream": True}
        headers = {"authorization": f"Bearer key-of-{name}"}
        return (await client.post("/v1/generate", json=body, headers=headers)).status_code

    async def first_token() -> float:
        start = time.perf_counter()
        assert await ask("guest", 1) == 200
        return time.perf_counter() - start

    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://it") as client:
        alone_s = sorted([await first_token() for _ in range(3)])[1]
        asked = [asyncio.create_task(ask(hogs[number % num_hogs], 150)) for number in range(500)]
        admission = app.state.admission
        while admission.num_running + admission.num_waiting + sum(task.done() for task in asked) < len(asked):
            await asyncio.sleep(0.01)  # until each has been let in, waits, or was refused
        assert admission.num_waiting > 64 and admission.num_running >= 6  # three quarters of the places
        beside_s = [await first_token() for _ in range(3)]
        assert all(not task.done() or task.result() == 429 for task in asked)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    assert sorted(beside_s)[1] < 3 * alone_s, (alone_s, beside_s)
    assert backend.num_at_once <= MAX_RUNNING and admission.num_running == 0
