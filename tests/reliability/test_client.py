"""The judge is judged: every way in which an answer can end, from a server that says exact bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.reliability.client import Answer, Client, Outcome, Reply
from tests.reliability.load import Load
from tests.reliability.questions import Question, tell_apart

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
TOKENS = b'data: {"text": "a", "token_ids": [5, 6]}\n\n'
ERROR = b'event: error\ndata: {"error": {"message": "No.", "code": "unavailable"}}\n\n'
DONE = b"data: [DONE]\n\n"


def whole(status: str, body: object) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


@asynccontextmanager
async def server(said: bytes | None) -> AsyncIterator[str]:
    """Its URL. `said` None: it never says anything."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if said is None:
            await reader.read()  # until the client gives up
        else:
            writer.write(said)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    listener = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        await asyncio.sleep(0.01)  # its side of the connection ends, too


async def ask(said: bytes | None, *, expected: Answer | None = None, leave_after: int | None = None) -> Reply:
    async with server(said) as url, Client(url, deadline_s=0.5 if said is None else 60.0) as client:
        return await client.ask("/v1/generate", b"{}", expected=expected, leave_after=leave_after)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (STREAM + TOKENS + TOKENS + DONE, Outcome.FINISHED),
        (STREAM + b": ping\n\n" + TOKENS + TOKENS + DONE, Outcome.FINISHED),
        (whole("200 OK", {"token_ids": [5, 6, 5, 6], "text": "aa"}), Outcome.FINISHED),
        (STREAM + TOKENS + ERROR, Outcome.FAILED),
        (whole("503 Service Unavailable", {"error": {"message": "No.", "code": "unavailable"}}), Outcome.REFUSED),
        (STREAM + TOKENS, Outcome.LOST),  # neither an end nor an error
        (whole("500 Internal Server Error", b"Traceback"), Outcome.LOST),
        (whole("500 Internal Server Error", {"error": {"message": "No.", "code": "theirs"}}), Outcome.LOST),
        (whole("500 Internal Server Error", {"detail": "No."}), Outcome.LOST),
        (STREAM + b"data: {broken\n\n", Outcome.LOST),
        (None, Outcome.LOST),
        (b"", Outcome.CUT),
        (whole("200 OK", {"token_ids": [5]})[:-3], Outcome.CUT),
        (STREAM + TOKENS + b'data: {"token_ids": [6, 6], "text": "b"}\n\n' + DONE, Outcome.WRONG),
        (STREAM + TOKENS + DONE, Outcome.WRONG),  # too short
        (STREAM + b'data: {"token_ids": [9], "text": "b"}\n\n' + ERROR, Outcome.WRONG),  # wrong before it failed
    ],
)
async def test_every_end_of_an_answer_has_its_name(said: bytes | None, outcome: Outcome) -> None:
    assert (await ask(said, expected=(5, 6, 5, 6))).outcome is outcome


async def test_a_client_can_leave_in_mid_answer() -> None:
    assert (await ask(STREAM + TOKENS + TOKENS + DONE, leave_after=1)).outcome is Outcome.LEFT


@pytest.mark.parametrize("retries", [False, True])
async def test_a_broken_connection_is_lost_unless_the_client_asks_again_and_is_served(retries: bool) -> None:
    sayings = [b"", b"", STREAM + TOKENS + DONE]

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sayings.pop(0))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    listener = await asyncio.start_server(connected, "127.0.0.1", 0)
    question = Question("?", (), "/v1/generate", b"{}")
    async with listener, Client(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}") as client:
        load = Load(client, {question: (5, 6)}, 0, questions=[question], retries=retries)
        reply = await load.ask(question)
        await asyncio.sleep(0.01)
    assert reply.outcome is (Outcome.FINISHED if retries else Outcome.LOST)
    assert load.num_retried == (2 if retries else 0)


def test_two_pictures_with_one_answer_would_prove_nothing() -> None:
    one, other = (Question("What?", (number,), "/v1/generate", b"%d" % number) for number in (1, 2))
    tell_apart({one: (1, 2), other: (1, 3)})
    with pytest.raises(AssertionError, match="one answer"):
        tell_apart({one: (1, 2), other: (1, 2)})
