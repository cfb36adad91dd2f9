"""What clients get: the bodies of both routes, whole and in pieces. Plain dictionaries: a piece is made per token."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from service.contract import Usage
from service.gateway.pipeline import Ending, Piece
from service.gateway.question import Question


class GenerateReply:
    """Of /v1/generate. Its id contains the request's, which logs and traces know."""

    def __init__(self, model: str, question: Question, request_id: str) -> None:
        self._head = {"id": f"gen-{request_id}", "model": model}
        self._return_token_ids = question.return_token_ids

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """One chunk, or none for a piece in which there is nothing to tell."""
        if piece.text or piece.ending is not None or (self._return_token_ids and piece.token_ids):
            yield self._body([piece])

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return self._body(pieces)

    def _body(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        body: dict[str, Any] = {**self._head, "text": "".join(piece.text for piece in pieces)}
        if self._return_token_ids:
            body["token_ids"] = [token for piece in pieces for token in piece.token_ids]
        ending = pieces[-1].ending
        body["finish_reason"] = None if ending is None else ending.finish_reason
        if ending is not None:
            body["usage"] = _usage(ending.usage)
            body["timings"] = dataclasses.asdict(ending.timings)
        return body


class ChatReply:
    """Of /v1/chat/completions: OpenAI's bodies, with `timings` beside them and picture counts in `usage`."""

    def __init__(self, model: str, question: Question, request_id: str) -> None:
        self._id, self._created = f"chatcmpl-{request_id}", int(time.time())
        self._model = model
        self._include_usage = question.include_usage
        self._begun = False

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if not self._begun:
            self._begun = True
            yield self._chunk({"role": "assistant", "content": ""})
        if piece.text:
            yield self._chunk({"content": piece.text})
        if piece.ending is not None:
            yield self._chunk({}, piece.ending)
            if self._include_usage:
                usage = self._head("chat.completion.chunk")
                yield {**usage, "choices": [], "usage": _openai_usage(piece.ending.usage)}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        ending = pieces[-1].ending
        assert ending is not None  # the pipeline's last piece has one
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": ending.finish_reason}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": _openai_usage(ending.usage),
            "timings": dataclasses.asdict(ending.timings),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, delta: dict[str, str], ending: Ending | None = None) -> dict[str, Any]:
        reason = None if ending is None else ending.finish_reason
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        if ending is not None:
            chunk["timings"] = dataclasses.asdict(ending.timings)
        return chunk


Reply = GenerateReply | ChatReply


def _usage(usage: Usage) -> dict[str, Any]:
    return {**dataclasses.asdict(usage), "total_tokens": usage.prompt_tokens + usage.completion_tokens}


def _openai_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
        "images": usage.images,
        "cached_images": usage.cached_images,
    }
