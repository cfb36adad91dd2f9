"""Bearer keys, as OpenAI's clients send them. Without any key configured the door is open."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request

from service.errors import Unauthorized
from service.gateway.api.keys import KeyRing, cache_salt

_BEARER = HTTPBearer(auto_error=False, description="A key of this service.")
_Given = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]


def key_check(ring: KeyRing, *, isolate: bool) -> Callable[[Request, _Given], Awaitable[None]]:
    """A dependency that raises Unauthorized, and else notes the key's name in the request's record; its salt, too, with
    `isolate`.

    It runs before a route reads the body.
    """

    async def check(request: Request, given: _Given) -> None:
        name = await ring.name_of(given.credentials) if given is not None else None
        if given is None or name is None:
            raise Unauthorized("A valid API key is needed: Authorization: Bearer KEY.")
        request.state.record.key = name
        if isolate:
            request.state.record.cache_salt = cache_salt(given.credentials)

    return check
