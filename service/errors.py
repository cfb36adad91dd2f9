"""The error tree, and its three translations: HTTP status, Triton error message, SSE event.

    CrossgateError
    ├── InvalidRequest        400  the caller's mistake; names the field
    │   ├── TooLarge          413  bytes, pixels, pictures or tokens past a limit
    │   ├── RequestTimeout    408  a head or a body that did not come in time
    │   ├── HeadTooLarge      431  a head with too many bytes or lines
    │   └── UnsupportedMedia  415  a body in a form or an encoding that is not read here
    ├── Unauthorized          401
    ├── NotFound              404
    ├── Overloaded            429  with Retry-After
    ├── ImageNotResident      409  inside only: the decoder lacks pictures; the gateway encodes them and retries
    ├── Unavailable           503  with Retry-After
    │   ├── StageLost         503  the stage ended with the request in it, and may have died of it
    │   └── OtherCheckpoint   503  the decoder runs another checkpoint than who made the latents or the prompt
    ├── StageTimeout          504
    └── Internal              500

Messages are ours and fixed; no library's exception text enters one. Knows nothing of HTTP frameworks or Triton.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

_MARK = "crossgate-error:"


class CrossgateError(Exception):
    """Base of everything a client can be told. `message` is shown to the client as it is."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    kind: ClassVar[str] = "server_error"  # OpenAI's error `type`

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's error body, the same on every route and in an SSE `error` event."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def to_triton(self) -> str:
        """The message of a Triton error that `from_triton` turns back into this error."""
        fields = {
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "retry_after_s": self.retry_after_s,
            "keys": getattr(self, "keys", None),
        }
        return _MARK + json.dumps({name: value for name, value in fields.items() if value is not None})


class InvalidRequest(CrossgateError):
    status, code, kind = 400, "invalid_request", "invalid_request_error"


class TooLarge(InvalidRequest):
    status, code = 413, "too_large"


class RequestTimeout(InvalidRequest):
    status, code = 408, "request_timeout"


class HeadTooLarge(InvalidRequest):
    status, code = 431, "head_too_large"


class UnsupportedMedia(InvalidRequest):
    status, code = 415, "unsupported_media"


class Unauthorized(CrossgateError):
    status, code, kind = 401, "unauthorized", "authentication_error"


class NotFound(CrossgateError):
    status, code, kind = 404, "not_found", "invalid_request_error"


class Overloaded(CrossgateError):
    status, code, kind = 429, "overloaded", "rate_limit_error"


class ImageNotResident(CrossgateError):
    """The decoder was given keys without latents and does not hold them. `keys`: what it lacks."""

    status, code = 409, "image_not_resident"

    def __init__(self, message: str, *, keys: tuple[str, ...], param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.keys = keys


class Unavailable(CrossgateError):
    status, code = 503, "unavailable"


class StageLost(Unavailable):
    """The call ended without an answer: the stage may have been at work on the request, and may have died of it."""

    code = "stage_lost"


class OtherCheckpoint(Unavailable):
    code = "other_checkpoint"


class StageTimeout(CrossgateError):
    status, code = 504, "stage_timeout"


class Internal(CrossgateError):
    status, code = 500, "internal"


ALL_ERRORS: tuple[type[CrossgateError], ...] = (
    InvalidRequest,
    TooLarge,
    RequestTimeout,
    HeadTooLarge,
    UnsupportedMedia,
    Unauthorized,
    NotFound,
    Overloaded,
    ImageNotResident,
    Unavailable,
    StageLost,
    OtherCheckpoint,
    StageTimeout,
    Internal,
)


def from_triton(message: str) -> CrossgateError | None:
    """The error behind a Triton error message, or None if no stage of ours wrote it, or not one that we understand."""
    _, mark, text = message.partition(_MARK)
    if not mark:
        return None
    try:
        fields, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not isinstance(said := fields.get("message"), str):
        return None
    kind = next((kind for kind in ALL_ERRORS if kind.code == fields.get("code")), None)
    if kind is None:  # of a newer stage
        return Internal("The model server failed.")
    param = fields.get("param") if isinstance(fields.get("param"), str) else None
    if issubclass(kind, ImageNotResident):
        keys = fields.get("keys")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            return None
        return kind(said, keys=tuple(keys), param=param)
    retry_after_s = fields.get("retry_after_s")
    return kind(said, param=param, retry_after_s=retry_after_s if type(retry_after_s) is int else None)
