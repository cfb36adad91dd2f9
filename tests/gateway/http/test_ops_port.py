"""Probes and metrics at a port of their own: there and nowhere else, and in reach when the other port is full."""

from __future__ import annotations

import contextlib
import signal

import httpx
import pytest

from service.gateway.http.ops import OPS_PATHS
from service.launch.settings import LaunchSettings
from tests.gateway.conftest import Connect
from tests.gateway.fakes import FakeBackend
from tests.gateway.http.raw import connection
from tests.gateway.test_main import free_port

pytestmark = pytest.mark.asyncio


async def test_without_a_port_of_their_own_probes_are_beside_the_model(serve: Connect) -> None:
    async with serve() as client:
        for path in OPS_PATHS:
            assert (await client.get(path)).status_code == 200


async def test_with_one_each_route_is_at_its_port_alone(serve: Connect, backend: FakeBackend) -> None:
    port = free_port()
    async with serve(ops_port=port) as client, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as ops:
        for path in OPS_PATHS:
            assert (await ops.get(path)).status_code == 200
            refused = await client.get(path, headers={"host": f"127.0.0.1:{port}"})
            assert refused.status_code == 404 and refused.json()["error"]["code"] == "not_found"
        assert (await client.get("/v1/models")).status_code == 200
        for path in ("/v1/models", "/docs", "/openapi.json"):
            assert (await ops.get(path)).status_code == 404
        assert (await ops.post("/v1/generate", json={"prompt": "Hi"})).status_code == 404
        assert (await client.post("/v1/generate", json={"prompt": "Hi"})).status_code == 200
        client.server.handle_exit(signal.SIGTERM, None)
        assert not backend.num_running


async def test_a_flood_at_the_other_port_does_not_keep_probes_away(serve: Connect, backend: FakeBackend) -> None:
    port = free_port()
    async with serve(ops_port=port, max_connections=4) as client, contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            _, writer = await stack.enter_async_context(connection(client))
            writer.write(b"POST /v1/generate HTTP/1.1\r\ncontent-length: 100\r\n\r\nx")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as ops:
            assert (await ops.get("/readyz")).status_code == 200


async def test_the_launcher_asks_where_the_probes_are() -> None:
    assert LaunchSettings.from_environment({"CROSSGATE_OPS_PORT": "9100"}).ops_port == 9100
    assert LaunchSettings.from_environment({}).ops_port is None
