"""Latents that lie in memory which the gateway and Triton share: what travels, and what becomes of the memory."""

from __future__ import annotations

import asyncio
import fcntl
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from service.contract import SamplingParams, ValidRequest
from service.errors import Overloaded
from service.families.parts import Activation
from service.families.pixels import grids_of
from service.families.vision import ProjectorConfig, TiledVitConfig, VisionConfig
from service.gateway.pictures.encode import Latents
from service.gateway.stages import shared_memory
from service.gateway.stages import triton as triton_module
from service.gateway.stages.triton import TritonBackend
from tests.gateway.stages.test_triton import SCRIPT, triton

pytestmark = pytest.mark.asyncio
TILED = VisionConfig(
    TiledVitConfig(
        image_size=8,
        width=8,
        num_positions=4,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        patch_size=4,
        num_layers=1,
        num_global_layers=1,
        num_heads=1,
        ffn_width=16,
        activation=Activation.GELU,
        eps=1e-5,
        intermediate_layers=(),
        grids=grids_of(4),
        max_tiles=4,
    ),
    projector=ProjectorConfig(8, 8),
)
KEYS = ("a" * 64, "b" * 64)
REQUEST = ValidRequest((7, 9, 7), KEYS, (0, 2), SamplingParams(max_tokens=9))
ONE = ValidRequest((7, 9), KEYS[:1], (0,), SamplingParams(max_tokens=9))


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_module, "MIN_SHARED_BYTES", 1)


def connected(**options: Any) -> Any:
    return triton(**{"vision": TILED, "shared_memory_bytes": 1 << 20, **options})


def picture(value: int, rows: int = 2, columns: int = 1) -> np.ndarray:
    return np.full((3, 8 * rows, 8 * columns), value, np.uint8)


async def tokens(client: TritonBackend, request: ValidRequest, latents: dict[str, Latents]) -> list[int]:
    return [token async for event in client.generate(request, latents) for token in event.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            gc.collect()
            await asyncio.sleep(0.01)


def named() -> list[str]:
    """Regions of this folder that still have a name; a living process has its lock there, too."""
    return [path.name for path in Path("/dev/shm").glob("crossgate.*.*")]


async def test_latents_lie_where_triton_put_them_and_the_decoder_finds_them_there() -> None:
    async with connected() as (client, fake):
        latents = await client.encode(picture(6))
        assert latents.values.shape == (1, 4, 8) and (latents.values == 6).all()
        assert len(fake.regions) == 1 and fake.num_shared == 1
        assert await tokens(client, ONE, {KEYS[0]: latents}) == list(SCRIPT)
        assert fake.num_shared == 2 and len(fake.regions) == 1
        np.testing.assert_array_equal(fake.backend.latents[KEYS[0]].values, latents.values)
    assert not named()


async def test_two_pictures_of_a_request_go_together_in_their_order() -> None:
    async with connected() as (client, fake):
        both = {KEYS[1]: await client.encode(picture(3)), KEYS[0]: await client.encode(picture(200))}
        assert await tokens(client, REQUEST, both) == list(SCRIPT)
        assert fake.num_shared == 3
        for key, latents in both.items():
            np.testing.assert_array_equal(fake.backend.latents[key].values, latents.values)
        await until(lambda: len(fake.regions) == 2)  # that for both is let go


async def test_a_region_is_let_go_when_nobody_has_its_latents_any_more() -> None:
    async with connected() as (client, fake):
        latents = await client.encode(picture(6))
        values = latents.values
        assert len(fake.regions) == 1
        del latents
        await until(lambda: not fake.regions)
        assert (values == 6).all()  # the memory is there as long as somebody looks at it


async def test_small_latents_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_module, "MIN_SHARED_BYTES", 1 << 20)
    async with connected() as (client, fake):
        latents = await client.encode(picture(6))
        assert latents.region is None and not fake.regions
        assert await tokens(client, ONE, {KEYS[0]: latents}) == list(SCRIPT)


async def test_nothing_is_shared_unless_it_is_said_to_be() -> None:
    async with triton(vision=TILED) as (client, fake):
        assert (await client.encode(picture(6))).region is None
        assert not fake.regions


