"""The one form that whatever a client sent takes inside. Knows nothing of tokens, pixels or HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.contract import SamplingParams


@dataclass(frozen=True)
class PictureSource:
    """A picture as it came. `content`: the file's bytes, or a data URL. `field` names it in errors."""

    content: bytes | str
    field: str


@dataclass
class Question:
    """A request that is well formed; its pictures and its prompt are still to be read.

    `prompt`: text with `<image>` marks, token ids, or chat messages in `transformers`' form (role, and content as a
    list of {"type": "text", "text"} and {"type": "image"}). `sampling.max_tokens` counts only if `max_tokens_given`.
    `on_dropped`: told when prompt and pictures are no longer needed, which is long before the answer ends.
    """

    prompt: str | tuple[int, ...] | list[dict[str, Any]]
    pictures: tuple[PictureSource, ...]
    sampling: SamplingParams
    max_tokens_given: bool
    stop: tuple[str, ...]
    stream: bool
    return_token_ids: bool = False
    include_usage: bool = False
    on_dropped: Callable[[], None] = lambda: None

    def drop(self) -> None:
        """Its prompt and its pictures, once they are read."""
        self.prompt, self.pictures = (), ()
        self.on_dropped()


@dataclass(frozen=True)
class SamplingDefaults:
    """What holds where a request says nothing. Greedy, unless told otherwise."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
