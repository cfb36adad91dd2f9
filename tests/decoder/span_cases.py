"""Random spans over pages, and what attention over them is by its formula in float64. No Triton, no GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

POISON = (float("nan"), float("inf"), float("-inf"))
LONG_EVERY, LONG = 8, 257  # every how many cases one row sees so many positions: more than 16 pieces of 16


@dataclass(frozen=True)
class Case:
    q: Tensor  # [N, H, C]
    k_pages: Tensor  # [pages, K, page size, C]
    v_pages: Tensor
    starts: Tensor  # int32 [S+1]
    table: Tensor  # int32 [S, W]
    used: Tensor  # int32 [S]
    causal: bool

    @property
    def kinds(self) -> set[str]:
        """What this case has of the things that a set of cases should have."""
        counts, used, page_size = self.starts.diff(), self.used, self.k_pages.shape[2]
        holds = {
            "causal": self.causal,
            "not causal": not self.causal,
            "an empty span": bool((counts == 0).any()),
            "a span of one row": bool((counts == 1).any()),
            "a span of many rows": bool((counts > 1).any()),
            "a row of many pieces": bool(((counts == 1) & (used >= LONG)).any()),
            "rows that see nothing beside rows that do": self.causal and bool(((used > 0) & (used < counts)).any()),
            "nothing used": bool(((used == 0) & (counts > 0)).any()),
            "used to the middle of a page": bool((used % page_size != 0).any()),
            "used to the end of a page": bool(((used % page_size == 0) & (used > 0)).any()),
            "a shared table": len({tuple(row) for row in self.table.tolist()}) < len(self.table),
            f"pages of {page_size}": True,
            f"{self.q.shape[1] // self.k_pages.shape[1]} query heads a KV head": True,
            f"heads of {self.q.shape[2]}": True,
        }
        return {kind for kind, held in holds.items() if held}

    def to(self, device: torch.device, dtype: torch.dtype) -> Case:
        q, k_pages, v_pages = (x.to(device, dtype) for x in (self.q, self.k_pages, self.v_pages))
        starts, table, used = (x.to(device) for x in (self.starts, self.table, self.used))
        return Case(q, k_pages, v_pages, starts, table, used, self.causal)

    def without_poison(self) -> Case:
        k_pages, v_pages = (x.nan_to_num(0.0, 0.0, 0.0) for x in (self.k_pages, self.v_pages))
        return replace(self, k_pages=k_pages, v_pages=v_pages)

    def span(self, index: int) -> Case:
        """One span of it, as a case of its own."""
        rows = slice(int(self.starts[index]), int(self.starts[index + 1]))
        starts = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        one = slice(index, index + 1)
        return replace(self, q=self.q[rows], starts=starts, table=self.table[one], used=self.used[one])


def random_case(seed: int) -> Case:
    """Small, of every kind; NaN and infinities in all that no span uses, pages and slots."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    def upto(most: int) -> int:
        return int(torch.randint(most + 1, (1,), generator=generator))

    page_size, group, num_kv_heads, head_width = (
        pick(16, 24, 64, 100),
        pick(1, 3, 4, 8),
        pick(1, 1, 2),
        pick(64, 80, 96, 128),
    )
    num_spans, causal, most_used = 1 + upto(2), bool(pick(0, 1)), pick(20, 40, 110)
    counts = [pick(0, 1, 1, 1, 2 + upto(6)) for _ in range(num_spans - 1)] + [pick(1, 1, 2 + upto(6))]
    used = [pick(0, upto(most_used), upto(most_used), page_size * (1 + upto(most_used // page_size))) for _ in counts]
    if seed % LONG_EVERY == 0:
        counts[-1], used[-1] = 1, LONG + upto(100)
    if causal:  # of many rows half have fewer positions than rows, so that the first see nothing
        used = [
            length and (upto(count - 1) if count > 1 and pick(0, 1) else max(length, count))
            for length, count in zip(used, counts, strict=True)
        ]
    width = max(1, *(-(-length // page_size) for length in used)) + pick(0, 1)
    num_pages = num_spans * width + 2
    table = torch.randperm(num_pages, generator=generator)[: num_spans * width].view(num_spans, width)
    if pick(0, 1) and num_spans > 1:
        table[1] = table[0]

    def pages() -> Tensor:
        values = torch.randn(num_pages, num_kv_heads, page_size, head_width, generator=generator)
        in_use = torch.zeros(num_pages, page_size, dtype=torch.bool)
        for row, length in zip(table, used, strict=True):
            flat = in_use[row].flatten()
            flat[:length] = True
            in_use[row] = flat.view(width, page_size)
        poison = torch.tensor(POISON)[torch.randint(len(POISON), in_use.shape, generator=generator)]
        return torch.where(in_use[:, None, :, None], values, poison[:, None, :, None])

    heads = group * num_kv_heads
    wide = torch.randn(sum(counts), heads + 2, head_width, generator=generator)
    return Case(
        q=wide[:, :heads],  # rows apart, as where q, k and v come out of one matrix
        k_pages=pages(),
        v_pages=pages(),
        starts=torch.tensor([0, *counts]).cumsum(0).int(),
        table=table.int(),
        used=torch.tensor(used).int(),
        causal=causal,
    )


def formula(case: Case) -> Tensor:
    """softmax(q kᵀ / sqrt(C)) v of each row over what it sees; 0 where that is nothing. float64 [N, H, C]."""
    group = case.q.shape[1] // case.k_pages.shape[1]
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    for index in range(len(case.used)):
        first, last, used = int(case.starts[index]), int(case.starts[index + 1]), int(case.used[index])
        pages = case.table[index].long()
        k, v = (x[pages].transpose(1, 2).flatten(0, 1).double() for x in (case.k_pages, case.v_pages))  # (n, K, C)
        for row in range(first, last):
            sees = max(0, used - (last - row) + 1) if case.causal else used
            for head in range(case.q.shape[1]):
                scores = k[:sees, head // group] @ case.q[row, head].double() * case.q.shape[2] ** -0.5
                out[row, head] = scores.softmax(0) @ v[:sees, head // group]
    return out
