"""SamplingParams: what cannot work is refused by name, whoever sends it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract import MAX_STOP_TOKEN_IDS, SamplingParams
from service.errors import InvalidRequest

FIELDS = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos", "stream")
NEVER: list[Any] = [float("nan"), float("inf"), -float("inf"), "5", "", [], {}, [[1]], -1, 10**400, -(10**400)]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", NEVER, ids=lambda value: repr(value)[:12])
def test_what_is_no_value_of_a_field_is_refused_by_its_name(field: str, value: Any) -> None:
    if field == "stop_token_ids" and value == []:
        pytest.skip("a list of none")
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.from_json(json.dumps({field: value}))
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1.5),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("max_tokens", None),
        ("temperature", True),
        ("temperature", 2.0000001),
        ("temperature", None),
        ("top_k", 0),
        ("top_k", 1.0),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.0000001),
        ("top_p", True),
        ("seed", 2**63),
        ("seed", 1.0),
        ("seed", True),
        ("stop_token_ids", 5),
        ("stop_token_ids", None),
        ("stop_token_ids", {"1": 2}),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", ["1"]),
        ("stop_token_ids", [None]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", list(range(MAX_STOP_TOKEN_IDS + 1))),
        ("ignore_eos", 1),
        ("ignore_eos", None),
        ("stream", "false"),
        ("stream", 0),
    ],
)
def test_types_and_bounds_are_exact(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.from_json(json.dumps({field: value}))
    assert caught.value.param == field


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "5",
        '"x"',
        '{"best_of": 2}',
        b"\xff\xfe",
        "[" * 4000,
        '{"a":' * 700,
        '{"max_tokens": 1' + "0" * 4000 + "}",
        "{" + " " * 5000 + "}",
        json.dumps({"stop_token_ids": list(range(10**6))}),
    ],
    ids=lambda text: repr(text)[:16],
)
def test_what_is_no_sampling_object_is_refused(text: str | bytes) -> None:
    with pytest.raises(InvalidRequest):
        SamplingParams.from_json(text)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=5e-324, top_p=5e-324, top_k=2**31 - 1, seed=2**63 - 1, max_tokens=2**31 - 1),
        SamplingParams(temperature=2, top_p=1, stop_token_ids=tuple(range(2**31 - MAX_STOP_TOKEN_IDS, 2**31))),
    ],
)
def test_what_is_legal_comes_back_from_its_json(sampling: SamplingParams) -> None:
    assert SamplingParams.from_json(sampling.to_json()) == sampling
    assert SamplingParams.from_json(sampling.to_json().encode()) == sampling


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), values, max_size=4))
def test_any_json_gives_usable_parameters_or_a_refusal(fields: dict[str, Any]) -> None:
    try:
        sampling = SamplingParams.from_json(json.dumps(fields))
    except InvalidRequest as error:
        assert error.param in (*FIELDS, "sampling")
    else:
        assert SamplingParams.from_json(sampling.to_json()) == sampling
