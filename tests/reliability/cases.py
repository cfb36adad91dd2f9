"""The requests of the fuzz run: each from a seed, a kind and a number, the same every time."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.reliability import mutate, pictures

BOUNDARY = b"frontier"
KINDS = ("requests", "pictures")


@dataclass(frozen=True)
class Case:
    """`complete`: what is sent is a whole HTTP request, so a reply is owed. `must_refuse`: a 2xx would be wrong."""

    name: str
    raw: bytes
    complete: bool
    must_refuse: bool = False


class Cases:
    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._accepted = pictures.accepted()
        self._refused = pictures.refused()
        self._files = [*self._accepted.values(), *self._refused.values()]
        self._bodies = _bodies(base64.b64encode(self._accepted["png"]).decode())

    def make(self, kind: str, number: int) -> Case:
        rng = Random(f"{self._seed} {kind} {number}")
        name = f"{kind}:{number}"
        return self._request(rng, name) if kind == "requests" else self._picture(rng, name, number)

    def right(self) -> list[Case]:
        """What the mutants are made of: pictures that are answered, pictures that are refused, bodies."""
        cases = [Case(name, _picture_request(data), True) for name, data in self._accepted.items()]
        cases += [Case(name, _picture_request(data), True, must_refuse=True) for name, data in self._refused.items()]
        return cases + [
            Case(path, _message(b"POST", path, _json_headers(), json.dumps(body).encode()), True)
            for path, body in self._bodies
        ]

    def _picture(self, rng: Random, name: str, number: int) -> Case:
        formats = [*self._accepted, *self._refused]
        form = formats[number % len(formats)]
        data = mutate.mutate_picture(rng, {**self._accepted, **self._refused}[form], self._files)
        # other formats' bytes may have become, by a splice, the beginning of one that is accepted
        refuse = form in self._refused and not data.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF"))
        return Case(f"{name} ({form})", _picture_request(data), True, must_refuse=refuse)

    def _request(self, rng: Random, name: str) -> Case:
        path, value = rng.choice(self._bodies)
        headers, body, method, complete = _json_headers(), json.dumps(value).encode(), b"POST", True
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                body = mutate.mutate_json(rng, value)
            case 4 | 5:
                path, headers = "/v1/generate", [(b"content-type", b"multipart/form-data; boundary=" + BOUNDARY)]
                body = mutate.mutate_form(rng, _form(self._accepted["jpeg"], b"What is it?"))
            case 6:
                method, path = rng.choice(mutate.METHODS), rng.choice(("/v1/models", "/livez", path, *mutate.PATHS))
                complete = False  # CONNECT, HEAD and half a method have rules of their own
            case 7 | 8:
                headers += [mutate.odd_header(rng) for _ in range(rng.choice((1, 2, 20)))]
                complete = False  # a header may say that more comes
        raw = _message(method, path, headers, body)
        if headers == _json_headers() and method == b"POST" and body == json.dumps(value).encode():
            raw, complete = mutate.mutate_bytes(rng, raw), False
        return Case(name, raw, complete)


def _json_headers() -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json")]


def _message(method: bytes, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bytes:
    lines = [
        method + b" " + path.encode("utf-8", "surrogatepass") + b" HTTP/1.1",
        b"host: gateway",
        b"connection: close",
    ]
    lines += [name + b": " + value for name, value in headers]
    lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _picture_request(data: bytes) -> bytes:
    content_type = b"multipart/form-data; boundary=" + BOUNDARY
    return _message(b"POST", "/v1/generate", [(b"content-type", content_type)], _form(data, b"<image>What?"))


def _form(picture: bytes, prompt: bytes) -> bytes:
    fields = b"".join(
        b'--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (BOUNDARY, name, value)
        for name, value in ((b"prompt", prompt), (b"max_tokens", b"2"), (b"temperature", b"0.5"), (b"stop", b"END"))
    )
    head = b'--%s\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n' % BOUNDARY
    return fields + head + b"Content-Type: image/png\r\n\r\n" + picture + b"\r\n--%s--\r\n" % BOUNDARY


def _bodies(png: str) -> list[tuple[str, Any]]:
    url = f"data:image/png;base64,{png}"
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 7, "stop_token_ids": [9, 10], "ignore_eos": True}
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}, {"type": "text", "text": "What?"}]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    turns += [{"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Really?"}]
    options = {"include_usage": True}
    return [
        ("/v1/generate", {"prompt": "Hello there", "max_tokens": 3, **sampling, "stop": ["END", "STOP"]}),
        ("/v1/generate", {"prompt": "<image>What?", "images": [url], "max_tokens": 3, "return_token_ids": True}),
        ("/v1/generate", {"prompt": [1, 40, 50, 60], "max_tokens": 3, "stream": True, **sampling}),
        ("/v1/chat/completions", {"messages": turns, "max_tokens": 3, "stream": True, "stream_options": options}),
        ("/v1/chat/completions", {"messages": turns, "max_completion_tokens": 3, "n": 1, "user": "u", **sampling}),
    ]
