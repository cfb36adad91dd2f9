"""Properties of the scheduler and both caches, under random requests, cancels, EOS and evictions, without a model."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract import SamplingParams, ValidRequest
from service.decoder.image_pages import ImagePages
from service.decoder.kv_blocks import BLOCK_SIZE, KVBlocks
from service.decoder.scheduler import LOOK_AHEAD, Scheduler, Step
from service.decoder.sequence import Sequence
from service.errors import Overloaded, TooLarge
from service.families.flamingo import see

NUM_TILES = {"c": 2, "d": 3, "e": 4}  # of a picture, by its key; 1 of any other


def make_scheduler(
    num_blocks: int = 12,
    num_pages: int = 3,
    max_running: int = 4,
    budget: int = 24,
    **bounds: Any,
) -> Scheduler:
    """`bounds`: of those that `Scheduler` has by default."""
    return Scheduler(KVBlocks(num_blocks), ImagePages(num_pages), max_running, 100, budget, **bounds)


def tiles(key: str) -> list[tuple[str, int]]:
    return [(key, tile) for tile in range(NUM_TILES.get(key, 1))]


def make_sequence(request_id: int, num_tokens: int, keys: tuple[str, ...] = (), max_tokens: int = 8) -> Sequence:
    input_ids = tuple((request_id * 7 + index) % 50 for index in range(num_tokens))
    request = ValidRequest(input_ids, keys, tuple(range(len(keys))), SamplingParams(max_tokens=max_tokens))
    return Sequence(request_id, request, {key: tiles(key) for key in keys}, see, 0.0, 0)


class Machine:
    """A scheduler with a stand-in for the device: it remembers what was written where, and checks every read."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.slots: dict[int, tuple[str, ...]] = {}  # slot -> digest of the tokens up to it, and of what they see
        self.pages: dict[int, tuple[str, int]] = {}  # page -> key and tile
        self.generated: dict[int, int] = {}
        self.finished: list[int] = []
        self.lost: list[int] = []
        self.started: set[int] = set()
        self.overtaken: dict[int, int] = {}  # how many that came later started before it

    def step(self) -> Step:
        running = [(sequence, sequence.num_uncomputed == 1) for sequence in self.scheduler.running]
        num_preemptions = self.scheduler.num_preemptions
        step = self.scheduler.schedule()
        self.check_share(step, running)
        if self.scheduler.num_preemptions == num_preemptions:  # or some may have come back as newcomers
            self.check_cost(step, running)
        for sequence in self.scheduler.running:
            if sequence.request_id not in self.started:
                self.started.add(sequence.request_id)
                for other in self.scheduler.waiting:
                    if other.request_id < sequence.request_id and other.request_id not in self.started:
                        self.overtaken[other.request_id] = self.overtaken.get(other.request_id, 0) + 1
        for sequence, _ in step.lost_images:
            self.lost.append(sequence.request_id)
        for pages, latents in step.image_fills:
            self.pages |= zip(pages, latents, strict=True)
        assert sum(chunk.count for chunk in step.chunks) <= self.scheduler.max_step_tokens
        assert len({id(chunk.sequence) for chunk in step.chunks}) == len(step.chunks)
        for chunk in step.chunks:
            sequence = chunk.sequence
            assert chunk.count > 0 and chunk.start == sequence.num_computed
            assert sequence.image_pages.keys() == set(sequence.image_keys)
            for key, pages in sequence.image_pages.items():
                assert [self.pages[page] for page in pages] == tiles(key)
            assert chunk.samples == (chunk.start + chunk.count == len(sequence.token_ids))
            for position in range(chunk.start, chunk.start + chunk.count):
                self.slots[self.slot(sequence, position)] = self.content(sequence, position)
            for position in range(chunk.start + chunk.count):
                assert self.slots[self.slot(sequence, position)] == self.content(sequence, position)
        for chunk in step.chunks:
            self.scheduler.computed(chunk)
            if chunk.samples:
                self.sample(chunk.sequence)
                assert chunk.samples, "it says what was scheduled, whatever follows"
        self.check()
        return step

    def check_share(self, step: Step, running: list[tuple[Sequence, bool]]) -> None:
        """Who decodes is never left out, and the first goes on.

        `running`: who ran before the step, and whether it was decoding.
        """
        decoding = [sequence for sequence, is_decoding in running if is_decoding]
        computed = [chunk.sequence for chunk in step.chunks]
        if len(decoding) < self.scheduler.max_step_tokens:  # what settings see to
            put_back = [sequence for sequence, _ in running if sequence in self.scheduler.waiting]
            assert all(sequence in computed or sequence in put_back for sequence in decoding)
            assert not running or running[0][0] in computed

    def check_cost(self, step: Step, running: list[tuple[Sequence, bool]]) -> None:
        """Tokens and fills are within the budget, but for one token or one request's pictures beyond it; beside decodes
        prompts have less, and of that the oldest has half.
        """
        scheduler, spent, filled = self.scheduler, 0.0, {pages for pages, _ in step.image_fills}
        decoding = [sequence for sequence, is_decoding in running if is_decoding]
        oldest = [sequence for sequence, is_decoding in running if not is_decoding][:1]
        budget = scheduler.max_step_tokens
        if decoding and scheduler.max_prefill_tokens is not None:
            reading = math.ceil(scheduler.reading_cost * sum(each.num_computed for each in decoding))
            prefill = max(scheduler.max_prefill_tokens - reading, math.ceil(scheduler.max_prefill_tokens / 4))
            budget = min(budget, len(decoding) + prefill)
        rank = {id(sequence): number for number, sequence in enumerate([*decoding, *oldest])}
        for chunk in sorted(step.chunks, key=lambda chunk: rank.get(id(chunk.sequence), len(rank))):
            assert spent < budget, "nothing was left for it"
            if chunk.sequence in oldest and chunk.count < chunk.sequence.num_uncomputed:
                assert (chunk.count + 1) * (1 + chunk.start * scheduler.position_cost) > (budget - spent) / 2
            own = filled & set(chunk.sequence.image_pages.values())
            fills = scheduler.fill_tokens * sum(map(len, own))
            is_first_fill, filled = len(filled) == len(step.image_fills), filled - own
            assert not fills or is_first_fill or spent + fills < budget
            cost = 1.0 if chunk.sequence in decoding else 1 + chunk.start * scheduler.position_cost
            spent += fills + chunk.count * cost
            assert spent <= budget + 1e-6 or chunk.count == 1  # some products are above the quotient's

    def sample(self, sequence: Sequence) -> None:
        sequence.append(sequence.num_generated % 50)
        if sequence.num_generated == sequence.sampling.max_tokens:
            self.scheduler.remove(sequence)
            self.finished.append(sequence.request_id)
            self.generated[sequence.request_id] = sequence.num_generated

    @staticmethod
    def slot(sequence: Sequence, position: int) -> int:
        return sequence.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    @staticmethod
    def content(sequence: Sequence, position: int) -> tuple[str, ...]:
        seen = [tuple(sequence.image_keys[o] for o in sequence._sights[p]) for p in range(position + 1)]
        return hashlib.sha256(repr((sequence.token_ids[: position + 1], seen)).encode()).hexdigest(), str(position)

    def check(self) -> None:
        """No block leaks, none has two writers, every count adds up."""
        scheduler = self.scheduler
        assert len(scheduler.running) <= scheduler.max_running
        holders: dict[int, int] = {}
        for sequence in scheduler.running:
            for block in sequence.block_table:
                holders[block] = holders.get(block, 0) + 1
            assert len(set(sequence.block_table)) == len(sequence.block_table)
        for sequence in scheduler.waiting:
            assert sequence.block_table == []
        for block in range(scheduler.blocks.num_blocks):
            assert scheduler.blocks.refcount(block) == holders.get(block, 0)
        assert scheduler.blocks.num_free == scheduler.blocks.num_blocks - len(holders)
        for sequence in scheduler.running:  # the block that will be written next belongs to one sequence
            open_blocks = sequence.block_table[sequence.num_computed // BLOCK_SIZE :]
            assert all(holders[block] == 1 for block in open_blocks)
        held: dict[str, int] = {}
        for sequence in (*scheduler.running, *scheduler.waiting):
            for key in sequence.image_pages:
                held[key] = held.get(key, 0) + 1
        assert all(scheduler.images.refcount(key) == count for key, count in held.items())
        assert scheduler.images.num_held == sum(len(tiles(key)) for key in held)
        newcomers = [sequence.request_id for sequence in scheduler.waiting if sequence.request_id not in self.started]
        assert newcomers == sorted(newcomers), "the queue keeps its order"
        waiting = [sequence.request_id in self.started for sequence in scheduler.waiting]
        assert waiting == sorted(waiting, reverse=True), "who was put back is first in the queue"
        assert all(count <= scheduler.max_overtaken for count in self.overtaken.values())


requests = st.tuples(
    st.integers(1, 60),  # prompt tokens
    st.lists(st.sampled_from("abcde"), max_size=3).map(tuple),
    st.integers(1, 40),  # tokens to generate
    st.integers(0, 6),  # steps before it arrives
    st.one_of(st.none(), st.integers(0, 30)),  # steps until its client leaves
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=12),
    st.integers(8, 16),
    st.integers(3, 9),
    st.integers(5, 40),
    st.integers(0, 4),
    st.integers(1, 20),
    st.sampled_from([None, 1, 2, 3, 8, 30]),
    st.sampled_from([0.0, 0.02, 0.5]),
    st.sampled_from([0.0, 0.1]),
)
def test_every_request_ends_exactly_once_and_everything_is_returned(
    arrivals: list[tuple[int, tuple[str, ...], int, int, int | None]],
    num_blocks: int,
    num_pages: int,
    budget: int,
    max_overtaken: int,
    fill_tokens: int,
    max_prefill_tokens: int | None,
    position_cost: float,
    reading_cost: float,
) -> None:
    scheduler = make_scheduler(
        num_blocks,
        num_pages,
        budget=budget,
        max_overtaken=max_overtaken,
        fill_tokens=fill_tokens,
        max_prefill_tokens=max_prefill_tokens,
        position_cost=position_cost,
        reading_cost=reading_cost,
    )
    machine = Machine(scheduler)
    schedule: list[tuple[int, Sequence, int | None]] = []
    now, expected, cancelled = 0, [], []
    for request_id, (num_tokens, keys, max_tokens, gap, patience) in enumerate(arrivals):
        now += gap
        keys = keys[:num_tokens]
        schedule.append((now, make_sequence(request_id, num_tokens, keys, max_tokens), patience))
    leaves: list[tuple[int, Sequence]] = []
    for tick in range(5000):
        while schedule and schedule[0][0] <= tick:
            _, sequence, patience = schedule.pop(0)
            try:
                scheduler.add(sequence)
            except TooLarge:
                continue
            expected.append(sequence.request_id)
            if patience is not None:
                leaves.append((tick + patience, sequence))
        for when, sequence in leaves:
            if when == tick and sequence.request_id not in machine.finished:
                scheduler.remove(sequence)
                cancelled.append(sequence.request_id)
        step = machine.step()
        if not schedule and not scheduler.running and not scheduler.waiting:
            break
        assert step.chunks or not (scheduler.running or scheduler.waiting), "a step with work to do computes something"
    assert sorted(machine.finished + cancelled) == expected
    assert machine.lost == [], "every request brought its latents"
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert scheduler.images.num_held == 0


