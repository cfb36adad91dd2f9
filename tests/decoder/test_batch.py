"""How a step's rows are put together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from service.contract import ValidRequest
from service.decoder.batch import make_batch
from service.decoder.kv_blocks import BLOCK_SIZE
from service.decoder.scheduler import Chunk
from service.decoder.sequence import Sequence


def decoding(number: int, length: int) -> Chunk:
    sequence = Sequence(number, ValidRequest((1,) * length), {}, lambda before, previous, picture: before, 0.0, 0)
    sequence.block_table = list(range(1, 1 + -(-length // BLOCK_SIZE)))
    sequence.num_computed = length - 1
    return Chunk(sequence, length - 1, 1)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=20))
def test_a_long_sequence_does_not_stretch_short_ones(lengths: list[int]) -> None:
    chunks = [decoding(number, length) for number, length in enumerate(lengths)]
    groups = make_batch(chunks, torch.device("cpu")).decodes
    assert sorted(row for group in groups for row in group.rows.tolist()) == list(range(len(lengths)))
    for group in groups:
        assert group.lengths.tolist() == [lengths[row] for row in group.rows.tolist()]
        width = group.block_table.shape[1]
        assert all(width <= 2 * -(-length // BLOCK_SIZE) for length in group.lengths.tolist())
