"""One request over HTTP and how it ended, judged as a client must judge it.

Each request has a connection of its own: one that is kept may be closed by the server in the moment in which it is
used again, which is nobody's fault and would look like a loss.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any

import httpx

from service.errors import ALL_ERRORS

DEADLINE_S = 75.0  # for a whole request: above every fault, below the gateway's own deadlines
CODES = {error.code for error in ALL_ERRORS}

Answer = tuple[int, ...] | str  # token ids where they are returned, else text


class Outcome(StrEnum):
    FINISHED = "finished"
    REFUSED = "refused"  # an HTTP error with a body of ours
    FAILED = "failed"  # an error event in the stream
    LEFT = "left"  # we hung up on purpose
    CUT = "cut"  # the connection broke
    LOST = "lost"  # no end within the deadline, or one that says nothing
    WRONG = "wrong"  # another answer than in quiet


CLEAN = frozenset({Outcome.REFUSED, Outcome.FAILED})


@dataclass
class Reply:
    """`detail`: an error's status and code, or what was lost. Times are time.monotonic's."""

    started_s: float
    outcome: Outcome = Outcome.LOST
    detail: str = ""
    answer: Answer = ()
    ended_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.started_s


class Client:
    """Asks; never raises. `key`: the bearer key, if any."""

    def __init__(self, url: str, *, key: str | None = None, deadline_s: float = DEADLINE_S) -> None:
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
        self._deadline_s = deadline_s
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=None,
            verify=False,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def ask(
        self, path: str, body: bytes, *, expected: Answer | None = None, leave_after: int | None = None
    ) -> Reply:
        """`leave_after`: hang up after so many tokens. `expected`: what a finished answer has to be."""
        reply = Reply(time.monotonic())
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._ask(path, body, leave_after, reply)
        except TimeoutError:
            reply.outcome, reply.detail = Outcome.LOST, f"no end after {self._deadline_s:.0f} s"
        except httpx.TransportError as error:
            reply.outcome, reply.detail = Outcome.CUT, f"{type(error).__name__} after {len(reply.answer)} tokens"
        except (ValueError, KeyError, TypeError, IndexError) as error:
            reply.outcome, reply.detail = Outcome.LOST, f"not what we speak: {error!r}"[:200]
        reply.ended_s = time.monotonic()
        if expected is not None and not _right(reply, expected):
            reply.outcome, reply.detail = Outcome.WRONG, f"{reply.answer[:8]!r}… for {expected[:8]!r}…"
        return reply

    async def status(self, path: str) -> int | None:
        """Of a GET; None if there was no reply within 5 s."""
        try:
            return (await self._http.get(path, timeout=5.0)).status_code
        except httpx.TransportError:
            return None

    async def _ask(self, path: str, body: bytes, leave_after: int | None, reply: Reply) -> None:
        async with self._http.stream("POST", path, content=body) as response:
            if response.status_code != 200:
                await response.aread()
                reply.detail = f"{response.status_code} {_code(response.json())}"
                reply.outcome = Outcome.REFUSED
            elif response.headers["content-type"].startswith("application/json"):
                await response.aread()
                _take(response.json(), reply)
                reply.outcome = Outcome.FINISHED
            else:
                await _read_stream(response.aiter_lines(), leave_after, reply)


async def _read_stream(lines: AsyncIterator[str], leave_after: int | None, reply: Reply) -> None:
    async for line in lines:
        if not line.startswith("data:"):
            continue  # an event's name, a comment that keeps the connection alive, an empty line
        data = line[5:].strip()
        if data == "[DONE]":
            reply.outcome = Outcome.FINISHED
            return
        chunk = json.loads(data)
        if "error" in chunk:
            reply.outcome, reply.detail = Outcome.FAILED, f"event {_code(chunk)}"
            return
        if _take(chunk, reply):
            reply.token_times_s.append(time.monotonic())
        if leave_after is not None and len(reply.token_times_s) >= leave_after:
            reply.outcome = Outcome.LEFT
            return
    reply.detail = "the stream ended without [DONE] and without an error"


def _take(chunk: dict[str, Any], reply: Reply) -> bool:
    """Add a whole body's or a chunk's tokens to the answer; whether there were any."""
    more: Any
    if "choices" not in chunk:
        more = tuple(chunk["token_ids"]) if "token_ids" in chunk else chunk["text"]
    elif chunk["choices"]:
        choice = chunk["choices"][0]
        more = choice["message"]["content"] if "message" in choice else choice["delta"].get("content", "")
    else:
        more = ""
    reply.answer = (reply.answer or type(more)()) + more
    return bool(more)


def _code(body: dict[str, Any]) -> str:
    """Raises ValueError if this is no error body of ours."""
    error = body["error"]
    if error["code"] not in CODES or not error["message"]:
        raise ValueError(f"no error of ours: {str(body)[:100]}")
    return str(error["code"])


def _right(reply: Reply, expected: Answer) -> bool:
    """Whole answers are equal; what was streamed before an end of another kind is the answer's beginning."""
    if reply.outcome is Outcome.FINISHED:
        return reply.answer == expected
    return not reply.answer or expected[: len(reply.answer)] == reply.answer