def test_text_goes_ahead_of_requests_that_find_no_page_in_the_step_in_which_it_comes() -> None:
    machine = Machine(make_scheduler(num_blocks=1000, num_pages=1, max_running=32, budget=512))
    machine.scheduler.add(make_sequence(0, 20, ("a",), max_tokens=400))
    machine.step()
    for request_id in range(1, 31):
        machine.scheduler.add(make_sequence(request_id, 20, ("b",), max_tokens=4))
    machine.scheduler.add(make_sequence(31, 20, max_tokens=1))
    machine.step()
    assert machine.finished == [31]


def test_a_picture_that_is_resident_goes_ahead_of_one_that_finds_no_page() -> None:
    machine = Machine(make_scheduler(num_blocks=100, num_pages=1, budget=512))
    machine.scheduler.add(make_sequence(0, 20, ("a",), max_tokens=100))
    machine.step()
    machine.scheduler.add(make_sequence(1, 20, ("b",), max_tokens=4))
    machine.scheduler.add(make_sequence(2, 20, ("a",), max_tokens=1))
    machine.step()
    assert machine.finished == [2]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 6),
    st.integers(1, 4),
    st.lists(st.sampled_from(["", "hot", "own"]), min_size=1, max_size=6),
    st.integers(1, 100),
)
def test_no_stream_of_later_requests_starves_one_that_needs_every_page(
    max_overtaken: int, num_pages: int, kinds: list[str], fill_tokens: int
) -> None:
    """Later ones keep coming as long as it waits: text, questions about a hot picture, and about ever new pictures."""
    scheduler = make_scheduler(60, num_pages, 8, 64, max_overtaken=max_overtaken, fill_tokens=fill_tokens)
    machine = Machine(scheduler)
    scheduler.add(make_sequence(0, 20, ("hot",), max_tokens=30))
    machine.step()
    scheduler.add(make_sequence(1, 20, tuple(f"big{number}" for number in range(num_pages)), max_tokens=5))
    for number in range(2, 1000):
        if 1 in machine.finished:
            break
        kind = kinds[number % len(kinds)]
        if len(scheduler.waiting) < 20:
            keys = {"": (), "hot": ("hot",), "own": (f"own{number}",)}[kind]
            scheduler.add(make_sequence(number, 20, keys, max_tokens=12))
        machine.step()
    assert 1 in machine.finished
    assert machine.overtaken.get(1, 0) <= max_overtaken


