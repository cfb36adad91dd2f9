"""What /docs says about the bodies, which the routes read themselves to word their own errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from service.gateway.api.schemas import ChatBody, GenerateBody

_REF = "#/components/schemas/"
_IMAGE_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_FORM = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {"type": "string", "description": "Text; <image> marks say where the pictures stand."},
        "image": _IMAGE_FILES,
        "max_tokens": {"type": "integer"},
        "temperature": {"type": "number"},
        "stream": {"type": "boolean"},
    },
}
GENERATE_DOCS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _FORM},
            "application/json": {"schema": {"$ref": f"{_REF}GenerateBody"}},
        },
    }
}
CHAT_DOCS: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": f"{_REF}ChatBody"}}}}
}


def install_docs(app: FastAPI) -> None:
    """Give the app's OpenAPI document the schemas of the bodies."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, bodies = models_json_schema(
                [(GenerateBody, "validation"), (ChatBody, "validation")], ref_template=_REF + "{model}"
            )
            document.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