@pytest.mark.parametrize("trouble", ["refused", "silent", "no room", "too much"])
async def test_where_no_memory_can_be_shared_latents_travel(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "CALL_TIMEOUT_S", 0.2)
    async with connected(shared_memory_bytes=1 << 70 if trouble == "no room" else 1 << 20) as (client, fake):
        if trouble == "refused":
            fake.shared_memory_says = "Unable to open shared memory region"
        elif trouble == "silent":
            fake.shared_memory_is_silent = True
        else:
            client._itemsize = 1 << 50
        latents = await client.encode(picture(6))
        assert latents.region is None and (latents.values == 6).all()
        fake.shared_memory_says, fake.shared_memory_is_silent = None, False
        assert await tokens(client, ONE, {KEYS[0]: latents}) == list(SCRIPT)
        if trouble != "too much":
            assert not fake.regions and not named()  # it is not tried again at once
        client._shared._off_until_s = 0.0
        await until(lambda: not client._shared._registered)
        assert (await client.encode(picture(6))).region is not None


async def test_a_triton_that_was_started_anew_knows_no_region_and_gets_the_latents_sent() -> None:
    async with connected() as (client, fake):
        latents = await client.encode(picture(6))
        fake.regions.clear()
        assert await tokens(client, ONE, {KEYS[0]: latents}) == list(SCRIPT)
        np.testing.assert_array_equal(fake.backend.latents[KEYS[0]].values, latents.values)
        assert len(fake.backend.requests) == 1
        client._shared._off_until_s = 0.0
        fake.forgets = True
        latents = await client.encode(picture(7))
        assert latents.region is None and (latents.values == 7).all()


async def test_regions_together_take_no_more_than_they_may() -> None:
    async with connected(shared_memory_bytes=3 * 2 * 4 * 8 * 4) as (client, fake):
        client._itemsize = 4  # two tiles of 4 latents of 8 numbers: room for three
        kept = []
        for value in range(5):
            client._itemsize = 4
            kept.append(await client.encode(picture(value)))
        assert [latents.region is not None for latents in kept] == [True, True, True, False, False]
        assert len(fake.regions) == 3
        assert [latents.values[0, 0, 0] for latents in kept] == [0, 1, 2, 3, 4]
        del kept[0]
        await until(lambda: len(fake.regions) == 2)
        client._itemsize = 4
        assert (await client.encode(picture(9))).region is not None


@pytest.mark.parametrize("ending", ["cancelled", "failed", "refused"])
async def test_no_call_that_ends_early_leaves_its_region(ending: str) -> None:
    async with connected() as (client, fake):
        if ending == "refused":
            fake.backend.encode_failure = Overloaded("The queue is full.", retry_after_s=3)
        elif ending == "failed":
            fake.ends_with = grpc.StatusCode.UNAVAILABLE
        else:
            fake.silent = True
        for _ in range(5):
            task = asyncio.create_task(client.encode(picture(9)))
            await asyncio.sleep(0.1)
            task.cancel()
            assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], BaseException)
        del task  # its error holds the frames that it went through
        await until(lambda: not fake.regions and not client._shared._registered)


async def test_what_triton_still_uses_it_is_asked_for_again() -> None:
    async with connected() as (client, fake):
        fake.num_in_use = 3
        latents = await client.encode(picture(6))
        del latents
        await until(lambda: not fake.regions)
        assert fake.num_in_use == 0


async def test_a_backend_that_closes_leaves_nothing_with_triton() -> None:
    async with connected() as (client, fake):
        latents = await client.encode(picture(6))
        await client.close()
        assert not fake.regions
        del latents
        gc.collect()
        await asyncio.sleep(0.05)
        assert not list(Path("/dev/shm").glob(f"{client._shared._owner}*"))


async def test_what_dead_processes_left_with_triton_is_let_go_and_what_living_ones_have_is_not() -> None:
    living, dead, gone = (f"crossgate.{letter * 16}" for letter in "abc")
    (Path("/dev/shm") / dead).touch()
    with (Path("/dev/shm") / living).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        async with connected() as (client, fake):
            left = [f"{dead}.1", f"{dead}.2", f"{gone}.7"]
            kept = [f"{living}.1", "somebody's"]
            fake.regions |= dict.fromkeys([*left, *kept])
            many = await asyncio.gather(*(client.encode(picture(value)) for value in range(4)))
            assert all(latents.region is not None for latents in many)
            await until(lambda: set(fake.regions) == {*kept, *(latents.region.name for latents in many)})
    assert not (Path("/dev/shm") / dead).exists()
    (Path("/dev/shm") / living).unlink()


async def test_a_heartbeat_asks_for_no_latents() -> None:
    async with connected() as (client, fake):
        assert await client.ready()
        assert fake.num_infer == 1 and not fake.regions and fake.num_shared == 0