def test_nobody_passes_one_that_was_put_back_for_want_of_blocks() -> None:
    machine = Machine(make_scheduler(num_blocks=5, budget=64))
    machine.scheduler.add(make_sequence(0, 30, ("a",), max_tokens=30))
    machine.scheduler.add(make_sequence(1, 30, ("b",), max_tokens=30))
    while machine.scheduler.num_preemptions == 0:
        machine.step()
    machine.scheduler.add(make_sequence(2, 4, max_tokens=1))
    while 1 in [sequence.request_id for sequence in machine.scheduler.waiting]:
        assert 2 not in machine.started
        machine.step()
    assert 0 in machine.finished


def chunks_of(machine: Machine) -> dict[int, int]:
    """What the next step computes: tokens by request."""
    return {chunk.sequence.request_id: chunk.count for chunk in machine.step().chunks}


def test_a_step_computes_as_many_tokens_as_it_may() -> None:
    machine = Machine(make_scheduler(num_blocks=40, budget=3))
    for request_id, num_tokens in enumerate((1, 1, 1, 9)):
        machine.scheduler.add(make_sequence(request_id, num_tokens, max_tokens=30))
    assert chunks_of(machine) == {0: 1, 1: 1, 2: 1}
    machine.scheduler.max_step_tokens = 4
    assert chunks_of(machine) == {0: 1, 1: 1, 2: 1, 3: 1}, "a newcomer may begin with the last one"
    assert chunks_of(machine) == {0: 1, 1: 1, 2: 1, 3: 1}, "and a prompt under way go on with it"
    machine.scheduler.max_step_tokens = 2
    assert chunks_of(machine) == {0: 1, 1: 1}, "who came first goes first"
    machine.scheduler.max_step_tokens = 8
    assert chunks_of(machine) == {0: 1, 1: 1, 2: 1, 3: 5}
    assert chunks_of(machine) == {0: 1, 1: 1, 2: 1, 3: 2}


