"""One attention for everything: spans of query rows over lists of pages.

A chunk of text is a causal span over its sequence's blocks, a run of tokens with one sight a span over pictures' pages;
a decode row is a span of one. The PyTorch version: reference, CPU, and any GPU. What depends on a step alone (which
spans share a gather or a call, indices, masks) is a `Plan`, made once and used by every layer.
Source: PagedAttention (arXiv 2309.06180) §4; GQA (arXiv 2305.13245); Flamingo (arXiv 2204.14198) §2.2.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from service.decoder.upload import upload

CACHED_NUMBERS = 1 << 20  # of K, and as many of V, that one call gathers on a CPU: they are read again at once
Run = tuple[int, Sequence[int], int]  # number of rows, pages, used


@dataclass(frozen=True, eq=False)
class Spans:
    """Rows [starts[s], starts[s+1]) of a step see the first `used[s]` positions of the pages `table[s]`.

    Every row belongs to one span. Causal: the last row of a span sees `used` positions, each row before it one less.
    `used` 0: the rows see nothing, and come to 0. A table's entries behind the used pages have no meaning.
    """

    runs: Sequence[Run]  # the spans in the order of their rows, on the host: planning asks nothing of the device
    starts: Tensor  # int32 [S+1], from 0 to N
    table: Tensor  # int32 [S, W]
    used: Tensor  # int32 [S]
    causal: bool
    scratch: Scratch
    _plans: dict[tuple[torch.Size, torch.dtype], Plan] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def numbers(runs: Sequence[Run]) -> tuple[array[int], array[int], array[int]]:
        """What `of` wants on the device: `starts`, the rows of `table`, `used`."""
        width = max(1, *(len(pages) for _, pages, _ in runs))
        starts = accumulate((num_rows for num_rows, _, _ in runs), initial=0)
        table = [page for _, pages, _ in runs for page in (*pages, *[0] * (width - len(pages)))]
        return array("i", starts), array("i", table), array("i", [used for _, _, used in runs])

    @classmethod
    def of(cls, runs: Sequence[Run], tensors: Iterator[Tensor], scratch: Scratch, *, causal: bool) -> Spans:
        """`tensors`: the next three are the runs' `numbers`, on the device."""
        starts, table, used = next(tensors), next(tensors), next(tensors)
        return cls(runs, starts, table.view(len(runs), -1), used, causal, scratch)

    def plan(self, page: torch.Size, dtype: torch.dtype) -> Plan:
        """How `attend` computes them over pages [K, page size, C], in every layer: made when it is first asked for."""
        if (page, dtype) not in self._plans:
            self._plans[page, dtype] = _make_plan(self, page, dtype)
        return self._plans[page, dtype]


def attend(q: Tensor, k_pages: Tensor, v_pages: Tensor, spans: Spans) -> Tensor:
    """q [N, H, C], one layer's k_pages and v_pages [pages, K, page size, C] -> [N, H, C].

    What a mask hides is the span's own: padding repeats its last page, and a NaN would go through a mask as 0 times
    itself. No K or V is copied for query heads that share a KV head.
    """
    plan = spans.plan(k_pages.shape[1:], q.dtype)
    if not plan.groups:
        return torch.zeros_like(q)
    rows = q if plan.order is None else q.index_select(0, plan.order)
    parts = zip(rows.split([group.num_rows for group in plan.groups]), plan.groups, strict=True)
    outs = [_attend_group(of_group, k_pages, v_pages, group) for of_group, group in parts]
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out if plan.order is None else torch.zeros_like(q).index_copy_(0, plan.order, out)


@dataclass(frozen=True)
class Group:
    """G sets of n rows that one call computes, each set over pages of its own."""

    num_sets: int
    num_rows: int  # G * n
    pages: Tensor | slice  # int64 [G * K * pages], one head's part of a page each; a slice where pages need no gather
    used: int  # the most that a set uses
    mask: Tensor | None  # [G, 1, n or 1, used], added to scores: 0 where a row sees, -inf where not
    is_causal: bool  # in place of a mask where sets start their sequences
    dtype: torch.dtype  # in which it is computed
    scratch: Scratch

    def gather(self, k_or_v: str, pages: Tensor) -> Tensor:
        """One layer's pages [P, K, page size, C] as [G, K, used, C], valid until the next are gathered."""
        if isinstance(self.pages, slice):
            gathered = pages[self.pages]
        else:
            place = self.scratch.take(k_or_v, (len(self.pages), *pages.shape[2:]), pages)
            gathered = torch.index_select(pages.flatten(0, 1), 0, self.pages, out=place)
        if self.dtype != pages.dtype:
            gathered = self.scratch.take(k_or_v, gathered.shape, pages, self.dtype).copy_(gathered)
        return gathered.view(self.num_sets, pages.shape[1], -1, pages.shape[3])[:, :, : self.used]


