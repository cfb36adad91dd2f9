"""What a request inside the decoder knows of itself: its tokens, what they see, and how far it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.contract import SamplingParams, Timings, Usage, ValidRequest
from service.decoder.kv_blocks import BLOCK_SIZE, hash_block
from service.decoder.sequence import Sequence
from service.families.family import Sight

END = 9  # of a document: nothing behind it sees a picture that stands before it


def see(before: Sight, previous_token: int | None, picture: int | None) -> Sight:
    """All pictures so far of a token's own document."""
    if previous_token == END:
        before = ()
    return before if picture is None else (*before, picture)


def make(input_ids: tuple[int, ...], keys: tuple[str, ...] = (), positions: tuple[int, ...] = ()) -> Sequence:
    request = ValidRequest(input_ids, keys, positions, SamplingParams(max_tokens=5))
    return Sequence(3, request, {}, see, 10.0, 77, frozenset({2}))


def test_a_new_sequence_holds_nothing_and_has_everything_before_it() -> None:
    sequence = make((1, 5, 6), ("a", "b"), (0, 1))
    assert (sequence.request_id, sequence.seed, sequence.stop_token_ids) == (3, 77, {2})
    assert sequence.sampling == SamplingParams(max_tokens=5)
    assert (sequence.num_prompt_tokens, sequence.num_uncomputed, sequence.num_generated) == (3, 3, 0)
    assert (sequence.block_table, sequence.image_pages, sequence.unsent) == ([], {}, [])
    assert (sequence.num_computed, sequence.num_published, sequence.num_overtaken) == (0, 0, 0)
    assert not sequence.was_preempted and sequence.num_cached_tokens is None
    assert sequence.usage() == Usage(prompt_tokens=3, images=2)


def test_a_generated_token_is_uncomputed_and_unsent() -> None:
    sequence = make((1, 5, 6))
    sequence.num_computed = 3
    sequence.append(7)
    sequence.append(8)
    assert sequence.token_ids == [1, 5, 6, 7, 8] and sequence.unsent == [7, 8]
    assert (sequence.num_prompt_tokens, sequence.num_uncomputed, sequence.num_generated) == (3, 2, 2)


def test_each_picture_counts_once_in_the_order_of_the_prompt() -> None:
    assert make((1, 1, 1, 1), ("b", "a", "b", "c"), (0, 1, 2, 3)).distinct_keys == ("b", "a", "c")


def test_a_token_sees_the_pages_of_the_pictures_that_its_family_says() -> None:
    sequence = make((1, 5, 1, END, 6, 1), ("a", "b", "a"), (0, 2, 5))
    sequence.image_pages = {"a": (4, 0), "b": (1,)}
    assert [sequence.pages(position) for position in range(6)] == [(4, 0), (4, 0), (4, 0, 1), (4, 0, 1), (), (4, 0)]
    assert list(sequence.runs(1, 6)) == [(1, (4, 0)), (2, (4, 0, 1)), (1, ()), (1, (4, 0))]
    assert list(sequence.runs(4, 5)) == [(1, ())]


def test_what_a_generated_token_sees_follows_from_the_token_before_it() -> None:
    sequence = make((1, 5), ("a",), (0,))
    sequence.image_pages = {"a": (4,)}
    for token in (6, END, 7, 8):
        sequence.append(token)
    assert [sequence.pages(position) for position in range(6)] == [(4,), (4,), (4,), (4,), (), ()]


def test_blocks_are_hashed_in_a_chain_with_the_keys_that_each_token_sees() -> None:
    input_ids = tuple(range(100, 100 + 2 * BLOCK_SIZE + 3))
    sequence = make(input_ids, ("a", "b"), (1, BLOCK_SIZE + 2))
    seen = [()] + [("a",)] * (BLOCK_SIZE + 1) + [("a", "b")] * BLOCK_SIZE
    first = hash_block(b"", input_ids[:BLOCK_SIZE], seen[:BLOCK_SIZE])
    second = hash_block(first, input_ids[BLOCK_SIZE : 2 * BLOCK_SIZE], seen[BLOCK_SIZE : 2 * BLOCK_SIZE])
    assert sequence.block_hashes(0) == []
    assert sequence.block_hashes(2) == [first, second]
    assert sequence.block_hashes(1) == [first], "also when more are known"


def test_a_salt_is_the_root_of_the_chain_so_no_block_is_found_with_another_one() -> None:
    request = ValidRequest(tuple(range(100, 100 + 2 * BLOCK_SIZE)), ("a",), (3,))
    salts = (b"", b"s" * 32, b"t" * 32)
    chains = [Sequence(3, replace(request, cache_salt=salt), {}, see, 10.0, 77).block_hashes(2) for salt in salts]
    assert len({block_hash for chain in chains for block_hash in chain}) == 6
    again = Sequence(4, replace(request, cache_salt=salts[1]), {}, see, 11.0, 78)
    assert again.block_hashes(2) == chains[1]


def test_blocks_of_generated_tokens_have_the_hashes_of_the_same_prompt() -> None:
    prompt = tuple(range(100, 100 + 3 * BLOCK_SIZE))
    whole, grown = make(prompt, ("a",), (4,)), make(prompt[:20], ("a",), (4,))
    assert grown.block_hashes(1) == whole.block_hashes(1)
    for token in prompt[20:]:
        grown.append(token)
    assert grown.block_hashes(3) == whole.block_hashes(3)


def test_usage_says_what_was_there_already() -> None:
    sequence = make((1, 1, 5), ("a", "b"), (0, 1))
    sequence.num_cached_images, sequence.num_cached_tokens = 1, 2
    sequence.append(7)
    usage = Usage(prompt_tokens=3, completion_tokens=1, images=2, cached_images=1, cached_prompt_tokens=2)
    assert sequence.usage() == usage


@pytest.mark.parametrize(
    ("scheduled_s", "first_token_s", "expected"),
    [
        (10.5, 11.25, Timings(queue_ms=500.0, prefill_ms=750.0, decode_ms=1750.0)),
        (10.5, None, Timings(queue_ms=500.0, prefill_ms=2500.0)),
        (None, None, Timings(queue_ms=3000.0)),
    ],
    ids=["finished", "ended in its prompt", "ended in the queue"],
)
def test_timings_are_milliseconds_from_one_event_to_the_next(
    scheduled_s: float | None, first_token_s: float | None, expected: Timings
) -> None:
    sequence = make((1, 5))
    sequence.first_scheduled_s, sequence.first_token_s = scheduled_s, first_token_s
    assert sequence.timings(13.0) == expected
