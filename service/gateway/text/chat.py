"""A checkpoint's chat template: messages in `transformers`' form to the text of a prompt.

Source: `transformers` utils/chat_template_utils.py, whose sandbox, globals and filters templates are written for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from service.errors import InvalidRequest

ImageText = Callable[[bool], str]
PROBE = "crossgate probe"


class TemplateRefusal(jinja2.TemplateError):
    """The template called `raise_exception`; the message is its author's."""


class ChatTemplate:
    """`image_text` writes a picture (see Family). `special_tokens`: bos_token, eos_token … for the template.

    Raises InvalidRequest, for an operator, if the template is not jinja.
    """

    def __init__(self, source: str, image_text: ImageText, special_tokens: dict[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidRequest("The checkpoint's chat template is not valid jinja.", param="MODEL_PATH") from error
        self._image_text = image_text
        self._special_tokens = special_tokens
        self._takes_strings = PROBE in self._try(PROBE)
        written = self._try([{"type": "image"}, {"type": "image"}, {"type": "text", "text": PROBE}])
        self._writes_pictures = image_text(False) + image_text(True) + PROBE in written

    def render(self, messages: list[dict[str, Any]]) -> str:
        """`content` of each message: a list of {"type": "text", "text"} and {"type": "image"}.

        Raises InvalidRequest if the template refuses the messages.
        """
        if self._takes_strings:
            messages = [{**message, "content": self._as_string_or_parts(message["content"])} for message in messages]
        try:
            return self._render(messages)
        except TemplateRefusal as error:
            raise InvalidRequest(f"The chat template refuses this: {error.message}", param="messages") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InvalidRequest("The chat template cannot write these messages.", param="messages") from error

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)

    def _try(self, content: str | list[dict[str, str]]) -> str:
        """What it writes of a message with such content; nothing if it fails, whatever it raises."""
        try:
            return self._render([{"role": "user", "content": content}])
        except Exception:
            return ""

    def _as_string_or_parts(self, content: list[dict[str, str]]) -> str | list[dict[str, str]]:
        """Texts that follow each other get a line each; a picture's text stands right where the picture does.

        A template that writes pictures itself as the family does is shown the parts where there are some: it may write
        another opening then. How it writes texts that follow each other is its own business.
        """
        if self._writes_pictures and any(part["type"] == "image" for part in content):
            return content
        text = ""
        before = ""
        for part in content:
            if part["type"] == "image":
                text += self._image_text(before == "image")
            else:
                text += ("\n" if before == "text" else "") + part["text"]
            before = part["type"]
        return text


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
