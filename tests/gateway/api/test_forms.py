"""Multipart forms: UTF-8 alone, few parts, and no work that grows faster than the bytes."""

from __future__ import annotations

import time

import pytest

from tests.gateway.conftest import Connect
from tests.gateway.fakes import FakeBackend
from tests.gateway.http.raw import measured_stall
from tests.gateway.picture_files import encoded

pytestmark = pytest.mark.asyncio
MIB = 1 << 20


def form(*fields: tuple[str, bytes], boundary: str = "x", headers: str = "") -> bytes:
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n{headers}\r\n'.encode() + content + b"\r\n"
        for name, content in fields
    ]
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


@pytest.mark.parametrize("length", [4, 9, 40, 120])
async def test_a_form_without_its_end_is_refused(connect: Connect, length: int) -> None:
    whole = form(("max_tokens", b"1"), ("prompt", b"What is this? And what is it not?"))
    async with connect() as client:
        for content, status in ((whole, 200), (whole[:-length], 400)):
            reply = await client.post(
                "/v1/generate", content=content, headers={"content-type": "multipart/form-data; boundary=x"}
            )
            assert reply.status_code == status


@pytest.mark.parametrize(
    "charset",
    [
        "punycode",
        '"punycode"',
        "PUNYCODE",
        "idna",
        "utf-7",
        "utf-16",
        "rot13",
        "unicode_escape",
        "zlib",
        "latin-1",
        "no",
    ],
)
@pytest.mark.parametrize("name", ["charset", "Charset", "charset "])
async def test_only_utf_8_is_read(serve: Connect, charset: str, name: str) -> None:
    kind = f"multipart/form-data; boundary=x; {name}={charset}"
    content = form(("prompt", b"a" * 400_000))
    async with serve() as client, measured_stall() as stall:
        start = time.process_time()
        reply = await client.post("/v1/generate", content=content, headers={"content-type": kind})
        assert reply.status_code == 400 and "UTF-8" in reply.json()["error"]["message"]
        assert time.process_time() - start < 1
        kind = f"application/json; {name}={charset}"
        reply = await client.post("/v1/generate", content=b'{"prompt":"Hi"}', headers={"content-type": kind})
        assert reply.status_code == 400
    assert stall.worst_s < 0.5


async def test_utf_8_by_any_of_its_names_is_read_and_a_part_has_no_say(serve: Connect, backend: FakeBackend) -> None:
    part = "Content-Type: text/plain; charset=punycode\r\n"
    async with serve() as client:
        for charset in ("", "; charset=utf-8", '; charset="UTF-8"', "; charset=utf8", "; charset*=punycode''x"):
            kind = f"multipart/form-data; boundary=x{charset}"
            content = form(("prompt", "naïve".encode()), headers=part)
            reply = await client.post("/v1/generate", content=content, headers={"content-type": kind})
            assert reply.status_code == 200, reply.text
        content = form(("prompt", "naïve".encode("latin-1")))
        reply = await client.post(
            "/v1/generate", content=content, headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "prompt"
        content = form(("_charset_", b"punycode"), ("prompt", b"Hi"))
        reply = await client.post(
            "/v1/generate", content=content, headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "_charset_"
    assert len({request.input_ids for request in backend.requests}) == 1


LINE = 'Content-Disposition: form-data; name="prompt"'
HOSTILE = {
    "many fields": (form(*[("a", b"")] * 10_000), "x", 400),
    "many files": (form(*[("image", b"a")] * 10_000), "x", 413),
    "line ends": (form(("prompt", b"\r\n" * (MIB // 2 + 1))), "x", 413),
    "nearly boundaries": (form(("image", (b"\r\n--" + b"x" * 69) * 100_000), boundary="x" * 70), "x" * 70, 400),
    "boundary beginnings": (form(("image", b"\r\n--" * MIB), boundary="-"), "-", 400),
    "long part header": (f"--x\r\n{LINE}; x={'y' * MIB}\r\n\r\nHi\r\n--x--\r\n".encode(), "x", 400),
    "many part headers": (f"--x\r\n{LINE}\r\n{chr(10).join(['a: b' + chr(13)] * 9999)}".encode(), "x", 400),
    "semicolons": (f"--x\r\n{LINE}{';' * 4000}\r\n\r\nHi\r\n--x--\r\n".encode(), "x", 200),
    "quotes": (f"--x\r\n{LINE}; a={chr(34) * 3999}\r\n\r\nHi\r\n--x--\r\n".encode(), "x", 200),
    "no boundary": (form(("prompt", b"Hi")), "", 400),
    "a long boundary": (form(("prompt", b"Hi"), boundary="x" * 200), "x" * 200, 400),
    "another boundary": (form(("prompt", b"Hi")), "y", 400),
    "after the end": (form(("prompt", b"Hi")) + b"\r\n--x" * MIB, "x", 200),
    "no end": (b"--x\r\n", "x", 400),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_no_form_costs_more_than_its_bytes(serve: Connect, name: str) -> None:
    content, boundary, expected = HOSTILE[name]
    kind = f"multipart/form-data; boundary={boundary}"
    async with serve() as client, measured_stall() as stall:
        start = time.process_time()
        reply = await client.post("/v1/generate", content=content, headers={"content-type": kind})
        assert reply.status_code == expected, reply.text
        assert len(reply.content) < 1000
        assert time.process_time() - start < 3
    assert stall.worst_s < 0.5


@pytest.mark.parametrize("parameters", ["; a=b" * 300, ";" * 1000, '; a="' + ";" * 1000, "; boundary=" + "x" * 2000])
async def test_a_long_content_type_is_refused(serve: Connect, parameters: str) -> None:
    async with serve() as client:
        headers = {"content-type": "multipart/form-data" + parameters}
        for path in ("/v1/generate", "/v1/chat/completions"):
            assert (await client.post(path, content=b"x", headers=headers)).status_code == 400


async def test_as_many_files_as_pictures_are_read(serve: Connect) -> None:
    files = [("image", ("a.png", encoded("red")))] * 3
    async with serve(max_images=2) as client:
        assert (await client.post("/v1/generate", data={"prompt": "Hi"}, files=files[:2])).status_code == 200
        reply = await client.post("/v1/generate", data={"prompt": "Hi"}, files=files)
        assert reply.status_code == 413 and reply.json()["error"]["param"] == "image[2]"
