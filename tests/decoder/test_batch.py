"""How a step's rows are put together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from service.contract import ValidRequest
from service.decoder.attention import Scratch
from service.decoder.batch import make_batch
from service.decoder.kv_blocks import BLOCK_SIZE
from service.decoder.scheduler import Chunk
from service.decoder.sequence import Sequence
from service.families.flamingo import see

IMAGE_PAGE_SIZE = 5


@st.composite
def chunks(draw: st.DrawFn) -> list[Chunk]:
    made = []
    for number in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 70))
        positions = tuple(sorted(draw(st.sets(st.integers(0, length - 1), max_size=3))))
        keys = tuple(f"{number}.{ordinal}" for ordinal in range(len(positions)))
        sequence = Sequence(number, ValidRequest((1,) * length, keys, positions), {}, see, 0.0, 0)
        sequence.block_table = [100 * number + block for block in range(-(-length // BLOCK_SIZE))]
        for ordinal, key in enumerate(keys):
            first = 1000 * number + 10 * ordinal
            sequence.image_pages[key] = tuple(range(first, first + draw(st.integers(1, 4))))
        sequence.num_computed = draw(st.integers(0, length - 1))
        made.append(Chunk.next(sequence, draw(st.integers(1, sequence.num_uncomputed))))
    return made


@given(chunks())
def test_every_row_is_in_a_span_over_what_its_token_may_see(chunks: list[Chunk]) -> None:
    batch = make_batch(chunks, IMAGE_PAGE_SIZE, torch.device("cpu"), Scratch())
    tokens = [(chunk.sequence, chunk.start + index) for chunk in chunks for index in range(chunk.count)]
    assert batch.positions.tolist() == [position for _, position in tokens]
    for spans in (batch.text, batch.images):
        assert spans.starts[0] == 0 and spans.starts[-1] == len(tokens)
        assert (spans.starts[1:] > spans.starts[:-1]).all()
    for row, (sequence, position) in enumerate(tokens):
        span = int((batch.text.starts <= row).sum()) - 1
        behind = int(batch.text.starts[span + 1]) - 1 - row
        used = int(batch.text.used[span])
        assert used - behind == position + 1
        blocks = batch.text.table[span].tolist()[: -(-used // BLOCK_SIZE)]
        assert blocks == sequence.block_table[: len(blocks)]

        span = int((batch.images.starts <= row).sum()) - 1
        seen = [sequence.image_keys[ordinal] for ordinal in sequence._sights[position]]
        pages = [page for key in seen for page in sequence.image_pages[key]]
        assert batch.images.used[span] == len(pages) * IMAGE_PAGE_SIZE
        assert batch.images.table[span].tolist()[: len(pages)] == pages
        assert batch.sees[row].item() == bool(pages)


@given(chunks())
def test_a_token_goes_to_its_place_and_what_follows_in_a_block_just_begun_is_cleared(chunks: list[Chunk]) -> None:
    batch = make_batch(chunks, IMAGE_PAGE_SIZE, torch.device("cpu"), Scratch())
    row, slots = 0, (batch.slots.pages * BLOCK_SIZE + batch.slots.offsets).tolist()
    cleared = set((batch.unwritten.pages * BLOCK_SIZE + batch.unwritten.offsets).tolist())
    for chunk in chunks:
        for position in range(chunk.start, chunk.start + chunk.count):
            block = chunk.sequence.block_table[position // BLOCK_SIZE]
            assert slots[row] == block * BLOCK_SIZE + position % BLOCK_SIZE
            row += 1
        end = chunk.start + chunk.count
        rest = set(range(block * BLOCK_SIZE + (end - 1) % BLOCK_SIZE + 1, (block + 1) * BLOCK_SIZE))
        begun = chunk.start <= (end - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert cleared & set(range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)) == (rest if begun else set())
