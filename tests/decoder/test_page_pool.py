"""What is written to a pool lies where it was to go, and nowhere else."""

from __future__ import annotations

import torch

from service.decoder.page_pool import PagePool, PageShape, Slots

SHAPE = PageShape(num_layers=2, page_size=4, num_kv_heads=2, head_width=3)


def test_k_and_v_go_to_their_layer_and_slots_and_are_cleared_there() -> None:
    pool = PagePool(SHAPE, 3, torch.device("cpu"), torch.float32)
    slots = Slots(torch.tensor([1, 0, 2]), torch.tensor([3, 0, 2]))
    k, v = torch.randn(2, 3, 2, 3)
    pool.store(1, slots, k, v)
    for written, values in ((pool.k, k), (pool.v, v)):
        expected = torch.zeros(2, 12, 2, 3)
        expected[1, [7, 0, 10]] = values
        assert torch.equal(written.transpose(2, 3).flatten(1, 2), expected)
        written.fill_(torch.nan)
    pool.clear(slots)
    for cleared in (pool.k, pool.v):
        numbers = cleared.transpose(2, 3).flatten(1, 2).isfinite().all(dim=(2, 3))
        assert numbers.nonzero()[:, 1].tolist() == [0, 7, 10] * 2