def test_no_more_run_than_may() -> None:
    machine = Machine(make_scheduler(num_blocks=40, max_running=2, budget=100))
    for request_id in range(3):
        machine.scheduler.add(make_sequence(request_id, 4, max_tokens=2))
    assert chunks_of(machine) == {0: 4, 1: 4}
    assert chunks_of(machine) == {0: 1, 1: 1}
    assert chunks_of(machine) == {2: 4}


def test_a_newcomer_gets_the_last_free_block() -> None:
    machine = Machine(make_scheduler(num_blocks=3, budget=100))
    for request_id in range(3):
        machine.scheduler.add(make_sequence(request_id, 16, max_tokens=1))
    assert chunks_of(machine) == {0: 16, 1: 16, 2: 16}


def test_a_sequence_grows_into_the_last_free_block_without_taking_anybody_s() -> None:
    machine = Machine(make_scheduler(num_blocks=3, budget=100))
    machine.scheduler.add(make_sequence(0, 16, max_tokens=9))
    machine.scheduler.add(make_sequence(1, 8, max_tokens=8))
    while machine.scheduler.running or machine.scheduler.waiting:
        machine.step()
    assert machine.scheduler.num_preemptions == 0


def test_who_is_put_back_is_first_in_the_queue_and_the_older_ones_go_on_in_that_step() -> None:
    machine = Machine(make_scheduler(num_blocks=4, budget=100))
    for request_id, num_tokens in enumerate((17, 16, 16)):
        machine.scheduler.add(make_sequence(request_id, num_tokens))
    assert chunks_of(machine) == {0: 17, 1: 16, 2: 16}
    machine.scheduler.add(make_sequence(3, 4))
    assert chunks_of(machine) == {0: 1, 1: 1}, "the second takes the third's block"
    assert [sequence.request_id for sequence in machine.scheduler.waiting] == [2, 3]


def test_a_picture_whose_filling_takes_all_that_is_left_waits() -> None:
    machine = Machine(make_scheduler(num_blocks=20, num_pages=9, budget=6))
    machine.scheduler.add(make_sequence(0, 4, ("a",)))  # 5 with its page
    machine.scheduler.add(make_sequence(1, 1, ("b",)))
    assert chunks_of(machine) == {0: 4}
    assert chunks_of(machine) == {0: 1, 1: 1}


def test_a_prompt_of_one_token_is_answered() -> None:
    machine = Machine(make_scheduler())
    machine.scheduler.add(make_sequence(0, 1, max_tokens=1))
    machine.step()
    assert machine.finished == [0]


