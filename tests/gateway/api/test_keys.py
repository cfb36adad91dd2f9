"""Named keys: how they are written, what an operator gets wrong, and how a file's new contents come into force."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from pathlib import Path

import pytest

from service.errors import InvalidRequest
from service.gateway.api import keys as module
from service.gateway.api.keys import KeyRing
from tests.gateway.conftest import Connect
from tests.gateway.fakes import FakeBackend

ASK = {"prompt": "Hi", "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.0)


async def test_keys_have_names_comments_and_blank_lines(file: Path) -> None:
    text = "\ufeff# of the shop\r\nalice:sk-a:b\r\n\r\n  bob:sk-b  # until May\r\nbare-key\r\n#carol:sk-c\r\n"
    file.write_bytes(text.encode())
    ring = KeyRing("one, dora:two", file)
    assert ring.names == ("key-1", "dora", "alice", "bob", "key-2")
    given = ["one", "two", "sk-a:b", "sk-b", "bare-key", "sk-c", "alice", "bob:sk-b", "", "sk-B", "ä"]
    assert [await ring.name_of(key) for key in given] == ["key-1", "dora", "alice", "bob", "key-2", *[None] * 6]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no key"),
        (b"# nothing\n\n", "holds no key"),
        (b"alice:\xff\xfe\n", "is not UTF-8"),
        ("alice:secret".encode("utf-16"), "is not UTF-8"),
        (b"alice:secret\nbob:sec ret\n", "line 2: a key has"),
        ("alice:s\u00e4cret\n".encode(), "line 1: a key has"),
        (b"alice:\n", "line 1: a key has"),
        (b":secret\n", "line 1: a name has"),
        (b"al ice:secret\n", "line 1: a name has"),
        (b"alice:secret\nalice:other\n", "line 2: the name alice is taken"),
        (b"alice:secret\nbob:secret\n", "line 2: this key stands there twice"),
        (b"key-1:secret\nother\n", "line 2: the name key-1 is taken"),
        (b"a" * (1 << 20) + b"\n", "has more than 1048576 bytes"),
        (b"alice:sec\x00ret\n", "line 1: a key has"),
    ],
)
async def test_a_wrong_file_is_one_line_that_shows_no_key(file: Path, content: bytes, says: str) -> None:
    file.write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        KeyRing("", file)
    assert says in caught.value.message and "\n" not in caught.value.message
    assert "secret" not in caught.value.message and "sec" not in caught.value.message.split(", line")[-1]


async def test_a_variable_without_a_key_does_not_open_the_door(file: Path) -> None:
    with pytest.raises(InvalidRequest, match="CROSSGATE_API_KEYS holds no key"):
        KeyRing(" , ", None)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        KeyRing("", file)


@pytest.mark.parametrize("how", ["in place", "renamed", "as Kubernetes does", "same size and time"])
async def test_a_changed_file_is_read_again(tmp_path: Path, file: Path, how: str) -> None:
    if how == "as Kubernetes does":
        for version, content in (("1", "alice:old\n"), ("2", "alice:new\n")):
            (tmp_path / version).mkdir()
            (tmp_path / version / "keys").write_text(content)
        (tmp_path / "..data").symlink_to("1")
        file.symlink_to(Path("..data", "keys"))
    else:
        file.write_text("alice:old\n")
    told: list[tuple[str, ...]] = []
    ring = KeyRing("", file, lambda ring: told.append(ring.names))
    assert await ring.name_of("old") == "alice"
    if how == "in place":
        file.write_text("alice:new\nbob:other\n")
    elif how == "renamed":
        (tmp_path / "next").write_text("alice:new\n")
        (tmp_path / "next").rename(file)
    elif how == "as Kubernetes does":
        (tmp_path / "..tmp").symlink_to("2")
        (tmp_path / "..tmp").rename(tmp_path / "..data")
    else:
        before = file.stat()
        file.write_text("alice:new\n")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (await ring.name_of("old"), await ring.name_of("new")) == (None, "alice")
    assert told == [("alice", "bob") if how == "in place" else ("alice",)]


async def test_a_broken_new_file_keeps_the_old_keys_and_is_one_line(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text("alice:secret\n")
    ring = KeyRing("", file)
    for break_it in (lambda: file.write_text("bob:sec ret\n"), file.unlink, lambda: file.write_bytes(b"\xff")):
        caplog.clear()
        break_it()
        for _ in range(3):
            assert await ring.name_of("secret") == "alice"
        assert len(caplog.records) == 1 and "the keys stay as they were" in caplog.text
        assert "sec" not in caplog.text.replace(str(file), "")
    file.write_text("bob:secret\n")
    assert await ring.name_of("secret") == "bob"


async def test_the_file_is_looked_at_once_a_second_and_off_the_loop(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 1.0)
    file.write_text("alice:secret\n")
    ring = KeyRing("", file)
    reads = 0

    def slow(path: Path) -> bytes:
        nonlocal reads
        reads += 1
        time.sleep(0.2)
        return path.read_bytes()

    monkeypatch.setattr(module, "_read", slow)
    await asyncio.gather(*(ring.name_of("secret") for _ in range(50)))
    assert reads == 0
    ring._looked_s -= 1.0
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    await asyncio.gather(*(ring.name_of("secret") for _ in range(50)))
    ticking.cancel()
    assert reads == 1 and ticks > 3


async def test_a_new_file_needs_no_restart_and_shares_the_places(
    connect: Connect, backend: FakeBackend, file: Path
) -> None:
    file.write_text("alice:a\n")
    async with connect(api_keys_file=file, max_shared_requests=4) as client:
        assert (await client.post("/v1/generate", json=ASK, headers=bearer("a"))).status_code == 200
        assert (await client.post("/v1/generate", json=ASK, headers=bearer("b"))).status_code == 401
        file.write_text("alice:a\nbob:b\n")
        assert (await client.post("/v1/generate", json=ASK, headers=bearer("b"))).status_code == 200
        backend.gate = asyncio.Event()
        asked = [asyncio.create_task(client.post("/v1/generate", json=ASK, headers=bearer("a"))) for _ in range(6)]
        admission = client.app.state.admission
        async with asyncio.timeout(20):
            while admission.num_running + admission.num_waiting < 6:
                await asyncio.sleep(0.01)
        assert (admission.running_of("alice"), admission.waiting_of("alice")) == (3, 3)
        text = (await client.get("/metrics")).text
        backend.gate.set()
        await asyncio.gather(*asked)
    assert 'crossgate_num_requests_running{key="alice"} 3.0' in text
    assert 'crossgate_num_requests_waiting{key="alice"} 3.0' in text
    assert 'crossgate_num_requests_waiting{key="bob"} 0.0' in text
    assert 'crossgate_requests_ended_total{key="bob",outcome="finished"} 1.0' in text


async def test_names_stand_in_the_log_and_keys_do_not(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with connect(api_keys="alice:sk-geheim,bob:sk-auch") as client:
        assert (await client.post("/v1/generate", json=ASK, headers=bearer("sk-geheim"))).status_code == 200
        assert (await client.post("/v1/generate", json=ASK, headers=bearer("sk-falsch"))).status_code == 401
    lines = [record.fields for record in caplog.records if record.getMessage() == "request"]
    assert lines[0]["key"] == "alice" and lines[0]["outcome"] == "finished"
    assert "key" not in lines[1] and lines[1]["outcome"] == "refused" and lines[1]["code"] == "unauthorized"
    everything = caplog.text + json.dumps([record.__dict__ for record in caplog.records], default=str)
    assert "sk-" not in everything


async def test_the_documentation_shows_the_lock(connect: Connect) -> None:
    async with connect(api_keys="one") as client:
        document = (await client.get("/openapi.json")).json()
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert document["paths"]["/v1/chat/completions"]["post"]["security"] == [{"HTTPBearer": []}]
    async with connect() as client:
        assert "securitySchemes" not in (await client.get("/openapi.json")).json()["components"]


async def test_without_a_key_the_answer_comes_before_the_body(serve: Connect) -> None:
    async with serve(api_keys="one") as client:
        address = ("127.0.0.1", client.base_url.port)

        def ask() -> bytes:
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nhost: it\r\ncontent-type: application/json\r\n"
                    b"expect: 100-continue\r\ncontent-length: 50000000\r\n\r\n"
                )
                return connection.recv(65536)

        assert (await asyncio.to_thread(ask)).startswith(b"HTTP/1.1 401 ")
