"""Who holds which block, which is taken next, and which are found by the hash of what they hold."""

from __future__ import annotations

import pytest

from service.decoder.kv_blocks import KVBlocks, hash_block


def test_every_block_is_free_until_it_is_allocated() -> None:
    blocks = KVBlocks(3)
    assert (blocks.num_free, blocks.num_used, blocks.num_blocks) == (3, 0, 3)
    assert [blocks.refcount(block) for block in range(3)] == [0, 0, 0]
    taken = blocks.allocate(2)
    assert sorted(taken) == [0, 1]
    assert (blocks.num_free, blocks.num_used) == (1, 2)
    assert [blocks.refcount(block) for block in range(3)] == [1, 1, 0]


def test_as_many_as_are_free_can_be_allocated_and_more_takes_none() -> None:
    blocks = KVBlocks(3)
    with pytest.raises(IndexError):
        blocks.allocate(4)
    assert blocks.num_free == 3
    assert sorted(blocks.allocate(3)) == [0, 1, 2]
    assert blocks.allocate(0) == []
    with pytest.raises(IndexError):
        blocks.allocate(1)


def test_the_end_of_a_sequence_is_taken_again_before_its_beginning() -> None:
    """Its beginning is what others are likelier to share."""
    blocks = KVBlocks(4)
    table = blocks.allocate(4)
    blocks.release(table)
    assert [blocks.allocate(1) for _ in range(4)] == [[block] for block in table[::-1]]


def test_what_was_freed_first_is_taken_first() -> None:
    blocks = KVBlocks(4)
    first, second = blocks.allocate(2), blocks.allocate(2)
    blocks.release(second)
    blocks.release(first)
    assert blocks.allocate(2) == second
    assert blocks.allocate(2) == first


def test_what_is_taken_together_lies_in_a_row_if_it_can() -> None:
    blocks = KVBlocks(8)
    table = blocks.allocate(8)
    blocks.release(table)
    assert blocks.allocate(8) == list(range(8))


def test_a_block_is_free_again_when_its_last_holder_has_released_it() -> None:
    blocks = KVBlocks(2)
    (block,) = blocks.allocate(1)
    blocks.publish(block, b"a")
    blocks.share([block])
    assert blocks.refcount(block) == 2
    blocks.release([block])
    assert (blocks.refcount(block), blocks.num_free) == (1, 1)
    blocks.release([block])
    assert (blocks.refcount(block), blocks.num_free) == (0, 2)


def test_a_free_block_that_is_shared_is_held_and_not_allocated() -> None:
    blocks = KVBlocks(2)
    table = blocks.allocate(2)
    for block, block_hash in zip(table, (b"a", b"b"), strict=True):
        blocks.publish(block, block_hash)
    blocks.release(table)
    blocks.share(table[:1])
    assert (blocks.refcount(table[0]), blocks.num_free) == (1, 1)
    assert blocks.allocate(1) == table[1:]


def test_the_longest_known_prefix_is_found_and_none_of_it_taken() -> None:
    blocks = KVBlocks(4)
    table = blocks.allocate(3)
    for block, block_hash in zip(table, (b"a", b"b", b"c"), strict=True):
        blocks.publish(block, block_hash)
    assert blocks.lookup([b"a", b"b", b"c", b"d"]) == table
    assert blocks.lookup([b"a", b"x", b"c"]) == table[:1], "behind an unknown block nothing is the same"
    assert blocks.lookup([b"x", b"b"]) == []
    assert [blocks.refcount(block) for block in table] == [1, 1, 1]


def test_a_free_block_is_found_until_it_is_taken_for_something_else() -> None:
    blocks = KVBlocks(2)
    table = blocks.allocate(2)
    for block, block_hash in zip(table, (b"a", b"b"), strict=True):
        blocks.publish(block, block_hash)
    blocks.release(table)
    assert blocks.lookup([b"a", b"b"]) == table
    blocks.allocate(1)
    assert blocks.lookup([b"a", b"b"]) == table[:1]
    blocks.allocate(1)
    assert blocks.lookup([b"a"]) == []


def test_the_first_block_of_a_content_is_the_one_that_is_found() -> None:
    """Two that computed the same at once: the second's block goes unnoticed, whatever becomes of it."""
    blocks = KVBlocks(2)
    first, second = blocks.allocate(2)
    blocks.publish(first, b"a")
    blocks.publish(second, b"a")
    assert blocks.lookup([b"a"]) == [first]
    blocks.release([second])
    assert blocks.allocate(1) == [second]
    assert blocks.lookup([b"a"]) == [first]


def test_what_can_be_allocated_leaves_out_the_free_blocks_that_will_be_shared() -> None:
    blocks = KVBlocks(4)
    held = blocks.allocate(1)
    left = blocks.allocate(2)
    for block in (*held, *left):
        blocks.publish(block, b"%d" % block)
    blocks.release(left)
    assert blocks.num_allocatable([]) == 3
    assert blocks.num_allocatable(held) == 3
    assert blocks.num_allocatable([*held, *left]) == 1
    blocks.share([*held, *left])
    assert len(blocks.allocate(1)) == 1


def test_the_hash_of_a_block_depends_on_all_that_its_values_depend_on() -> None:
    blocks = [
        (b"", [1, 2], [(), ()]),
        (b"previous", [1, 2], [(), ()]),
        (b"", [2, 1], [(), ()]),
        (b"", [12], [()]),
        (b"", [1, 2], [("a",), ()]),
        (b"", [1, 2], [(), ("a",)]),
        (b"", [1, 2], [("a",), ("a",)]),
        (b"", [1, 2], [("a", "b"), ()]),
        (b"", [1, 2], [("b", "a"), ()]),
        (b"", [1, 2], [("ab",), ()]),
    ]
    hashes = {hash_block(*block) for block in blocks}
    assert len(hashes) == len(blocks)
    assert hash_block(*blocks[0]) == hash_block(b"", (1, 2), ((), ()))
    with pytest.raises(ValueError, match="zip"):
        hash_block(b"", [1, 2], [()])
