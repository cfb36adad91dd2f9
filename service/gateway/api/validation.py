"""From a client's data to a pydantic model, or to an InvalidRequest that names the field in our own words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from service.errors import InvalidRequest

Model = TypeVar("Model", bound=BaseModel)

MAX_ERRORS = 100

_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a string",
    "list": "a list",
    "dict": "an object",
    "model": "an object",
}


def validate(model: type[Model], data: dict[str, Any], *, strict: bool, max_prompt_tokens: int) -> Model:
    """Types are strict: "1" is no integer; `strict` False also takes a form's strings for numbers and booleans.

    Raises InvalidRequest. The models see to it that there are few errors: their lists stop at the first.
    """
    try:
        return model.model_validate(data, strict=strict, context=max_prompt_tokens)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False, include_input=False)[:MAX_ERRORS], data) from error


def invalid_request(problems: Sequence[ErrorDetails], data: Any) -> InvalidRequest:
    """The error about the innermost wrong field. `data`: what was validated."""
    named = [(_path(problem, data), problem) for problem in problems]
    steps, _ = max(named, key=lambda pair: len(pair[0]))
    name = _spell(steps)
    kinds = [problem["type"] for path, problem in named if path == steps]
    if kinds == ["missing"]:
        return InvalidRequest(f"{name} is required.", param=name)
    if "extra_forbidden" in kinds:
        return InvalidRequest(f"Unknown parameter: {name}.", param=name)
    limits = [problem.get("ctx", {}) for path, problem in named if path == steps]
    expected = sorted({_expected(kind, context) for kind, context in zip(kinds, limits, strict=True)} - {""})
    return InvalidRequest(f"{name} must be {' or '.join(expected) or 'another value'}.", param=name)


def _expected(kind: str, context: dict[str, Any]) -> str:
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "union_tag_invalid":
        return f"of type {context['expected_tags']}"
    if kind == "too_short":
        return f"at least {context['min_length']} long"
    if kind == "too_long":
        return f"at most {context['max_length']} long"
    if kind == "union_tag_not_found":
        return "an object with a type"
    return _EXPECTED.get(kind.partition("_")[0], "")


def _path(problem: ErrorDetails, data: Any) -> tuple[int | str, ...]:
    """Where, without the names of union branches that pydantic mixes in: steps in `data`, or to what is missing."""
    loc = problem["loc"]
    path: list[int | str] = []
    for index, step in enumerate(loc):
        if (isinstance(data, dict) and step in data) or (
            isinstance(data, list | tuple) and isinstance(step, int) and step < len(data)
        ):
            path.append(step)
            data = data[step]  # type: ignore[index]  # a dict's key or a list's index, as just seen
        elif index == len(loc) - 1 and problem["type"] == "missing":
            path.append(step)
    return tuple(path)


def _spell(path: tuple[int | str, ...]) -> str:
    """('messages', 0, 'content') -> 'messages[0].content'"""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text[:200] or "body"
