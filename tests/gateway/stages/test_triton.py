from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2_grpc

from service.contract import SamplingParams, ValidRequest
from service.errors import CrossgateError, ImageNotResident, Internal, InvalidRequest, Overloaded, Unavailable
from service.gateway.stages.triton import TritonBackend
from tests.gateway.fakes import FakeBackend
from tests.gateway.triton_server import FakeTriton

pytestmark = pytest.mark.asyncio
KEYS = ("a" * 64, "b" * 64)
REQUEST = ValidRequest((7, 9, 7, 7), (*KEYS, KEYS[0]), (0, 2, 3), SamplingParams(max_tokens=9, seed=3))
SCRIPT = (11, 12, 13, 14)


@asynccontextmanager
async def triton(*, heartbeat_timeout_s: float = 20.0) -> AsyncIterator[tuple[TritonBackend, FakeTriton]]:
    fake = FakeTriton(FakeBackend(script=SCRIPT))
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = TritonBackend(f"127.0.0.1:{port}", image_size=8, probe_token=5, heartbeat_timeout_s=heartbeat_timeout_s)
    try:
        yield client, fake
    finally:
        await client.close()
        await server.stop(None)


async def everything(client: TritonBackend, request: ValidRequest = REQUEST, latents=None) -> list[int]:
    return [token async for event in client.generate(request, latents or {}) for token in event.token_ids]


async def test_a_request_crosses_the_wire_whole() -> None:
    latents = {KEYS[1]: np.arange(32, dtype=np.float16).reshape(4, 8)}
    async with triton() as (client, fake):
        fake.backend.resident = {KEYS[0]}
        events = [event async for event in client.generate(REQUEST, latents)]
        assert fake.backend.requests == [REQUEST]
        assert fake.backend.sent == [{KEYS[1]}]
        assert fake.metadata[0]["x-image-key"] == KEYS[0]
        await everything(client, ValidRequest((1, 2)))
        assert "x-image-key" not in fake.metadata[1]
    assert events[0].token_ids == SCRIPT[:1] and events[0].finish_reason is None
    assert [token for event in events for token in event.token_ids] == list(SCRIPT)
    assert events[-1].finish_reason == "stop"
    assert events[-1].usage.images == 3 and events[-1].usage.cached_images == 1
    assert events[-1].timings.prefill_ms == 2.0


async def test_latents_come_as_the_encoder_gives_them() -> None:
    async with triton() as (client, _):
        latents = await client.encode(np.full((3, 8, 8), 6, np.uint8))
    assert latents.shape == (4, 8) and latents.dtype == np.float16 and (latents == 6).all()


async def test_the_errors_of_our_stages_arrive_as_themselves() -> None:
    async with triton() as (client, fake):
        with pytest.raises(ImageNotResident) as caught:
            await everything(client)
        assert set(caught.value.keys) == set(KEYS)
        fake.backend.failures = [Overloaded("The queue is full.")]
        with pytest.raises(Overloaded, match="The queue is full"):
            await everything(client)
        fake.backend.encode_failure = InvalidRequest("pixels have a wrong shape.", param="pixels")
        with pytest.raises(InvalidRequest):
            await client.encode(np.zeros((3, 8, 8), np.uint8))


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ("Request for unknown model: 'fused_decoder' is not found", Unavailable),
        ("Stub process 'fused_decoder_0_0' is not healthy.", Unavailable),
        ("ValueError: secret, at line 5", Internal),
    ],
)
async def test_what_triton_itself_says_becomes_a_fixed_text(says: str, kind: type[CrossgateError]) -> None:
    async with triton() as (client, fake):
        fake.says = says
        for call in (everything(client), client.encode(np.zeros((3, 8, 8), np.uint8))):
            with pytest.raises(kind) as caught:
                await call
            assert says not in caught.value.message


async def test_nobody_there_is_unavailable() -> None:
    client = TritonBackend("127.0.0.1:1", image_size=8, probe_token=5, heartbeat_timeout_s=20)
    with pytest.raises(Unavailable):
        await everything(client)
    with pytest.raises(Unavailable):
        await client.encode(np.zeros((3, 8, 8), np.uint8))
    assert not await client.ready()
    await client.close()


async def test_closing_the_events_cancels_the_decoder() -> None:
    async with triton() as (client, fake):
        fake.backend.gate = asyncio.Event()
        fake.backend.resident = set(KEYS)
        async with aclosing(client.generate(REQUEST, {})) as events:
            assert (await anext(events)).token_ids == SCRIPT[:1]
            assert fake.backend.num_running == 1
        async with asyncio.timeout(20):
            while not fake.backend.num_cancelled:
                await asyncio.sleep(0.01)


async def test_a_stream_that_the_server_ends_is_unavailable_and_no_cancellation() -> None:
    async with triton() as (client, fake):
        fake.ends_with = grpc.StatusCode.CANCELLED
        with pytest.raises(Unavailable):
            await everything(client)
        with pytest.raises(Unavailable):
            await client.encode(np.zeros((3, 8, 8), np.uint8))


async def test_a_stream_reset_by_a_balancer_is_unavailable() -> None:
    """What HAProxy sends when the server behind it dies: gRPC makes INTERNAL of it, like of a server's own failure."""

    writers: list[asyncio.StreamWriter] = []

    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.readexactly(len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
        writer.write(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))  # SETTINGS, empty
        with suppress(asyncio.IncompleteReadError):
            while True:
                header = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(header[:3]))
                if header[3] == 1:  # HEADERS: a call
                    writer.write(bytes([0, 0, 4, 3, 0]) + header[5:] + bytes([0, 0, 0, 2]))  # RST_STREAM

    server = await asyncio.start_server(reset, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = TritonBackend(f"127.0.0.1:{port}", image_size=8, probe_token=5, heartbeat_timeout_s=20)
    try:
        with pytest.raises(Unavailable):
            await everything(client)
        with pytest.raises(Unavailable):
            await client.encode(np.zeros((3, 8, 8), np.uint8))
    finally:
        await client.close()
        server.close()
        for writer in writers:
            writer.close()
            await writer.wait_closed()


async def test_errors_in_mid_stream_come_after_the_tokens() -> None:
    async with triton() as (client, fake):
        fake.backend.resident = set(KEYS)
        fake.backend.fail_after = (2, Overloaded("Preempted for too long."))
        got: list[int] = []
        with pytest.raises(Overloaded):
            async for event in client.generate(REQUEST, {}):
                got += event.token_ids
        assert got == list(SCRIPT[:2])


async def test_ready_means_that_both_models_really_answer() -> None:
    async with triton(heartbeat_timeout_s=0.2) as (client, fake):
        fake.silent = True
        assert not await client.ready()
        fake.silent = False
        fake.says = "broken"
        assert not await client.ready()
        fake.says = None
        client._heartbeat_timeout_s = 20.0
        assert await client.ready()
        asked = (fake.num_infer, len(fake.metadata))
        assert await client.ready()
        assert asked == (fake.num_infer, len(fake.metadata)), "a fresh answer needs no heartbeat"


async def test_a_decoder_that_is_full_is_ready() -> None:
    async with triton() as (client, fake):
        fake.backend.failures = [Overloaded("The queue is full.")]
        assert await client.ready()
