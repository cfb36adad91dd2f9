"""The kernel against the formula in float64, in Triton's interpreter; and compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

NUM_CASES = 200
KINDS = {
    "causal",
    "not causal",
    "an empty span",
    "a span of one row",
    "a span of many rows",
    "a row of many pieces",
    "rows that see nothing beside rows that do",
    "nothing used",
    "used to the middle of a page",
    "used to the end of a page",
    "a shared table",
    *(f"pages of {size}" for size in (16, 24, 64, 100)),
    *(f"{group} query heads a KV head" for group in (1, 3, 4, 8)),
    *(f"heads of {width}" for width in (64, 80, 96, 128)),
}


def run_module(*arguments: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-m", *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    lines = run_module("tests.decoder.interpreted_kernel", str(NUM_CASES), TRITON_INTERPRET="1").splitlines()
    assert len(lines) == NUM_CASES
    return [json.loads(line) for line in lines]


def test_random_spans_equal_the_formula(reports: list[dict[str, Any]]) -> None:
    wrong = [report for report in reports if not report["error"] <= 1e-5]  # NaN is wrong, too
    assert not wrong


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_of_span_is_among_them(reports: list[dict[str, Any]], kind: str) -> None:
    assert sum(kind in report["kinds"] for report in reports) >= 5


def test_rows_that_see_nothing_get_exactly_zero(reports: list[dict[str, Any]]) -> None:
    assert all(report["unseen_is_zero"] for report in reports)


def test_a_span_gets_the_same_bits_alone_and_beside_others(reports: list[dict[str, Any]]) -> None:
    assert {report["alone_is_same"] for report in reports if "alone_is_same" in report} == {True}


def test_what_no_span_uses_does_not_change_a_bit(reports: list[dict[str, Any]]) -> None:
    """NaN and infinities there are in every case; here they are compared with zeros."""
    assert {report["clean_is_same"] for report in reports if "clean_is_same" in report} == {True}


def test_a_last_axis_with_gaps_is_refused_and_no_rows_are_no_work() -> None:
    from service.decoder.attention_kernel import attend

    q, pages, ints = torch.zeros(1, 2, 64), torch.zeros(3, 16, 2, 64), torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="contiguous"):
        attend(q, pages, pages.transpose(2, 3).contiguous().transpose(2, 3), ints[0], ints, ints[0], False)
    assert attend(q[:0], pages, pages, ints[:, 0], ints[:1], ints[0], False).shape == (0, 2, 64)


def test_it_compiles_without_spills_for_each_gpu_and_model() -> None:
    rows = json.loads(run_module("tests.decoder.kernel_resources", "--json", TRITON_INTERPRET="0"))
    assert {row["gpu"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert not [row for row in rows if row["spilled"] or row["stack"]]
    assert all(row["blocks"] >= 1 for row in rows)
