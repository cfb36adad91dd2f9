"""A multipart form to the body of /v1/generate and its pictures. Its texts are UTF-8, whatever it calls them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import InvalidRequest, TooLarge
from service.gateway.api.schemas import GenerateBody
from service.gateway.api.validation import validate
from service.gateway.question import PictureSource

REPEATED = frozenset({"stop", "stop_token_ids"})
MAX_FIELDS = 64
MAX_NAME_CHARS = 200  # every name that means anything is shorter
MAX_BOUNDARY_BYTES = 70  # RFC 2046
_SLICE_BYTES = 256 << 10


@dataclass(frozen=True)
class FormLimits:
    max_pictures: int
    max_text_bytes: int  # of everything but pictures
    max_prompt_tokens: int


def parse_form(
    body: bytes | bytearray, boundary: bytes, limits: FormLimits
) -> tuple[GenerateBody, tuple[PictureSource, ...]]:
    """Fields `prompt` and those of GenerateBody; `image`, repeated: a file, or a data URL. Raises InvalidRequest."""
    if not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
        raise InvalidRequest(f"A form's boundary has 1 to {MAX_BOUNDARY_BYTES} bytes.")
    data: dict[str, Any] = {}
    pictures: list[PictureSource] = []
    for part in _split(body, boundary, limits):
        name = part.name
        if name == "image":
            content = bytes(part.content) if part.is_file else _text(part)
            pictures.append(PictureSource(content, f"image[{len(pictures)}]"))
            part.content.clear()
        elif part.is_file:
            raise InvalidRequest(f"{name} must not be a file; pictures are `image`.", param=name)
        elif name in REPEATED:
            data.setdefault(name, []).append(_text(part))
        elif name in data:
            raise InvalidRequest(f"{name} stands in the form twice.", param=name)
        elif name == "images":
            raise InvalidRequest("Unknown parameter: images; in a form it is `image`, repeated.", param=name)
        else:
            data[name] = _text(part)
    fields = validate(GenerateBody, data, strict=False, max_prompt_tokens=limits.max_prompt_tokens)
    return fields, tuple(pictures)


@dataclass
class _Part:
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    name: str = ""
    is_file: bool = False
    content: bytearray = field(default_factory=bytearray)


def _split(body: bytes | bytearray, boundary: bytes, limits: FormLimits) -> list[_Part]:
    parts = _Parts(limits)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": parts.begin,
                "on_header_field": parts.header_field,
                "on_header_value": parts.header_value,
                "on_header_end": parts.header_end,
                "on_headers_finished": parts.headers_finished,
                "on_part_data": parts.data,
                "on_end": parts.end,
            },
        )
        for start in range(0, len(body), _SLICE_BYTES):
            parser.write(bytes(body[start : start + _SLICE_BYTES]))
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest("The body is not a valid multipart form.") from error
    if body and not parts.has_ended:
        raise InvalidRequest("The form is cut off: its last boundary is missing.")
    return parts.all


class _Parts:
    """The parser's callbacks; it bounds the headers of a part itself."""

    def __init__(self, limits: FormLimits) -> None:
        self.all: list[_Part] = []
        self.has_ended = False
        self._limits = limits
        self._num_pictures = self._num_text_bytes = 0
        self._field, self._value = b"", b""

    def begin(self) -> None:
        if len(self.all) - self._num_pictures >= MAX_FIELDS:
            raise InvalidRequest(f"A form has at most {MAX_FIELDS} fields beside its pictures.")
        self.all.append(_Part())

    def end(self) -> None:
        self.has_ended = True

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self.all[-1].headers.append((self._field.strip().lower(), self._value))
        self._field, self._value = b"", b""

    def headers_finished(self) -> None:
        part = self.all[-1]
        _, options = parse_options_header(dict(part.headers).get(b"content-disposition", b""))
        part.headers.clear()
        try:
            part.name = options[b"name"].decode()[:MAX_NAME_CHARS]
        except (KeyError, UnicodeDecodeError) as error:
            raise InvalidRequest("Each part of a form needs a name, in UTF-8.") from error
        part.is_file = b"filename" in options
        if part.name == "image":
            self._num_pictures += 1
            if self._num_pictures > self._limits.max_pictures:
                raise TooLarge(
                    f"A request takes at most {self._limits.max_pictures} pictures.",
                    param=f"image[{self._limits.max_pictures}]",
                )

    def data(self, data: bytes, start: int, end: int) -> None:
        part = self.all[-1]
        part.content += memoryview(data)[start:end]
        if part.name != "image":
            self._num_text_bytes += end - start
            if self._num_text_bytes > self._limits.max_text_bytes:
                raise TooLarge(f"A form takes at most {self._limits.max_text_bytes} bytes apart from its pictures.")


def _text(part: _Part) -> str:
    try:
        return part.content.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{part.name} is not UTF-8.", param=part.name) from error
