"""Attention over pages against the formula in float64, where all that a span does not own is not a number."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.decoder.attention import Run, Scratch, Spans, attend
from service.decoder.upload import upload

CPU = torch.device("cpu")


def spans_of(runs: list[Run], causal: bool) -> Spans:
    return Spans.of(runs, iter(upload(Spans.numbers(runs), CPU)), Scratch(), causal=causal)


def formula(q: Tensor, k_pages: Tensor, v_pages: Tensor, runs: list[Run], causal: bool) -> Tensor:
    """softmax(q·k / sqrt(C))·v in float64, a row and a head at a time."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    per_kv_head, row = q.shape[1] // k_pages.shape[1], 0
    for num_rows, pages, used in runs:
        k, v = (x[pages].transpose(1, 2).flatten(0, 1).double() for x in (k_pages, v_pages))
        for number in range(num_rows):
            seen = used - (num_rows - 1 - number) if causal and used else used
            for head in range(q.shape[1]) if seen else ():
                scores = k[:seen, head // per_kv_head] @ q[row, head].double() / math.sqrt(q.shape[2])
                out[row, head] = scores.softmax(dim=0) @ v[:seen, head // per_kv_head]
            row += 1
    return out


@st.composite
def worlds(draw: st.DrawFn, causal: bool) -> tuple[Tensor, Tensor, Tensor, list[Run], Spans]:
    """Spans that own pages, alone or together; the pool holds NaN elsewhere, and 1e3 behind a span's last position."""
    page_size = draw(st.sampled_from([1, 3, 16]))
    num_kv_heads, per_kv_head, width = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 4])), 8
    num_spans = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.one_of(st.integers(1, 40), st.integers(90, 110)), min_size=1, max_size=num_spans))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_pages = 1 + sum(-(-length // page_size) for length in lengths) + 3
    k_pages, v_pages = torch.full((2, num_pages, num_kv_heads, page_size, width), torch.nan)
    free = torch.randperm(num_pages, generator=generator).tolist() if draw(st.booleans()) else list(range(num_pages))
    nobodys, owned = free.pop(), []
    for length in lengths:
        pages = [free.pop(0) for _ in range(-(-length // page_size))]
        for pool in (k_pages, v_pages):
            content = torch.randn(len(pages) * page_size, num_kv_heads, width, generator=generator)
            content[length:] = 1e3
            pool[pages] = content.unflatten(0, (len(pages), page_size)).transpose(1, 2)
        owned.append((pages, length))
    runs: list[Run] = []
    for _ in range(num_spans):
        pages, used = draw(st.sampled_from([*owned, ([], 0)]))
        runs.append((draw(st.integers(1, min(used, 5) if causal and used else 5)), pages, used))
    spans = spans_of([(num_rows, [*pages, nobodys], used) for num_rows, pages, used in runs], causal)
    q = torch.randn(sum(n for n, _, _ in runs), num_kv_heads * per_kv_head, width, generator=generator)
    return q, k_pages, v_pages, runs, spans


@settings(max_examples=150, deadline=None)
@given(st.booleans().flatmap(lambda causal: st.tuples(worlds(causal), st.just(causal))))
def test_it_is_the_formula_over_what_a_span_owns(
    world: tuple[tuple[Tensor, Tensor, Tensor, list[Run], Spans], bool],
) -> None:
    (q, k_pages, v_pages, runs, spans), causal = world
    expected = formula(q, k_pages, v_pages, runs, causal)
    for _ in range(2):  # the second time by the plan of the first
        got = attend(q, k_pages, v_pages, spans)
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_the_formula_in_narrow_dtypes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    k_pages, v_pages = torch.randn(2, 9, 2, 16, 8, generator=generator).to(dtype)
    q = torch.randn(9, 4, 8, generator=generator).to(dtype)
    runs = [(1, [0, 7], 20), (6, [3, 2, 1], 41), (1, [8, 4], 32), (1, [], 0)]
    got = attend(q, k_pages, v_pages, spans_of(runs, causal=True))
    assert got.dtype == dtype
    expected = formula(q, k_pages, v_pages, runs, True)
    torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=2e-2)


PAGE = torch.Size((1, 16, 8))  # of one head, so that a plan's indices are pages


def groups_of(runs: list[Run], causal: bool, page: torch.Size = PAGE) -> list[tuple[int, int, int]]:
    """(sets, heads' parts of pages gathered, rows) of each group of a plan."""
    plan = spans_of(runs, causal).plan(page, torch.float32)
    gathered = [len(torch.arange(10**6)[group.pages]) for group in plan.groups]
    sets = [group.num_sets for group in plan.groups]
    return list(zip(sets, gathered, [group.num_rows for group in plan.groups], strict=True))


def test_sixteen_decodes_at_one_hot_picture_gather_it_once() -> None:
    assert groups_of([(1, [5], 16)] * 16, causal=False) == [(1, 1, 16)]


def test_decodes_at_pictures_of_their_own_are_one_call() -> None:
    assert groups_of([(1, [page], 16) for page in range(16)], causal=False) == [(16, 16, 16)]


def test_what_sees_nothing_takes_no_part() -> None:
    assert groups_of([(40, [], 0), (1, [3, 4], 32), (7, [], 0)], causal=False) == [(1, 2, 1)]
    spans = spans_of([(2, [], 0), (1, [], 0)], causal=False)
    pages = torch.full((1, 2, 16, 4), torch.nan)
    assert attend(torch.ones(3, 2, 4), pages, pages, spans).count_nonzero() == 0


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=20))
def test_a_long_sequence_does_not_stretch_short_ones(lengths: list[int]) -> None:
    runs = [(1, list(range(-(-length // 16))), length) for length in lengths]
    spans = spans_of(runs, causal=True)
    plan = spans.plan(PAGE, torch.float32)
    order = list(range(len(lengths))) if plan.order is None else plan.order.tolist()
    assert sorted(order) == list(range(len(lengths)))
    for group in plan.groups:
        of_group, order = [lengths[row] for row in order[: group.num_rows]], order[group.num_rows :]
        assert group.used == max(of_group)
        assert all(-(-group.used // 16) <= 2 * -(-length // 16) for length in of_group)


def test_what_one_call_gathers_on_a_cpu_stays_in_its_cache() -> None:
    page = torch.Size((4, 16, 64))
    runs = [(1, list(range(100 * number, 100 * number + 100)), 1590) for number in range(6)]
    assert groups_of(runs, True, page) == [(2, 800, 2)] * 3
    assert groups_of([(1, list(range(1000)), 16000)] * 2, True, page) == [(1, 4000, 1)] * 2


def test_a_step_is_planned_once() -> None:
    spans = spans_of([(1, [0], 3), (4, [1, 2], 30)], causal=True)
    assert spans.plan(PAGE, torch.float32) is spans.plan(PAGE, torch.float32)


def test_the_same_spans_over_one_pool_after_another_see_what_each_holds() -> None:
    """Pages that begin and end as a row does; the first page is nobody's; unlike lengths in one call."""
    runs = [(1, [2, 4, 3, 5], 9), (1, [2, 4, 3, 5], 8), (1, [1, 6], 5)]
    generator = torch.Generator().manual_seed(0)
    for causal in (True, False):
        spans = spans_of([(num_rows, [*pages, 0], used) for num_rows, pages, used in runs], causal)
        for page_size, dtype in ((3, torch.float32), (3, torch.float32), (5, torch.float32), (3, torch.bfloat16)):
            k_pages, v_pages = torch.randn(2, 7, 2, page_size, 8, generator=generator).to(dtype)
            k_pages[0], v_pages[0] = torch.nan, torch.nan
            q = torch.randn(3, 4, 8, generator=generator).to(dtype)
            got, expected = attend(q, k_pages, v_pages, spans), formula(q, k_pages, v_pages, runs, causal)
            tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_a_table_of_any_pages_in_any_order_is_read_as_it_stands() -> None:
    """One page a row: [0, 2, 2, 3] begins and ends as four in a row do, and is none."""
    generator = torch.Generator().manual_seed(0)
    k_pages, v_pages = torch.randn(2, 4, 1, 1, 8, generator=generator)
    q = torch.randn(4, 1, 8, generator=generator)
    for pages in product(range(4), repeat=4):
        runs = [(1, [page], 1) for page in pages]
        got = attend(q, k_pages, v_pages, spans_of(runs, causal=True))
        expected = formula(q, k_pages, v_pages, runs, True)
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5, msg=str(pages))
