from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from tokenizers import Tokenizer

from service.families import Family
from service.gateway.app import create_app
from service.gateway.http.server import listen, make_server
from service.gateway.settings import Settings
from tests.gateway.checkpoints import byte_level_tokenizer, make_family
from tests.gateway.fakes import FakeBackend

REPLY = "There are three cats and a naïve 🙂 bird."
MakeApp = Callable[..., FastAPI]
Connect = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture
def family(tmp_path: Path, tokenizer: Tokenizer) -> Family:
    return make_family(tmp_path, tokenizer)


@pytest.fixture
def backend(tokenizer: Tokenizer) -> FakeBackend:
    ending = tokenizer.token_to_id("<|im_end|>")
    return FakeBackend(script=(*tokenizer.encode(REPLY).ids, ending))


@pytest.fixture
def make_app(family: Family, tokenizer: Tokenizer, backend: FakeBackend) -> MakeApp:
    def make(**changes: Any) -> FastAPI:
        settings = Settings(**{"model_path": family.folder, "model_name": "tiny", "picture_workers": 1, **changes})
        return create_app(settings, family, tokenizer, backend)

    return make


@pytest.fixture
def connect(make_app: MakeApp) -> Connect:
    """A client of an app in this process, without a network: `async with connect(max_images=2) as client`."""

    @asynccontextmanager
    async def connected(**changes: Any) -> AsyncIterator[httpx.AsyncClient]:
        app = make_app(**changes)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://gateway") as client,
        ):
            client.app = app  # type: ignore[attr-defined]
            yield client

    return connected


@pytest.fixture
def serve(make_app: MakeApp) -> Connect:
    """A client of a real server on a free port, where streaming and disconnects are real."""

    @asynccontextmanager
    async def served(*, drain_timeout_s: float = 10.0, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
        app = make_app(**changes)
        timeout_s = changes.get("client_timeout_s", 60.0)
        listener = listen("127.0.0.1", 0, timeout_s)
        others = [listen("127.0.0.1", changes["ops_port"], timeout_s)] if "ops_port" in changes else []
        settings = Settings(model_path=Path(), **{"drain_timeout_s": drain_timeout_s, **changes})
        server = make_server(app, settings)
        task = asyncio.create_task(server.serve(sockets=[listener, *others]))
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            client.app, client.server = app, server  # type: ignore[attr-defined]
            try:
                yield client
            finally:
                server.should_exit = True
                server.config.timeout_graceful_shutdown = 1
                await task

    return served