@pytest.mark.parametrize(("num_tokens", "computed"), [(32, 16), (33, 1), (47, 15), (48, 16)])
def test_of_a_known_prompt_whole_blocks_are_shared_but_for_its_last_token(num_tokens: int, computed: int) -> None:
    machine = Machine(make_scheduler(num_blocks=3 + (num_tokens > 47), budget=100))  # just enough for one of them
    for request_id in range(2):
        sequence = make_sequence(0, num_tokens, max_tokens=1)
        sequence.request_id = request_id
        machine.scheduler.add(sequence)
        assert chunks_of(machine) == {request_id: computed if request_id else num_tokens}
        assert sequence.num_cached_tokens == (num_tokens - computed if request_id else 0)
    assert (machine.scheduler.num_prefix_queries, machine.scheduler.num_prefix_hits) == (
        2 * num_tokens,
        num_tokens - computed,
    )


def test_a_chunk_shares_its_blocks_once_it_is_computed_and_not_before() -> None:
    machine = Machine(make_scheduler(num_blocks=40, budget=20))
    first, second = make_sequence(0, 50), make_sequence(0, 50)
    second.request_id = 1
    machine.scheduler.add(first)
    machine.step()  # one block and a quarter
    machine.scheduler.add(second)
    machine.scheduler.max_step_tokens = 200
    assert chunks_of(machine) == {0: 30, 1: 34}


def test_pictures_are_counted_as_they_are_found() -> None:
    machine = Machine(make_scheduler(num_blocks=40, num_pages=8, budget=100))
    first, second = make_sequence(0, 10, ("a", "b", "a")), make_sequence(1, 10, ("b", "f"))
    for sequence, found in ((first, 0), (second, 1)):
        machine.scheduler.add(sequence)
        machine.step()
        assert sequence.num_cached_images == found
        assert sequence.latents == {}, "they are on pages now"
    assert (machine.scheduler.num_image_queries, machine.scheduler.num_image_hits) == (4, 1)


def test_a_sequence_put_back_is_counted_once() -> None:
    machine = Machine(make_scheduler(num_blocks=5, budget=64))
    sequences = [make_sequence(0, 30, ("a",), max_tokens=30), make_sequence(1, 30, ("b",), max_tokens=30)]
    for sequence in sequences:
        machine.scheduler.add(sequence)
    while machine.scheduler.running or machine.scheduler.waiting:
        machine.step()
    scheduler = machine.scheduler
    assert scheduler.num_preemptions == 1
    assert (scheduler.num_image_queries, scheduler.num_image_hits) == (2, 0)
    assert (scheduler.num_prefix_queries, scheduler.num_prefix_hits) == (60, 0)
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 0]


def test_what_was_removed_holds_nothing() -> None:
    machine = Machine(make_scheduler(num_blocks=20, budget=100))
    running, waiting = make_sequence(0, 20, ("a",)), make_sequence(1, 20, ("b",))
    machine.scheduler.add(running)
    machine.step()
    machine.scheduler.add(waiting)
    for sequence in (waiting, running):
        machine.scheduler.remove(sequence)
        machine.scheduler.remove(sequence)
        assert (sequence.block_table, sequence.image_pages) == ([], {})
    machine.check()
    assert not machine.scheduler.running and not machine.scheduler.waiting


def test_a_part_of_a_step_fills_the_pages_that_it_looks_at_and_no_others() -> None:
    scheduler = make_scheduler(num_blocks=20, num_pages=8, budget=100)
    for request_id, keys in enumerate((("a", "b"), (), ("f",))):
        scheduler.add(make_sequence(request_id, 10, keys))
    step = scheduler.schedule()
    assert len(step.chunks) == len(step.image_fills) == 3
    for chunk, fills in zip(step.chunks, (step.image_fills[:2], [], step.image_fills[2:]), strict=True):
        part = step.only([chunk])
        assert (part.chunks, part.image_fills, part.lost_images) == ([chunk], fills, [])


def wait_for_a_page(machine: Machine, num_waiting: int) -> None:
    """One holds the only page for long; so many others wait for it, numbers 1 to `num_waiting`."""
    machine.scheduler.add(make_sequence(0, 20, ("a",), max_tokens=400))
    machine.step()
    for request_id in range(1, num_waiting + 1):
        machine.scheduler.add(make_sequence(request_id, 20, ("b",), max_tokens=4))


@pytest.mark.parametrize(("num_waiting", "finished"), [(LOOK_AHEAD - 1, [LOOK_AHEAD]), (LOOK_AHEAD, [])])
def test_a_step_looks_past_so_many_that_find_no_place(num_waiting: int, finished: list[int]) -> None:
    machine = Machine(make_scheduler(num_blocks=1000, num_pages=1, max_running=32, budget=512))
    wait_for_a_page(machine, num_waiting)
    machine.scheduler.add(make_sequence(num_waiting + 1, 20, max_tokens=1))
    machine.step()
    assert machine.finished == finished


