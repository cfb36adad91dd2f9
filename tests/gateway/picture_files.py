"""Pictures as clients send them."""

from __future__ import annotations

import base64
import io

from PIL import Image


def encoded(color: str = "red", *, size: tuple[int, int] = (24, 20), form: str = "PNG") -> bytes:
    return file_of(Image.new("RGB", size, color), form)


def file_of(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def data_url(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


RED, GREEN, BLUE = (data_url(encoded(color)) for color in ("red", "green", "blue"))

TRUNCATED_JPEG = data_url(encoded(size=(200, 200), form="JPEG")[:400])