class Scratch:
    """Memory that all groups use, in all layers and steps: fresh from the system it takes longer than the copy, and
    what is read again at once should still be in a cache. It grows to the most that was taken.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Iterable[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape on the device of `like`, of its dtype if none is given, with any content."""
        shape, dtype = tuple(shape), dtype or like.dtype
        size, buffer = math.prod(shape), self._buffers.get((name, dtype))
        if buffer is None or len(buffer) < size:
            with torch.inference_mode(False):  # or it could be written in that mode alone
                buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=like.device)
        return buffer[:size].view(shape)


@dataclass(frozen=True)
class Plan:
    groups: list[Group]
    order: Tensor | None  # int64, the groups' rows one after the other; None: all rows of the step as they stand


def _attend_group(q: Tensor, k_pages: Tensor, v_pages: Tensor, group: Group) -> Tensor:
    """[G * n, H, C] -> [G * n, H, C]."""
    num_kv_heads = k_pages.shape[1]
    k, v = group.gather("k", k_pages), group.gather("v", v_pages)  # (G, K, used, C)
    if group.num_rows == group.num_sets:  # heads that share a KV head are its queries
        heads = q.unflatten(1, (num_kv_heads, -1)).to(group.dtype)  # (G, K, H/K, C)
        return F.scaled_dot_product_attention(heads, k, v, group.mask).to(q.dtype).reshape(q.shape)
    heads = q.unflatten(0, (group.num_sets, -1)).transpose(1, 2)  # (G, H, n, C)
    shared = q.shape[1] != num_kv_heads
    out = F.scaled_dot_product_attention(heads, k, v, group.mask, is_causal=group.is_causal, enable_gqa=shared)
    return out.transpose(1, 2).reshape(q.shape)


class _Set(NamedTuple):
    rows: list[int]
    pages: list[int]
    used: int


def _make_plan(spans: Spans, page: torch.Size, dtype: torch.dtype) -> Plan:
    device, num_rows = spans.used.device, sum(num_rows for num_rows, _, _ in spans.runs)
    max_pages = max(1, CACHED_NUMBERS // page.numel()) if device.type == "cpu" else None
    groups = _of_like_length(_sets(spans, page[1]), max_pages)
    order = [row for sets in groups for each in sets for row in each.rows]
    return Plan(
        groups=[_make_group(sets, spans, page[0], dtype) for sets in groups],
        order=None if order == list(range(num_rows)) else _indices(order, device),
    )


def _sets(spans: Spans, page_size: int) -> list[_Set]:
    """One for each span, or for all that see the same: sixteen questions about one picture gather it once."""
    sets: dict[tuple[int, ...], _Set] = {}
    end = 0
    for num_rows, of_run, used in spans.runs:
        start, end = end, end + num_rows
        if used > 0 and num_rows > 0:
            pages = list(of_run[: -(-used // page_size)])
            key = (start,) if spans.causal else (used, *pages)
            sets.setdefault(key, _Set([], pages, used)).rows.extend(range(start, end))
    return list(sets.values())


def _of_like_length(sets: list[_Set], max_pages: int | None) -> list[list[_Set]]:
    """Groups of as many rows, none padded to more than twice its pages: a long sequence does not stretch short ones.

    `max_pages`: of a group of several sets.
    """
    groups: list[list[_Set]] = []
    for each in sorted(sets, key=lambda each: (len(each.rows), len(each.pages)), reverse=True):
        group = groups[-1] if groups else []
        has_room = max_pages is None or (len(group) + 1) * len(group[0].pages if group else ()) <= max_pages
        alike = group and len(group[0].rows) == len(each.rows) and 2 * len(each.pages) >= len(group[0].pages)
        if alike and has_room:
            group.append(each)
        else:
            groups.append([each])
    return sorted((sorted(group) for group in groups), key=lambda group: group[0].rows)


def _make_group(sets: list[_Set], spans: Spans, num_kv_heads: int, dtype: torch.dtype) -> Group:
    causal, device = spans.causal, spans.used.device
    width, used, n = max(len(each.pages) for each in sets), max(each.used for each in sets), len(sets[0].rows)
    if n == 1 and device.type == "cpu":
        dtype = torch.float32  # PyTorch's attention of one row takes twice as long in bfloat16
    is_causal, mask = causal and all(each.used == n for each in sets), None
    if not is_causal and (any(each.used < used for each in sets) or (causal and n > 1)):
        limits = [range(each.used - n + 1, each.used + 1) if causal else [each.used] for each in sets]
        unseen = torch.arange(used, device=device) >= _indices(chain(*limits), device).view(len(sets), 1, -1, 1)
        mask = torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill_(unseen, -torch.inf)
    first = sets[0].pages[0]
    if [each.pages for each in sets] == [[first + number] for number in range(len(sets))]:
        pages: Tensor | slice = slice(first, first + len(sets))
    else:
        tables = [each.pages + each.pages[-1:] * (width - len(each.pages)) for each in sets]
        heads = range(num_kv_heads)
        pages = _indices((page * num_kv_heads + head for table in tables for head in heads for page in table), device)
    return Group(len(sets), len(sets) * n, pages, used, mask, is_causal, dtype, spans.scratch)


def _indices(numbers: Iterable[int], device: torch.device) -> Tensor:
    (indices,) = upload([array("q", numbers)], device)
    return indices