@pytest.mark.parametrize("max_overtaken", [0, 1, 3])
@pytest.mark.parametrize("at_once", [True, False])
def test_one_without_a_place_is_passed_so_many_times_and_then_all_wait_with_it(
    max_overtaken: int, at_once: bool
) -> None:
    machine = Machine(
        make_scheduler(num_blocks=1000, num_pages=1, max_running=32, budget=512, max_overtaken=max_overtaken)
    )
    wait_for_a_page(machine, 1)
    for request_id in range(2, 9):
        machine.scheduler.add(make_sequence(request_id, 20, max_tokens=1))
        if not at_once:
            machine.step()
    machine.step()
    assert machine.finished == list(range(2, 2 + max_overtaken))


def test_a_second_one_that_waits_does_not_open_the_way_again() -> None:
    machine = Machine(make_scheduler(num_blocks=1000, num_pages=1, max_running=32, budget=512, max_overtaken=2))
    wait_for_a_page(machine, 1)
    machine.scheduler.add(make_sequence(2, 20, max_tokens=1))
    machine.step()
    machine.scheduler.add(make_sequence(3, 20, ("b",), max_tokens=1))
    for request_id in range(4, 9):
        machine.scheduler.add(make_sequence(request_id, 20, max_tokens=1))
    machine.step()
    assert machine.finished == [2, 4], "the first was passed twice, the second once"


def test_one_whose_pictures_are_lost_holds_nobody_up() -> None:
    machine = Machine(make_scheduler(num_pages=2))
    lost = make_sequence(0, 4, ("a", "b"))
    del lost.latents["b"]
    machine.scheduler.add(lost)
    machine.scheduler.add(make_sequence(1, 4, max_tokens=1))
    step = machine.step()
    assert step.lost_images == [(lost, ("b",))]
    assert machine.finished == [1]


def test_pages_that_just_suffice_are_taken() -> None:
    machine = Machine(make_scheduler(num_blocks=20, num_pages=2, budget=100))
    machine.scheduler.add(make_sequence(0, 4, ("a",)))
    machine.scheduler.add(make_sequence(1, 4, ("a", "b")))
    assert chunks_of(machine) == {0: 4, 1: 4}


def test_what_just_fits_is_accepted_and_a_refusal_names_its_field() -> None:
    scheduler = make_scheduler(num_blocks=2, num_pages=2)
    scheduler.add(make_sequence(0, 24, ("a", "b"), max_tokens=8))
    for refused, param in (
        (make_sequence(1, 24, max_tokens=9), "max_tokens"),
        (make_sequence(1, 4, ("a", "b", "f")), "images"),
    ):
        with pytest.raises(TooLarge) as too_large:
            scheduler.add(refused)
        assert too_large.value.param == param
    scheduler.max_waiting = 1
    with pytest.raises(Overloaded) as overloaded:
        scheduler.add(make_sequence(1, 4))
    assert overloaded.value.retry_after_s
    assert len(scheduler.waiting) == 1


def test_decodes_go_before_a_long_prompt() -> None:
    machine = Machine(make_scheduler(num_blocks=40, budget=20))
    machine.scheduler.add(make_sequence(0, 5, max_tokens=30))
    machine.step()
    machine.scheduler.add(make_sequence(1, 100, max_tokens=2))
    for _ in range(5):
        chunks = {chunk.sequence.request_id: chunk.count for chunk in machine.step().chunks}
        assert chunks[0] == 1
        assert chunks[1] == 19


def test_the_youngest_is_preempted_keeps_its_pictures_and_finishes() -> None:
    machine = Machine(make_scheduler(num_blocks=5, budget=64))
    machine.scheduler.add(make_sequence(0, 30, ("a",), max_tokens=30))
    machine.scheduler.add(make_sequence(1, 30, ("b",), max_tokens=30))
    while machine.scheduler.num_preemptions == 0:
        machine.step()
    assert [sequence.request_id for sequence in machine.scheduler.waiting] == [1]
    assert machine.scheduler.waiting[0].image_pages.keys() == {"b"}
    while machine.scheduler.running or machine.scheduler.waiting:
        machine.step()
    assert machine.finished == [0, 1]


def test_a_shared_prefix_is_computed_once_and_another_picture_shares_nothing() -> None:
    machine = Machine(make_scheduler(num_blocks=40, budget=100))
    for request_id, key in enumerate(("a", "a", "b")):
        sequence = make_sequence(0, 40, (key,), max_tokens=1)
        sequence.request_id = request_id
        machine.scheduler.add(sequence)
        step = machine.step()
        assert step.chunks[0].count == (40 - 2 * BLOCK_SIZE if request_id == 1 else 40)


