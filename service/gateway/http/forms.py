"""A multipart form to the body of /v1/generate and its pictures. All in memory: the body is limited already."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from service.errors import InvalidRequest
from service.gateway.http.schemas import GenerateBody
from service.gateway.http.validation import validate
from service.gateway.question import PictureSource

REPEATED = frozenset({"stop", "stop_token_ids"})
MAX_FIELDS = 64


async def parse_form(request: Request, max_body_bytes: int) -> tuple[GenerateBody, tuple[PictureSource, ...]]:
    """Fields `prompt` and those of GenerateBody; `image`, repeated: a file, or a data URL. Raises InvalidRequest."""
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=1000, max_fields=MAX_FIELDS, max_part_size=max_body_bytes
    )
    parser.spool_max_size = max_body_bytes + 1  # never to a file
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest("The body is not a valid multipart form.") from error
    data: dict[str, Any] = {}
    pictures: list[PictureSource] = []
    try:
        for name, value in form.multi_items():
            if name == "image":
                content = await value.read() if isinstance(value, UploadFile) else value
                pictures.append(PictureSource(content, f"image[{len(pictures)}]"))
            elif isinstance(value, UploadFile):
                raise InvalidRequest(f"{name} must not be a file; pictures are `image`.", param=name)
            elif name in REPEATED:
                data.setdefault(name, []).append(value)
            elif name in data:
                raise InvalidRequest(f"{name} stands in the form twice.", param=name)
            elif name == "images":
                raise InvalidRequest("Unknown parameter: images; in a form it is `image`, repeated.", param=name)
            else:
                data[name] = value
    finally:
        await form.close()
    return validate(GenerateBody, data, strict=False), tuple(pictures)
