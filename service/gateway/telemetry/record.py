"""What is known of one HTTP request, filled in on its way and told in one log line at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from service.errors import CrossgateError, Unavailable
from service.gateway.admission import Outcome, outcome_of

_TOLD = ("key", "streamed", "finish_reason", "prompt_tokens", "completion_tokens", "pictures", "cached_pictures")


@dataclass
class Record:
    """`key`: the caller's name. `cache_salt`: the caller's, if callers share no caches; never told. `admitted`: it had
    a place. `left`: the client went before the end.

    `cached_pictures`: distinct ones whose K/V the decoder had; `timings`: milliseconds by name.
    """

    request_id: str
    key: str | None = None
    cache_salt: bytes = b""
    streamed: bool | None = None
    admitted: bool = False
    left: bool = False
    error: CrossgateError | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    pictures: int | None = None
    cached_pictures: int | None = None
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome:
        if self.error is None:
            return Outcome.CANCELLED if self.left else Outcome.FINISHED
        if isinstance(self.error, Unavailable) and not self.admitted:
            return Outcome.REFUSED  # the server is shutting down
        return outcome_of(self.error)

    def fields(self) -> dict[str, Any]:
        """For the log line; what no layer has come to know stays out."""
        fields: dict[str, Any] = {"outcome": self.outcome}
        if self.error is not None:
            fields["code"] = self.error.code
        fields |= {name: value for name in _TOLD if (value := getattr(self, name)) is not None}
        return fields | self.timings
