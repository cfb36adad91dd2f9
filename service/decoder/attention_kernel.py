"""Attention over pages on a GPU, in the Triton language: one kernel for self-attention and for pictures.

A span is a run of query rows with one list of pages. A program takes one tile of a span's rows for one KV head, the
query heads that share it as further rows, and walks the span's pages with an online softmax in fp32. A span of one row
over many positions is cut into pieces of a fixed length that a second kernel merges: what a row gets depends on no
other span. No load reaches past what a span uses, so that a NaN left there by another owner stays there.
Source: FlashAttention-2 (arXiv 2307.08691) §3, Flash-Decoding (Dao et al. 2023), PagedAttention (arXiv 2309.06180) §4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """How the work is cut. All but the warps and stages are powers of two of at least 16, `split` of `positions`."""

    rows: int  # (row, query head) pairs a program
    positions: int  # of K and V an iteration of its loop
    split: int  # positions a program of a span of one row, at most
    num_warps: int
    num_stages: int  # of its loop. Looking pages up takes two; with 5 two iterations' K and V are there at once


def tiles_for(q: Tensor, num_spans: int) -> Tiles:
    """By dtype and shape alone: nothing is asked of the device. `num_spans` as many as rows: every span has one."""
    if q.dtype == torch.float32:  # without tensor cores; what parity tests use
        return Tiles(rows=16, positions=16, split=256, num_warps=4, num_stages=5)
    if q.shape[0] <= num_spans:
        return Tiles(rows=16, positions=64, split=256, num_warps=4, num_stages=5)
    return Tiles(rows=64, positions=32, split=256, num_warps=4, num_stages=3)


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    starts: Tensor,
    table: Tensor,
    used: Tensor,
    causal: bool,
    tiles: Tiles | None = None,
) -> Tensor:
    """q [N, H, C], k_pages and v_pages [pages, K, page size, C] -> [N, H, C].

    Rows starts[s]..starts[s+1] see the first used[s] positions of the pages table[s]; if `causal` they are the last of
    these positions, and each sees none behind its own. A row that sees nothing gets 0.
    starts int32 [S+1], from 0 to N; table int32 [S, W]; used int32 [S]. One dtype for q, K and V.
    Raises ValueError if a last axis is not contiguous; the others may have any stride.
    """
    if not q.stride(2) == k_pages.stride(3) == v_pages.stride(3) == table.stride(1) == 1:
        raise ValueError("the last axes of q, pages and table have to be contiguous")
    num_rows, num_heads, head_width = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    num_spans, table_width = table.shape
    if num_rows == 0 or table_width == 0:
        return q.new_zeros(q.shape)
    tiles = tiles_for(q, num_spans) if tiles is None else tiles
    group = num_heads // num_kv_heads
    num_splits = triton.cdiv(table_width * page_size, tiles.split)
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    # of spans of one row, before they are merged
    num_parts = num_spans * num_splits * num_heads if num_splits > 1 else 0
    part_out = torch.empty((num_parts, head_width), device=q.device, dtype=torch.float32)
    part_max = torch.empty(num_parts, device=q.device, dtype=torch.float32)
    part_sum = torch.empty(num_parts, device=q.device, dtype=torch.float32)
    head_block = triton.next_power_of_2(head_width)
    # Every span has its full tiles and at most one more.
    grid = (num_kv_heads, num_rows * group // tiles.rows + num_spans, num_splits)
    with torch.cuda.device_of(q):
        attend_tile[grid](
            q, k_pages, v_pages, starts, table, used, out, part_out, part_max, part_sum,
            num_spans, LOG2_E * head_width**-0.5, *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
            table.stride(0), head_width, head_block, group, page_size, causal, span_block(num_spans), num_splits > 1,
            tiles.rows, tiles.positions, tiles.split, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        if num_splits > 1:
            merge_splits[num_heads, num_spans](
                part_out, part_max, part_sum, starts, used, out, num_splits, head_width, head_block, tiles.split,
                num_warps=4,
            )  # fmt: skip
    return out


def span_block(num_spans: int) -> int:
    """How many starts a program looks at: few values, for each is another compilation."""
    return max(256, int(triton.next_power_of_2(num_spans)))


@triton.jit(do_not_specialize=["num_spans", "table_row"])
def attend_tile(
    q: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    starts: tl.tensor,
    table: tl.tensor,
    used: tl.tensor,
    out: tl.tensor,
    part_out: tl.tensor,
    part_max: tl.tensor,
    part_sum: tl.tensor,
    num_spans: tl.tensor,
    scale: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_page: tl.tensor,
    k_head: tl.tensor,
    k_slot: tl.tensor,
    v_page: tl.tensor,
    v_head: tl.tensor,
    v_slot: tl.tensor,
    table_row: tl.tensor,
    HEAD_WIDTH: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPAN_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """One tile of a span's (row, query head) pairs, one KV head, one piece of the span's positions."""
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    num_heads = tl.num_programs(0) * GROUP

    spans = tl.arange(0, SPAN_BLOCK)
    first_tiles = tl.load(starts + spans, mask=spans < num_spans, other=0) * GROUP // ROWS + spans
    span = tl.sum(((spans < num_spans) & (first_tiles <= tile)).to(tl.int32), 0) - 1
    start = tl.load(starts + span)
    num_rows = tl.load(starts + span + 1) - start
    num_used = tl.load(used + span)
    first_pair = (tile - start * GROUP // ROWS - span) * ROWS
    nothing_here = (num_rows > 1) | (split * SPLIT >= num_used)
    if (first_pair >= num_rows * GROUP) | ((split > 0) & nothing_here):
        return

    pair = first_pair + tl.arange(0, ROWS)
    in_span = pair < num_rows * GROUP
    row = pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    channel = tl.arange(0, HEAD_BLOCK)
    in_head = channel < HEAD_WIDTH
    row_mask = in_span[:, None] & in_head[None, :]
    q_offset = (start + row).to(tl.int64) * q_row + head * q_head
    queries = tl.load(q + q_offset[:, None] + channel[None, :], mask=row_mask, other=0.0)  # (ROWS, HEAD_BLOCK)

    begin = 0
    end = num_used
    sees = tl.full([ROWS], 0, tl.int32) + num_used
    if CAUSAL:
        sees = num_used - num_rows + row + 1
        last_pair = tl.minimum(first_pair + ROWS, num_rows * GROUP) - 1
        end = num_used - num_rows + last_pair // GROUP + 1
    if SPLITS:
        begin = split * SPLIT
        end = tl.where(num_rows > 1, end, tl.minimum(end, begin + SPLIT))

    pages = table + span * table_row
    k_pages += kv_head * k_head
    v_pages += kv_head * v_head
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    attended = tl.full([ROWS, HEAD_BLOCK], 0.0, tl.float32)
    for tile_begin in tl.range(begin, end, POSITIONS):
        position = tile_begin + tl.arange(0, POSITIONS)
        in_use = position < end
        kv_mask = in_use[:, None] & in_head[None, :]
        page = tl.load(pages + position // PAGE_SIZE, mask=in_use, other=0).to(tl.int64)
        slot = position % PAGE_SIZE
        k_offset = page * k_page + slot * k_slot
        v_offset = page * v_page + slot * v_slot
        k = tl.load(k_pages + k_offset[:, None] + channel[None, :], mask=kv_mask, other=0.0)
        v = tl.load(v_pages + v_offset[:, None] + channel[None, :], mask=kv_mask, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale  # (ROWS, POSITIONS), to base 2
        scores = tl.where(position[None, :] < sees[:, None], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # a row that sees nothing yet
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(largest - shift)
        total = total * rescale + tl.sum(weights, 1)
        attended = tl.dot(weights.to(v.dtype), v, attended * rescale[:, None], input_precision="ieee")
        largest = larger

    if SPLITS and num_rows == 1:
        part = (span.to(tl.int64) * tl.num_programs(2) + split) * num_heads + head
        tl.store(part_out + part[:, None] * HEAD_WIDTH + channel[None, :], attended, mask=row_mask)
        tl.store(part_max + part, largest, mask=in_span)
        tl.store(part_sum + part, total, mask=in_span)
    else:
        attended = attended / tl.where(total == 0.0, 1.0, total)[:, None]  # a row that sees nothing gets 0
        out_offset = ((start + row).to(tl.int64) * num_heads + head) * HEAD_WIDTH
        tl.store(out + out_offset[:, None] + channel[None, :], attended.to(out.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=["num_splits"])
def merge_splits(
    part_out: tl.tensor,
    part_max: tl.tensor,
    part_sum: tl.tensor,
    starts: tl.tensor,
    used: tl.tensor,
    out: tl.tensor,
    num_splits: tl.tensor,
    HEAD_WIDTH: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """One query head of one span of one row, always in the same order: the pieces that hold something, 16 by 16."""
    head = tl.program_id(0)
    span = tl.program_id(1)
    num_heads = tl.num_programs(0)
    start = tl.load(starts + span)
    num_rows = tl.load(starts + span + 1) - start
    if num_rows == 1:
        channel = tl.arange(0, HEAD_BLOCK)
        in_head = channel < HEAD_WIDTH
        num_filled = tl.cdiv(tl.load(used + span), SPLIT)
        largest = float("-inf")
        total = 0.0
        attended = tl.full([HEAD_BLOCK], 0.0, tl.float32)
        for first in tl.range(0, num_filled, 16):
            split = first + tl.arange(0, 16)
            filled = split < num_filled
            part = (span.to(tl.int64) * num_splits + split) * num_heads + head
            maxima = tl.load(part_max + part, mask=filled, other=float("-inf"))
            sums = tl.load(part_sum + part, mask=filled, other=0.0)
            outs = tl.load(
                part_out + part[:, None] * HEAD_WIDTH + channel[None, :],
                mask=filled[:, None] & in_head[None, :],
                other=0.0,
            )
            larger = tl.maximum(largest, tl.max(maxima, 0))
            weights = tl.exp2(maxima - larger)  # of at least one position, which is seen: larger is finite
            rescale = tl.exp2(largest - larger)
            total = total * rescale + tl.sum(weights * sums, 0)
            attended = attended * rescale + tl.sum(weights[:, None] * outs, 0)
            largest = larger
        attended = attended / tl.where(total == 0.0, 1.0, total)
        offset = (start.to(tl.int64) * num_heads + head) * HEAD_WIDTH
        tl.store(out + offset + channel, attended.to(out.dtype.element_ty), mask=in_head)
