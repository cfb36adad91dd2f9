"""With isolated keys nobody learns from `cached` counts, or from the time, what another key has sent."""

from __future__ import annotations

import httpx
import pytest

from tests.gateway.conftest import Connect
from tests.gateway.fakes import FakeBackend
from tests.gateway.picture_files import GREEN, RED

KEYS = "alice:sk-a,bob:sk-b"


async def ask(client: httpx.AsyncClient, key: str, *pictures: str) -> int:
    """How many pictures were cached."""
    body = {"prompt": "<image>" * len(pictures) + "Hi", "images": list(pictures), "max_tokens": 2}
    response = await client.post("/v1/generate", json=body, headers={"authorization": f"Bearer {key}"})
    assert response.status_code == 200, response.text
    cached: int = response.json()["usage"]["cached_images"]
    return cached


async def test_a_picture_is_shared_between_keys_unless_they_are_isolated(
    connect: Connect, backend: FakeBackend
) -> None:
    async with connect(api_keys=KEYS) as client:
        assert [await ask(client, key, RED) for key in ("sk-a", "sk-b", "sk-a", "sk-b")] == [0, 1, 1, 1]
    assert backend.num_encoded == 1
    assert {request.cache_salt for request in backend.requests} == {b""}


async def test_an_isolated_key_finds_its_own_pictures_alone(connect: Connect, backend: FakeBackend) -> None:
    async with connect(api_keys=KEYS, isolate_keys=True) as client:
        assert [await ask(client, key, RED) for key in ("sk-a", "sk-b", "sk-a", "sk-b")] == [0, 0, 1, 1]
        assert backend.num_encoded == 2, "nor does the gateway share latents: the time would tell"
        assert [await ask(client, key, RED, GREEN, RED) for key in ("sk-a", "sk-b")] == [1, 1]
    assert len(backend.resident) == 4


async def test_latents_that_the_decoder_has_lost_are_not_shared_either(connect: Connect, backend: FakeBackend) -> None:
    async with connect(api_keys=KEYS, isolate_keys=True) as client:
        await ask(client, "sk-a", RED)
        backend.resident.clear()
        await ask(client, "sk-a", RED)
        assert backend.num_encoded == 1
        await ask(client, "sk-b", RED)
        assert backend.num_encoded == 2


@pytest.mark.parametrize("pictures", [(), (RED,)])
async def test_each_isolated_key_has_a_salt_on_which_all_gateways_agree(
    connect: Connect, backend: FakeBackend, pictures: tuple[str, ...]
) -> None:
    for listed in (KEYS, "sk-b, alicia:sk-a"):  # whatever the key is called
        async with connect(api_keys=listed, isolate_keys=True) as client:
            await ask(client, "sk-a", *pictures)
            await ask(client, "sk-b", *pictures)
    first, second = backend.requests[:2], backend.requests[2:]
    assert [(each.cache_salt, each.image_keys) for each in first] == [
        (each.cache_salt, each.image_keys) for each in second
    ]
    salts = {each.cache_salt for each in first}
    assert len(salts) == 2 and {len(salt) for salt in salts} == {32}
    assert not salts & {b"sk-a", b"sk-b"}
