"""Errors across Triton's border, and what is not an error of ours."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import (
    ALL_ERRORS,
    CrossgateError,
    ImageNotResident,
    Internal,
    InvalidRequest,
    Overloaded,
    from_triton,
)

MARK = "crossgate-error:"
TEXT = st.text(max_size=50) | st.just(f'{MARK}{{"code": "internal", "message": "fake"}}')
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)


@given(
    kind=st.sampled_from(ALL_ERRORS),
    message=TEXT,
    param=st.none() | TEXT,
    retry_after_s=st.none() | st.integers(0, 1000),
    keys=st.lists(TEXT).map(tuple),
    around=st.tuples(
        st.sampled_from(["", "in ensemble 'x': ", "[request id: 5] "]), st.sampled_from(["", " at step 3"])
    ),
)
def test_every_error_crosses_the_border_whole(kind, message, param, retry_after_s, keys, around) -> None:
    if kind is ImageNotResident:
        error: CrossgateError = kind(message, keys=keys, param=param)
    else:
        error = kind(message, param=param, retry_after_s=retry_after_s)
    back = from_triton(around[0] + error.to_triton() + around[1])
    assert type(back) is kind
    assert vars(back) == vars(error)


@given(text=st.text(), content=JSON, cut=st.integers(0, 200))
def test_whatever_stands_behind_the_mark_is_an_error_or_nothing(text, content, cut) -> None:
    said = json.dumps(content)
    for message in (text, MARK + text, MARK + said, MARK + said[:cut], f"{text}{MARK}{said}{text}"):
        assert isinstance(from_triton(message), CrossgateError | None)


@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "code": JSON | st.sampled_from([kind.code for kind in ALL_ERRORS]),
            "message": JSON | TEXT,
            "param": JSON,
            "retry_after_s": JSON,
            "keys": JSON,
            "more": JSON,
        },
    )
)
def test_missing_and_wrong_fields_never_raise(fields) -> None:
    error = from_triton(MARK + json.dumps(fields))
    if error is not None:
        assert isinstance(error.message, str) and isinstance(error.param, str | None)
        assert type(error.retry_after_s) in (int, type(None))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"code":' + "9" * 10_000 + "}", "{", "", "\0", "NaN", '"overloaded"'])
def test_broken_text_behind_the_mark_is_nothing(text: str) -> None:
    assert from_triton(MARK + text) is None


def test_an_error_of_a_newer_stage_is_an_internal_one_without_its_text() -> None:
    error = from_triton(MARK + '{"code": "quota", "message": "secret"}')
    assert type(error) is Internal and "secret" not in error.message


def test_a_mark_in_a_client_s_text_does_not_become_an_error_of_its_own() -> None:
    fake = Overloaded("go away", retry_after_s=99).to_triton()
    back = from_triton(InvalidRequest(f"no model {fake}", param=fake).to_triton())
    assert type(back) is InvalidRequest and back.retry_after_s is None