def test_a_picture_evicted_while_its_request_waited_is_reported_lost() -> None:
    machine = Machine(make_scheduler(num_pages=1, max_running=1))
    first = make_sequence(0, 4, ("a",), max_tokens=1)
    machine.scheduler.add(first)
    machine.step()
    second, third = make_sequence(1, 4, ("b",), max_tokens=1), make_sequence(2, 4, ("a",), max_tokens=1)
    third.latents = {}  # resident when it came
    machine.scheduler.add(second)
    machine.scheduler.add(third)
    machine.step()
    machine.step()
    assert machine.lost == [2] and machine.finished == [0, 1]


def test_a_full_queue_is_overloaded() -> None:
    scheduler = Scheduler(KVBlocks(4), ImagePages(1), 1, 1, 8)
    scheduler.add(make_sequence(0, 4))
    with pytest.raises(Overloaded):
        scheduler.add(make_sequence(1, 4))


def test_a_request_that_could_never_fit_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=2, num_pages=1)
    with pytest.raises(TooLarge, match="holds 32"):
        scheduler.add(make_sequence(0, 30, max_tokens=3))
    with pytest.raises(TooLarge, match="holds 1"):
        scheduler.add(make_sequence(0, 10, ("a", "b")))
    with pytest.raises(TooLarge, match="take 2 pages"):
        scheduler.add(make_sequence(0, 10, ("c",)))


def test_a_picture_that_is_resident_counts_with_all_its_pages() -> None:
    machine = Machine(make_scheduler(num_pages=4, max_running=1))
    machine.scheduler.add(make_sequence(0, 4, ("d",), max_tokens=1))
    machine.step()
    again = make_sequence(1, 4, ("d", "c"), max_tokens=1)
    del again.latents["d"]
    with pytest.raises(TooLarge, match="take 5 pages"):
        machine.scheduler.add(again)


def test_pictures_to_fill_count_against_the_budget() -> None:
    machine = Machine(make_scheduler(num_blocks=100, num_pages=9, max_running=9, budget=40, fill_tokens=10))
    machine.scheduler.add(make_sequence(0, 5, ("c",), max_tokens=30))  # 20 for its pages
    machine.scheduler.add(make_sequence(1, 10, ("a",), max_tokens=30))  # 10, and 5 are left
    machine.scheduler.add(make_sequence(2, 10, ("b",), max_tokens=30))  # not now
    assert [chunk.count for chunk in machine.step().chunks] == [5, 5]
    assert [chunk.count for chunk in machine.step().chunks] == [1, 10, 5]


def test_pictures_that_cost_more_than_a_step_has_are_filled_all_the_same() -> None:
    machine = Machine(make_scheduler(num_blocks=100, num_pages=9, max_running=9, budget=12, fill_tokens=10))
    machine.scheduler.add(make_sequence(0, 5, ("e",), max_tokens=30))
    machine.scheduler.add(make_sequence(1, 5, ("d",), max_tokens=30))
    assert [(chunk.sequence.request_id, chunk.count) for chunk in machine.step().chunks] == [(0, 1)]
    assert [(chunk.sequence.request_id, chunk.count) for chunk in machine.step().chunks] == [(1, 1), (0, 4)]


def test_pictures_that_with_those_present_are_more_than_the_pool_are_reported_lost() -> None:
    """A key has always as many pages; one that had other ones would wait for ever, and others behind it."""
    machine = Machine(make_scheduler(num_pages=4))
    machine.scheduler.add(make_sequence(0, 4, ("d",), max_tokens=1))
    liar = make_sequence(1, 4, ("d", "c"), max_tokens=1)
    liar.latents["d"] = liar.latents["d"][:1]
    machine.scheduler.add(liar)
    machine.step()
    machine.step()
    assert (machine.finished, machine.lost) == ([0], [1])


@pytest.mark.parametrize("max_running", [4, 1])
def test_a_prompt_takes_the_whole_step_alone_and_little_of_one_in_which_others_decode(max_running: int) -> None:
    scheduler = make_scheduler(num_blocks=100, max_running=max_running, budget=50, max_prefill_tokens=7)
    machine = Machine(scheduler)
    scheduler.add(make_sequence(1, 60, max_tokens=4))
    assert [chunk.count for chunk in machine.step().chunks] == [50]
    assert [chunk.count for chunk in machine.step().chunks] == [10]
    scheduler.add(make_sequence(2, 30, max_tokens=4))
    scheduler.add(make_sequence(3, 30, max_tokens=4))
    counts = [[chunk.count for chunk in machine.step().chunks] for _ in range(4)]
    if max_running == 4:
        assert counts[:3] == [[1, 7], [1, 3, 4], [1, 3, 4]]  # half is the oldest's
        assert counts[3] == [30 - 6, 30 - 15]  # the first has ended: nobody decodes any more
    else:
        assert counts == [[1], [1], [1], [30]]


