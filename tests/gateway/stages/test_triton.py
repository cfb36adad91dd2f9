from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2_grpc

from service.contract import SamplingParams, ValidRequest
from service.errors import (
    ALL_ERRORS,
    CrossgateError,
    ImageNotResident,
    Internal,
    InvalidRequest,
    OtherCheckpoint,
    Overloaded,
    StageLost,
    StageTimeout,
    Unavailable,
)
from service.families.vision import VisionConfig, VitConfig
from service.gateway.pictures.encode import Latents
from service.gateway.stages.failures import from_grpc
from service.gateway.stages.triton import TritonBackend
from tests.gateway.fakes import FakeBackend
from tests.gateway.triton_server import FakeTriton

pytestmark = pytest.mark.asyncio
KEYS = ("a" * 64, "b" * 64)
REQUEST = ValidRequest((7, 9, 7, 7), (*KEYS, KEYS[0]), (0, 2, 3), SamplingParams(max_tokens=9, seed=3), b"s" * 32)
SCRIPT = (11, 12, 13, 14)
CONFIG = "cd" * 32


VISION = VisionConfig(VitConfig(8, 8, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 4, 1, 1, 16))


def connect(port: int, *, config: str = CONFIG, heartbeat_timeout_s: float = 20.0, **options: Any) -> TritonBackend:
    options = {"vision": VISION, "probe_token": 5, **options}
    return TritonBackend(f"127.0.0.1:{port}", config=config, heartbeat_timeout_s=heartbeat_timeout_s, **options)


@asynccontextmanager
async def triton(**options: Any) -> AsyncIterator[tuple[TritonBackend, FakeTriton]]:
    fake = FakeTriton(FakeBackend(script=SCRIPT), CONFIG)
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = connect(port, **options)
    try:
        yield client, fake
    finally:
        await client.close()
        await server.stop(None)


async def everything(client: TritonBackend, request: ValidRequest = REQUEST, latents=None) -> list[int]:
    return [token async for event in client.generate(request, latents or {}) for token in event.token_ids]


async def test_a_request_crosses_the_wire_whole() -> None:
    latents = {KEYS[1]: Latents(np.arange(32, dtype=np.float16).reshape(1, 4, 8), bytes(32))}
    async with triton() as (client, fake):
        fake.backend.resident = {KEYS[0]}
        events = [event async for event in client.generate(REQUEST, latents)]
        assert fake.backend.requests == [REQUEST]
        assert fake.backend.sent == [{KEYS[1]}]
        assert fake.metadata[0]["x-image-key"] == KEYS[0]
        await everything(client, ValidRequest((1, 2)))
        assert "x-image-key" not in fake.metadata[1]
        assert fake.backend.requests[1].cache_salt == b""
    assert events[0].token_ids == SCRIPT[:1] and events[0].finish_reason is None
    assert [token for event in events for token in event.token_ids] == list(SCRIPT)
    assert events[-1].finish_reason == "stop"
    assert events[-1].usage.images == 3 and events[-1].usage.cached_images == 1
    assert events[-1].timings.prefill_ms == 2.0


async def test_latents_come_as_the_encoder_gives_them() -> None:
    async with triton() as (client, _):
        latents = (await client.encode(np.full((3, 8, 8), 6, np.uint8))).values
    assert latents.shape == (1, 4, 8) and latents.dtype == np.float16 and (latents == 6).all()


async def test_latents_say_whose_they_are_and_those_of_another_checkpoint_are_refused() -> None:
    async with triton() as (client, fake):
        fake.backend.encoder_checkpoint = b"x" * 32
        latents = await client.encode(np.full((3, 8, 8), 6, np.uint8))
        assert latents.checkpoint == b"x" * 32
        with pytest.raises(OtherCheckpoint):
            await everything(client, latents=dict.fromkeys(KEYS, latents))
        fake.backend.decoder_checkpoint = b"x" * 32
        assert await everything(client, latents=dict.fromkeys(KEYS, latents)) == list(SCRIPT)


async def test_a_gateway_of_another_checkpoint_is_refused_and_not_ready() -> None:
    async with triton(config="ef" * 32) as (client, _):
        with pytest.raises(OtherCheckpoint):
            await everything(client, ValidRequest((1, 2)))
        assert not await client.ready()


async def test_the_errors_of_our_stages_arrive_as_themselves() -> None:
    async with triton() as (client, fake):
        with pytest.raises(ImageNotResident) as caught:
            await everything(client)
        assert set(caught.value.keys) == set(KEYS)
        fake.backend.failures = [Overloaded("The queue is full.", retry_after_s=3)]
        with pytest.raises(Overloaded, match="The queue is full") as overloaded:
            await everything(client)
        assert overloaded.value.retry_after_s == 3
        fake.backend.encode_failure = InvalidRequest("pixels have a wrong shape.", param="pixels")
        with pytest.raises(InvalidRequest):
            await client.encode(np.zeros((3, 8, 8), np.uint8))


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ("Request for unknown model: 'fused_decoder' is not found", Unavailable),
        ("Request for unknown model: 'fused_decoder' has no available versions", Unavailable),
        (
            "[request id: 7] Server is stopping, scheduler for model has stopped accepting new inference requests",
            Unavailable,
        ),
        ("[request id: <id_unknown>] Exceeds maximum queue size", Overloaded),
        ("Request timeout expired", Overloaded),
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
            assert not isinstance(caught.value, StageLost), "Triton has answered: no model had the request"
            assert caught.value.retry_after_s or kind is Internal


