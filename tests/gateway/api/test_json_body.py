"""JSON apart from its pictures is small, whatever is sent; and it is what it was, pictures put back."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidRequest, TooLarge
from service.gateway.api.json_body import JsonLimits, load_json
from tests.gateway.picture_files import RED

LIMITS = JsonLimits(max_bytes=1 << 20, max_pictures=16, max_picture_bytes=64 << 20)
MIB = 1 << 20
TEXTS = st.text(alphabet='a{[",:\\/é', max_size=8) | st.sampled_from(
    [RED, RED + "\\", "data:;base64,", 'data:"', RED + '"']
)
VALUES = st.recursive(
    TEXTS | st.integers() | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.sampled_from(["url", "images"]), inner),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(TEXTS | st.sampled_from(["url", "images"]), VALUES, max_size=4), st.booleans(), st.booleans())
def test_setting_pictures_aside_changes_nothing(data: dict, ascii_only: bool, escape_slashes: bool) -> None:
    text = json.dumps(data, ensure_ascii=ascii_only)
    if escape_slashes:  # as PHP does
        text = text.replace("/", "\\/")
    assert load_json(bytearray(text.encode()), LIMITS) == data


def test_what_is_no_picture_is_bounded_by_its_bytes_whatever_it_calls_itself() -> None:
    limits = JsonLimits(max_bytes=1000, max_pictures=2, max_picture_bytes=64 << 20)
    picture = "data:image/png;base64," + "A" * 5000
    assert load_json(json.dumps({"images": [picture, picture]}).encode(), limits) == {"images": [picture, picture]}
    for data in (
        {"prompt": "A" * 1001},
        {"prompt": picture},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": picture}]}]},
        {"metadata": {picture: 1}},
        {"images": [picture] * 3},
        {"images": [picture + '"']},
        {"images": [picture + "\n"]},
        {"images": ["data:image/png," + "A" * 1001]},
        {"images": ["A" * 5000]},
        {"images": [picture], "prompt": "A" * 1001},
    ):
        with pytest.raises(TooLarge):
            load_json(json.dumps(data).encode(), limits)


def test_lists_and_objects_are_counted_but_not_what_strings_hold() -> None:
    code = "{[" * 100_000
    quoted = '\\"{["' * 50_000
    assert load_json(json.dumps({"prompt": code, "stop": quoted}).encode(), LIMITS) == {"prompt": code, "stop": quoted}
    for body in (b'{"a":[' + b"[]," * 40_000 + b"1]}", b'{"a":' + b'["a",{"b":1}],' * 30_000 + b"1}"):
        with pytest.raises(InvalidRequest):
            load_json(body, LIMITS)


HOSTILE = {
    "ones": b'{"a":[' + b"1," * (MIB // 2 - 10) + b"1]}",
    "lists": b'{"a":[' + b"[]," * (MIB // 3 - 10) + b"1]}",
    "deep lists": b'{"a":[' + (b"[" * 190 + b"]" * 190 + b",") * 80 + b"1]}",
    "brackets": b"[" * (MIB - 1),
    "objects in objects": b'{"a":' * (MIB // 5),
    "one key again and again": b"{" + b'"a":1,' * (MIB // 6 - 10) + b'"b":1}',
    "many keys": b"{" + b",".join(b'"%x":1' % index for index in range(MIB // 12)) + b"}",
    "quotes": b'"' * (MIB - 1),
    "escaped quotes": b'{"a":"' + b'\\"' * (MIB // 2 - 10) + b'"}',
    "a long number": b'{"a":' + b"1" * (MIB - 10) + b"}",
    "long numbers": b'{"a":[' + (b"1" * 4000 + b",") * 260 + b"1]}",
    "exponents": b'{"a":[' + b"1e-308," * (MIB // 7 - 10) + b"1]}",
    "an exponent": b'{"a":1e' + b"9" * (MIB - 10) + b"}",
    "half pictures": b'{"a":[' + b'"data:","data:;base64,' * (MIB // 23) + b"]}",
    "escaped slashes": b'{"images":["data:image/png;base64,' + b"\\/" * (30 * MIB) + b'"]}',
    "escapes": b'{"images":["data:image/png;base64,' + b"\\u0041" * (10 * MIB) + b'"]}',
    "heads without end": b'"data:' * (10 * MIB),
    "open strings": b'"data:;base64,\\' * (4 * MIB),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_time_for_a_body_is_that_of_reading_it(name: str) -> None:
    """A generous bound: a second for 60 MiB; what was quadratic took minutes."""
    start = time.process_time()
    with contextlib.suppress(InvalidRequest):
        load_json(HOSTILE[name], LIMITS)
    assert time.process_time() - start < 1.5


@pytest.mark.parametrize("base64", [b"A", b"\\/"], ids=["plain", "escaped"])
def test_of_a_picture_past_its_limit_no_more_is_copied_than_shows_it(base64: bytes) -> None:
    limits = JsonLimits(max_bytes=1000, max_pictures=2, max_picture_bytes=3 * MIB)
    body = bytearray(b'{"images":["data:image/png;base64,' + base64 * (30 * MIB) + b'"]}')
    tracemalloc.start()
    try:
        (url,) = load_json(body, limits)["images"]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 4 * MIB < len(url) < 5 * MIB and peak_bytes < 20 * MIB
