"""The knee of a curve, and bytes that are measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loadtest.bench.growth import ANSWER, Bytes, Point, bytes_table, knee, measured_bytes, tensor_bytes
from service.capacity import BLOCK_SIZE, plan
from service.families import load_family


def points(*rates: float) -> list[Point]:
    """Each of one user whose answer takes as long as its rate says."""
    return [Point(2**index, 1, 0.0, 1e3 * ANSWER / (ANSWER - 1) / rate, 0.0, 0) for index, rate in enumerate(rates)]


def test_the_knee_is_where_more_brings_little_or_costs_much() -> None:
    assert knee(points(10, 20, 40, 75, 80, 82)) == 8
    assert knee(points(100, 95, 81, 60, 20)) == 4
    assert knee(points(10, 20, 40)) == 4


def test_what_a_process_holds_in_tensors_is_counted_once() -> None:
    before = tensor_bytes()
    tensor = torch.zeros(1000, dtype=torch.float32)
    view = tensor[10:].view(9, 110)
    assert tensor_bytes() - before == 4000
    del tensor, view
    assert tensor_bytes() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_predicted_bytes_are_those_of_the_pools(checkpoint: Path, dtype: str) -> None:
    measured = measured_bytes(checkpoint, dtype)
    capacity = plan(load_family(checkpoint).decoder, dtype, memory_bytes=0)
    assert measured.block == pytest.approx(capacity.token_bytes * BLOCK_SIZE, rel=0.05)
    assert measured.picture == pytest.approx(capacity.page_bytes, rel=0.05)


def test_a_prediction_that_is_off_is_not_met() -> None:
    table = bytes_table(Bytes(100.0, 100.0), Bytes(102.0, 110.0))
    assert table.splitlines()[2].endswith("| 0.02 (≤ 0.05: met) |")
    assert table.splitlines()[3].endswith("| 0.09 (≤ 0.05: **not met**) |")
