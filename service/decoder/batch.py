"""The tensors of one step, made from its chunks: flat tokens, no padding."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from service.decoder.attention import Run, Scratch, Spans
from service.decoder.kv_blocks import BLOCK_SIZE
from service.decoder.page_pool import Slots
from service.decoder.scheduler import Chunk
from service.decoder.upload import upload


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    slots: Slots  # N, where each token's self-K/V goes
    unwritten: Slots  # those behind the last token in the blocks that this step begins
    text: Spans  # one for each chunk, over its sequence's blocks
    images: Spans  # one for each run of tokens with one sight, over the pages of the pictures seen
    sees: Tensor  # bool [N, 1]
    any_sees: bool
    logits_rows: Tensor  # int64 [B], rows whose logits are wanted: the last of every chunk


def make_batch(chunks: list[Chunk], image_page_size: int, device: torch.device, scratch: Scratch) -> Batch:
    """Its tensors come to the device in one copy, whose views they are."""
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[tuple[int, int]] = []
    unwritten: list[tuple[int, int]] = []
    logits_rows: list[int] = []
    text: list[Run] = []
    images: list[Run] = []
    for chunk in chunks:
        sequence, end = chunk.sequence, chunk.start + chunk.count
        blocks = sequence.block_table[: -(-end // BLOCK_SIZE)]
        text.append((chunk.count, blocks, end))
        images += [(count, pages, len(pages) * image_page_size) for count, pages in sequence.runs(chunk.start, end)]
        input_ids += sequence.token_ids[chunk.start : end]
        positions += range(chunk.start, end)
        slots += [(blocks[p // BLOCK_SIZE], p % BLOCK_SIZE) for p in range(chunk.start, end)]
        last = (end - 1) % BLOCK_SIZE
        if chunk.count > last:  # begins the block in which it ends
            unwritten += [(blocks[-1], offset) for offset in range(last + 1, BLOCK_SIZE)]
        logits_rows.append(len(input_ids) - 1)
    sees = [bool(pages) for count, pages, _ in images for _ in range(count)]
    of_slots = [[slot[part] for slot in each] for each in (slots, unwritten) for part in (0, 1)]
    of_tokens = [array("q", each) for each in (input_ids, positions, *of_slots)]
    of_spans = *Spans.numbers(text), *Spans.numbers(images)
    tensors = iter(upload([*of_tokens, *of_spans, array("B", sees), array("q", logits_rows)], device))
    return Batch(
        input_ids=next(tensors),
        positions=next(tensors),
        slots=Slots(next(tensors), next(tensors)),
        unwritten=Slots(next(tensors), next(tensors)),
        text=Spans.of(text, tensors, scratch, causal=True),
        images=Spans.of(images, tensors, scratch, causal=False),
        sees=next(tensors)[:, None],
        any_sees=any(sees),
        logits_rows=next(tensors),
    )