REFUSED = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:9: Failed to connect to remote host: "
    "Connection refused"
)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        ("UNAVAILABLE", "[request id: <id_unknown>] Exceeds maximum queue size", Overloaded),
        ("RESOURCE_EXHAUSTED", "", Overloaded),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", StageTimeout),
        ("UNAVAILABLE", REFUSED, Unavailable),
        ("UNAVAILABLE", "DNS resolution failed for triton:8001: C-ares status is not ARES_SUCCESS", Unavailable),
        ("UNAVAILABLE", "Received http2 header with status: 503", Unavailable),
        ("INTERNAL", "Stub process 'vision_encoder_0_0' is not healthy.", Unavailable),
        ("NOT_FOUND", "Request for unknown model: 'vision_encoder' has no available versions", Unavailable),
        ("UNAVAILABLE", "Stream removed (Socket closed)", StageLost),
        ("UNAVAILABLE", "Socket closed", StageLost),
        ("UNAVAILABLE", "ping timeout", StageLost),
        ("UNAVAILABLE", "keepalive watchdog timeout", StageLost),
        ("UNAVAILABLE", "Received http2 header with status: 502", StageLost),
        ("INTERNAL", "Received RST_STREAM with error code 2", StageLost),
        ("CANCELLED", "", StageLost),
        ("UNKNOWN", "something else", Internal),
        ("INTERNAL", None, Internal),
        *(
            (
                "INTERNAL",
                error("x", keys=()).to_triton() if error is ImageNotResident else error("x").to_triton(),
                error,
            )
            for error in ALL_ERRORS
        ),
    ],
)
async def test_the_end_of_a_call_tells_overload_from_absence_and_absence_from_death(
    code: str, details: str | None, kind: type[CrossgateError]
) -> None:
    error = from_grpc(grpc.StatusCode[code], details)
    assert type(error) is kind


async def test_nobody_there_is_unavailable() -> None:
    client = connect(1)
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
    client = connect(port)
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
        for model in ("vision_encoder", "fused_decoder"):
            client._heard.clear()
            fake.not_ready = {model}
            assert not await client.ready()
        fake.not_ready = set()
        assert await client.ready()
        asked = (fake.num_infer, len(fake.metadata))
        assert await client.ready()
        assert asked == (fake.num_infer, len(fake.metadata)), "a fresh answer needs no heartbeat"


async def test_a_decoder_that_is_full_is_ready() -> None:
    async with triton() as (client, fake):
        fake.backend.failures = [Overloaded("The queue is full.")]
        assert await client.ready()


async def test_heartbeats_have_a_connection_of_their_own() -> None:
    async with triton() as (client, fake):
        assert await client.ready()
        beats = set(fake.peers)
        fake.peers.clear()
        fake.backend.resident = set(KEYS)
        await everything(client)
        await client.encode(np.zeros((3, 8, 8), np.uint8))
        assert len(beats) == len(set(fake.peers)) == 1
        assert beats != set(fake.peers)


async def test_a_connection_that_falls_silent_is_given_up() -> None:
    """As of a peer that is stopped, or behind a network that drops: nothing comes, and nothing is refused."""
    async with triton() as (direct, fake):
        fake.backend.resident = set(KEYS)
        fake.backend.gate = asyncio.Event()
        async with silencer(int(direct._url.rpartition(":")[2])) as (port, silence):
            client = connect(port)
            try:
                events = client.generate(REQUEST, {})
                await anext(events)
                silence()
                async with asyncio.timeout(40):
                    with pytest.raises(StageLost):
                        await anext(events)
                fake.backend.gate.set()
                async with asyncio.timeout(20):
                    assert await everything(client) == list(SCRIPT)
            finally:
                await client.close()


@asynccontextmanager
async def silencer(target: int) -> AsyncIterator[tuple[int, Callable[[], None]]]:
    """A proxy to a port of this machine. `silence()`: what its connections carry is dropped from now on."""
    passing: list[asyncio.Event] = []
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passes: asyncio.Event) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if passes.is_set():
                    writer.write(data)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passes = asyncio.Event()
        passes.set()
        passing.append(passes)
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", target)
        writers.extend((writer, there_writer))
        for pair in ((reader, there_writer), (there_reader, writer)):
            tasks.add(asyncio.create_task(pump(*pair, passes)))

    proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield proxy.sockets[0].getsockname()[1], lambda: [passes.clear() for passes in passing] and None
    finally:
        proxy.close()
        for task in tasks:
            task.cancel()
        for writer in writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def test_both_models_are_heard_once_both_have_answered() -> None:
    async with triton() as (client, _):
        assert not client.heard()
        await client.encode(np.zeros((3, 8, 8), np.uint8))
        assert not client.heard()
        await everything(client, ValidRequest((7,)))
        assert client.heard()
