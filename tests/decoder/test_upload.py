"""Many lists of numbers, one copy."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.decoder.upload import ALIGNMENT, DTYPES, upload
from tests.decoder.launches import Launches

BITS = {"q": 64, "i": 32}


def numbers(code: str) -> st.SearchStrategy[array[int]]:
    number = st.booleans() if code == "B" else st.integers(-(2 ** (BITS[code] - 1)), 2 ** (BITS[code] - 1) - 1)
    return st.lists(number, max_size=9).map(lambda each: array(code, each))


PARTS = st.lists(st.sampled_from(sorted(DTYPES)).flatmap(numbers), min_size=1, max_size=6)


@given(PARTS)
def test_every_part_arrives_in_its_dtype_where_a_kernel_wants_it(parts: list[array[int]]) -> None:
    tensors = upload(parts, torch.device("cpu"))
    assert [tensor.tolist() for tensor in tensors] == [part.tolist() for part in parts]
    assert [tensor.dtype for tensor in tensors] == [DTYPES[part.typecode] for part in parts]
    assert all(tensor.storage_offset() * tensor.itemsize % ALIGNMENT == 0 for tensor in tensors)


@settings(deadline=None)  # the first call imports what meta tensors need
@given(PARTS)
def test_all_parts_are_one_copy(parts: list[array[int]]) -> None:
    with Launches("meta") as launches:
        tensors = upload(parts, torch.device("meta"))
    assert launches.uploads == 1
    assert [tensor.shape for tensor in tensors] == [(len(part),) for part in parts]


@pytest.mark.gpu
def test_nobody_waits_for_the_copy_to_a_gpu() -> None:
    parts = [array("q", [-1, 2**40]), array("i", [7, -8, 9]), array("B", [1, 0])]
    torch.cuda.set_sync_debug_mode("error")
    try:
        tensors = upload(parts, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [tensor.tolist() for tensor in tensors] == [part.tolist() for part in parts]
