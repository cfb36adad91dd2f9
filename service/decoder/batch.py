"""The tensors of one step, made from its chunks: flat tokens, no padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from service.decoder.attention import Spans
from service.decoder.kv_blocks import BLOCK_SIZE
from service.decoder.scheduler import Chunk


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    slots: Tensor  # int64 [N], where each token's self-K/V goes: block * BLOCK_SIZE + offset
    unwritten: Tensor  # int64 [n], slots behind the last token in the blocks that this step begins
    text: Spans  # one for each chunk, over its sequence's blocks
    images: Spans  # one for each run of tokens with one sight, over the pages of the pictures seen
    sees: Tensor  # bool [N, 1]
    any_sees: bool
    logits_rows: Tensor  # int64 [B], rows whose logits are wanted: the last of every chunk


def make_batch(chunks: list[Chunk], image_page_size: int, device: torch.device) -> Batch:
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    unwritten: list[int] = []
    logits_rows: list[int] = []
    text: list[tuple[int, list[int], int]] = []
    images: list[tuple[int, tuple[int, ...], int]] = []
    for chunk in chunks:
        sequence, end = chunk.sequence, chunk.start + chunk.count
        blocks = sequence.block_table[: -(-end // BLOCK_SIZE)]
        text.append((chunk.count, blocks, end))
        images += [(count, pages, len(pages) * image_page_size) for count, pages in sequence.runs(chunk.start, end)]
        input_ids += sequence.token_ids[chunk.start : end]
        positions += range(chunk.start, end)
        slots += [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(chunk.start, end)]
        if chunk.start <= (end - 1) // BLOCK_SIZE * BLOCK_SIZE:  # begins the block in which it ends
            unwritten += range(slots[-1] + 1, (blocks[-1] + 1) * BLOCK_SIZE)
        logits_rows.append(len(input_ids) - 1)
    sees = [bool(pages) for count, pages, _ in images for _ in range(count)]
    return Batch(
        input_ids=torch.tensor(input_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        unwritten=torch.tensor(unwritten, dtype=torch.int64, device=device),
        text=Spans.of(text, causal=True, device=device),
        images=Spans.of(images, causal=False, device=device),
        sees=torch.tensor(sees, device=device)[:, None],
        any_sees=any(sees),
        logits_rows=torch.tensor(logits_rows, device=device),
    )
