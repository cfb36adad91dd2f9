"""The tensors of one step, made from its chunks: flat tokens, no padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from service.decoder.kv_blocks import BLOCK_SIZE
from service.decoder.scheduler import Chunk


@dataclass(frozen=True)
class PrefillSpan:
    """A chunk of several tokens: flat rows [row, row + count), attending causally to `length` tokens of its blocks."""

    row: int
    count: int
    length: int
    blocks: Tensor  # int64 [blocks]


@dataclass(frozen=True)
class DecodeRows:
    """Chunks of one token and of like lengths: each row attends to the first `lengths` tokens of its blocks."""

    rows: Tensor  # int64 [B]
    block_table: Tensor  # int64 [B, max blocks], padded with the row's own last block
    lengths: Tensor  # int64 [B]


@dataclass(frozen=True)
class SightGroup:
    """G sets of n tokens that see the same number of pages: rows int64 [G, n], pages int64 [G, pages]."""

    rows: Tensor
    pages: Tensor


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    slots: Tensor  # int64 [N], where each token's self-K/V goes: block * BLOCK_SIZE + offset
    unwritten: Tensor  # int64 [n], slots behind the last token in the blocks that this step begins
    prefills: list[PrefillSpan]
    decodes: list[DecodeRows]
    sight_groups: list[SightGroup]
    sees: Tensor  # bool [N, 1]
    logits_rows: Tensor  # int64 [B], rows whose logits are wanted: the last of every chunk


def make_batch(chunks: list[Chunk], device: torch.device) -> Batch:
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    unwritten: list[int] = []
    sees: list[bool] = []
    logits_rows: list[int] = []
    prefills: list[PrefillSpan] = []
    decodes: list[tuple[int, list[int], int]] = []
    rows_of_pages: dict[tuple[int, ...], list[int]] = {}
    for chunk in chunks:
        sequence, row = chunk.sequence, len(input_ids)
        for position in range(chunk.start, chunk.start + chunk.count):
            pages = sequence.pages(position)
            if pages:
                rows_of_pages.setdefault(pages, []).append(len(positions))
            sees.append(bool(pages))
            positions.append(position)
            slots.append(sequence.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        input_ids += sequence.token_ids[chunk.start : chunk.start + chunk.count]
        length = chunk.start + chunk.count
        blocks = sequence.block_table[: -(-length // BLOCK_SIZE)]
        if chunk.count == 1:
            decodes.append((row, blocks, length))
        else:
            prefills.append(PrefillSpan(row, chunk.count, length, torch.tensor(blocks, device=device)))
        if chunk.start <= (length - 1) // BLOCK_SIZE * BLOCK_SIZE:  # begins the block in which it ends
            unwritten += range(slots[-1] + 1, (blocks[-1] + 1) * BLOCK_SIZE)
        logits_rows.append(row + chunk.count - 1)
    return Batch(
        input_ids=torch.tensor(input_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        unwritten=torch.tensor(unwritten, dtype=torch.int64, device=device),
        prefills=prefills,
        decodes=[_decode_rows(alike, device) for alike in _of_like_length(decodes)],
        sight_groups=_sight_groups(rows_of_pages, device),
        sees=torch.tensor(sees, device=device)[:, None],
        logits_rows=torch.tensor(logits_rows, device=device),
    )


def _of_like_length(decodes: list[tuple[int, list[int], int]]) -> list[list[tuple[int, list[int], int]]]:
    """Groups in which no row is padded to more than twice its blocks: a long sequence does not stretch short ones."""
    groups: list[list[tuple[int, list[int], int]]] = []
    for decode in sorted(decodes, key=lambda decode: len(decode[1]), reverse=True):
        if groups and 2 * len(decode[1]) >= len(groups[-1][0][1]):
            groups[-1].append(decode)
        else:
            groups.append([decode])
    return groups


def _decode_rows(decodes: list[tuple[int, list[int], int]], device: torch.device) -> DecodeRows:
    width = max(len(blocks) for _, blocks, _ in decodes)
    padded = [blocks + blocks[-1:] * (width - len(blocks)) for _, blocks, _ in decodes]  # nobody else's content
    return DecodeRows(
        rows=torch.tensor([row for row, _, _ in decodes], device=device),
        block_table=torch.tensor(padded, device=device),
        lengths=torch.tensor([length for _, _, length in decodes], device=device),
    )


def _sight_groups(rows_of_pages: dict[tuple[int, ...], list[int]], device: torch.device) -> list[SightGroup]:
    """Tokens that see the same pages attend in one call; so do sets of equal size and equal page count.

    Decodes that look at one hot picture become one group of one set, decodes at distinct pictures one group of many.
    """
    buckets: dict[tuple[int, int], list[tuple[tuple[int, ...], list[int]]]] = {}
    for pages, rows in rows_of_pages.items():
        buckets.setdefault((len(rows), len(pages)), []).append((pages, rows))
    return [
        SightGroup(
            rows=torch.tensor([rows for _, rows in sets], device=device),
            pages=torch.tensor([pages for pages, _ in sets], device=device),
        )
        for sets in buckets.values()
    ]
