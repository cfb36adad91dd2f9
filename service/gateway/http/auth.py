"""Bearer keys, as OpenAI's clients send them. Without any key configured the door is open."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from starlette.requests import Request

from service.errors import Unauthorized


def bearer_check(keys: frozenset[str]) -> Callable[[Request], None]:
    """A dependency that raises Unauthorized. Takes the same time whichever key is wrong, wherever it is."""
    wanted = [key.encode() for key in keys]

    def check(request: Request) -> None:
        if not wanted:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in wanted]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("A valid API key is needed: Authorization: Bearer KEY.")

    return check