def test_what_decodes_attend_to_is_the_loss_of_prompts_beside_them_up_to_a_quarter() -> None:
    scheduler = make_scheduler(num_blocks=100, budget=50, max_prefill_tokens=16, reading_cost=0.25)
    machine = Machine(scheduler)
    scheduler.add(make_sequence(1, 20, max_tokens=40))
    machine.step()
    scheduler.add(make_sequence(2, 300, max_tokens=2))
    counts = [[chunk.count for chunk in machine.step().chunks] for _ in range(30)]
    assert counts[:6] == [[1, 11]] + [[1, 10]] * 4 + [[1, 9]]  # of 20, 21, … positions
    assert counts[28:] == [[1, 4]] * 2


def test_a_short_prompt_waits_for_no_long_one() -> None:
    scheduler = make_scheduler(num_blocks=100, max_running=9, budget=40, max_prefill_tokens=16)
    machine = Machine(scheduler)
    for request_id in range(4):
        scheduler.add(make_sequence(request_id, 300, max_tokens=1))
    machine.step()
    machine.step()
    scheduler.add(make_sequence(4, 30, max_tokens=1))
    steps = []
    while 4 not in machine.finished:
        steps.append({chunk.sequence.request_id: chunk.count for chunk in machine.step().chunks})
    assert len(steps) <= 4
    assert all(chunks[0] == 20 for chunks in steps), "half is the oldest's"
    while scheduler.running or scheduler.waiting:
        machine.step()
    assert machine.finished[1] == 0


def test_a_token_far_behind_its_start_costs_more_of_a_step() -> None:
    scheduler = make_scheduler(num_blocks=100, budget=50, max_prefill_tokens=32, position_cost=0.01)
    machine = Machine(scheduler)
    scheduler.add(make_sequence(1, 20, max_tokens=30))
    machine.step()
    scheduler.add(make_sequence(2, 150, max_tokens=2))
    counts = [[chunk.count for chunk in machine.step().chunks] for _ in range(7)]
    assert counts == [[1, 32], [1, 24], [1, 20], [1, 18], [1, 16], [1, 15], [1, 14]]  # 32 / (1 + start / 100)


def test_a_prefix_that_is_cached_counts_as_standing_before() -> None:
    scheduler = make_scheduler(num_blocks=100, budget=40, position_cost=0.125)
    machine = Machine(scheduler)
    first, again = make_sequence(1, 33, max_tokens=1), make_sequence(1, 33 + 40, max_tokens=1)
    scheduler.add(first)
    while scheduler.running or scheduler.waiting:
        machine.step()
    scheduler.add(again)
    scheduler.add(make_sequence(2, 40, max_tokens=1))
    chunks = [(chunk.start, chunk.count) for chunk in machine.step().chunks]
    assert chunks == [(32, 8)]  # five each: nothing is left for another


def test_a_token_dearer_than_a_step_is_computed_all_the_same() -> None:
    scheduler = make_scheduler(num_blocks=100, budget=5, position_cost=1.0)
    machine = Machine(scheduler)
    scheduler.add(make_sequence(1, 9, max_tokens=2))
    counts = [[chunk.count for chunk in machine.step().chunks] for _ in range(6)]
    assert counts == [[5], [1], [1], [1], [1], [1]]


def test_a_prompt_under_way_has_all_its_blocks_in_a_row() -> None:
    scheduler = make_scheduler(num_blocks=20, budget=24, max_prefill_tokens=16)
    machine = Machine(scheduler)
    scheduler.add(make_sequence(1, 20, max_tokens=50))
    machine.step()
    scheduler.add(make_sequence(2, 100, max_tokens=2))
    for _ in range(5):
        chunk = machine.step().chunks[-1]
        assert chunk.sequence.block_table == list(range(2, 9))
    assert scheduler.blocks.num_used == 9


def test_a_prompt_starts_when_all_of_it_has_room() -> None:
    scheduler = make_scheduler(num_blocks=8, budget=24)
    machine = Machine(scheduler)
    scheduler.add(make_sequence(1, 60, max_tokens=3))
    machine.step()
    scheduler.add(make_sequence(2, 80, max_tokens=3))
    while not machine.finished:
        assert len(scheduler.waiting) == 1
        machine.step()
    while scheduler.running or scheduler.waiting:
        machine.step()
    assert (machine.finished, scheduler.num_preemptions) == ([1, 2], 0)
