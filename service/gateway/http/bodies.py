"""The bodies of requests as they come: one limit for each, one deadline, and one budget for all of them together.

A request holds its bytes of the budget from before they are read until its pictures are decoded. Starlette's own body
limit answers in plain text whatever the route says, and knows neither deadline nor budget.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from service.errors import InvalidRequest, Overloaded, RequestTimeout, TooLarge, UnsupportedMedia

SMALL = 32  # bodies up to this part of the budget may use its last quarter, so that large ones never take it all
MAX_WAIT_S = 5.0  # for room
MAX_WAITING = 128  # bodies that wait for room; each may have some 300 KiB lying unread in the server
GRACE_S = 2.0  # in which no body is too slow
POLL_S = 0.05


class BodyBudget:
    """`lease = budget.lease(); body = await lease.read(request)`; `lease.release()` gives everything back."""

    def __init__(self, *, max_bytes: int, max_body_bytes: int, timeout_s: float) -> None:
        self.max_bytes = max_bytes
        self.max_body_bytes = max_body_bytes
        self.timeout_s = timeout_s
        self.num_bytes = 0
        self._coming: set[Lease] = set()
        self._num_waiting = 0

    def lease(self) -> Lease:
        return Lease(self)

    async def take(self, lease: Lease, num_bytes: int) -> None:
        """Waits a while for room, and then ends bodies that are behind. Raises Overloaded."""
        small = lease.num_bytes + num_bytes <= self.max_bytes // SMALL
        limit = self.max_bytes if small else self.max_bytes // 4 * 3
        if self.num_bytes + num_bytes > limit:
            await self._wait(limit - num_bytes)
        self.num_bytes += num_bytes
        lease.num_bytes += num_bytes

    def starts(self, lease: Lease) -> None:
        self._coming.add(lease)

    def ends(self, lease: Lease) -> None:
        self._coming.discard(lease)

    async def _wait(self, until_bytes: int) -> None:
        if self._num_waiting < MAX_WAITING:
            self._num_waiting += 1
            loop = asyncio.get_running_loop()
            end = loop.time() + MAX_WAIT_S
            try:
                while loop.time() < end:
                    for lease in self._coming:
                        lease.end_if_behind(loop.time())
                    await asyncio.sleep(POLL_S)
                    if self.num_bytes <= until_bytes:
                        return
            finally:
                self._num_waiting -= 1
        raise Overloaded("Too many bytes of bodies are in flight.", retry_after_s=1)


class Lease:
    """What one request holds of the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self.num_bytes = 0
        self._budget = budget
        self._num_read = 0
        self._declared: int | None = None
        self._start = 0.0
        self._deadline: asyncio.Timeout | None = None  # None while it waits for us, not we for the client

    def release(self) -> None:
        """Give everything back; may be called again."""
        self._budget.num_bytes -= self.num_bytes
        self.num_bytes = 0

    async def read(self, request: Request) -> bytearray:
        """The whole body. Raises TooLarge, UnsupportedMedia, RequestTimeout, Overloaded; ClientDisconnect."""
        self._declared = _declared_bytes(request)
        if self._declared is not None and self._declared > self._budget.max_body_bytes:
            raise self._too_large()
        self._start = asyncio.get_running_loop().time()
        self._budget.starts(self)
        try:
            async with asyncio.timeout(self._budget.timeout_s) as deadline:
                return await self._read(request, deadline)
        except TimeoutError as error:
            raise RequestTimeout("The body did not come in time.") from error
        finally:
            self._budget.ends(self)

    def end_if_behind(self, now: float) -> None:
        """While others wait for room, who sends too slowly to be in time loses its own at once."""
        elapsed = now - self._start
        expected = (self._declared or self._budget.max_body_bytes) * elapsed / self._budget.timeout_s
        if self._deadline is None or self._deadline.expired():
            return
        if elapsed > GRACE_S and self._num_read < expected:
            self._deadline.reschedule(now)

    async def _read(self, request: Request, deadline: asyncio.Timeout) -> bytearray:
        body = bytearray()
        if self._declared is not None:
            await self._budget.take(self, self._declared)
        self._deadline = deadline
        async for chunk in request.stream():
            self._num_read += len(chunk)
            if self._num_read > self._budget.max_body_bytes:
                raise self._too_large()
            if self._num_read > self.num_bytes:  # nobody said how long it would be
                self._deadline = None
                await self._budget.take(self, self._num_read - self.num_bytes)
                self._deadline = deadline
            body += chunk
        return body

    def _too_large(self) -> TooLarge:
        return TooLarge(f"A body takes at most {self._budget.max_body_bytes} bytes.")


def _declared_bytes(request: Request) -> int | None:
    """None for a body in chunks."""
    if set(request.headers.getlist("content-encoding")) - {"", "identity"}:
        raise UnsupportedMedia("A compressed body is not read here: send it without Content-Encoding.")
    if set(map(str.lower, request.headers.getlist("transfer-encoding"))) - {"chunked"}:
        raise InvalidRequest("The only transfer encoding here is chunked.")
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 20:
        raise InvalidRequest("Content-Length is not a number.")
    return int(text)
