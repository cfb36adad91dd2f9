"""Which tokens are computed in the next step. Pure accounting, no torch.

A step has a token budget, a smaller one if somebody decodes: decodes take theirs first, so that a long prompt, cut into
chunks, never stalls anybody's tokens. Half of what is left is the oldest prompt's under way, the rest newcomers' and
then others', the shortest first: no prompt waits for the end of a long one, and each becomes the oldest. A prompt's
token far behind its start costs more than one, since it attends to all before it; what decodes attend to is prompts'
loss, too. When self-K/V blocks run out, the sequence that was admitted last gives its blocks up and is computed again
later, before all others that wait. It keeps its pictures' pages, since their latents are gone.

Newcomers come in their order, each gets the blocks of its whole prompt at once, so that they lie in a row if they can,
and one that finds no page or too few blocks is passed by later ones that do find theirs, but only `max_overtaken`
times; then everybody behind it waits with it. So nobody is starved: the sequence admitted first can always finish,
because one that could never fit is refused at once and it may take everybody else's blocks; those put back are first
in the queue, where nobody passes them, and finish next; and then a newcomer finds all that it needs.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from service.decoder.image_pages import ImagePages, Pages
from service.decoder.kv_blocks import BLOCK_SIZE, KVBlocks
from service.decoder.sequence import Sequence
from service.errors import Overloaded, TooLarge

LOOK_AHEAD = 64  # newcomers without a place that one step looks past
LEAST_SHARE = 0.25  # of their budget that prompts get, whatever decodes attend to


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + count) of a sequence; the last one's logits are wanted if nothing follows it yet."""

    sequence: Sequence
    start: int
    count: int
    samples: bool  # whether a token is drawn from them

    @classmethod
    def next(cls, sequence: Sequence, count: int) -> Chunk:
        """The first `count` tokens of a sequence that are not computed yet."""
        return cls(sequence, sequence.num_computed, count, samples=count == sequence.num_uncomputed)


@dataclass
class Step:
    chunks: list[Chunk] = field(default_factory=list)
    image_fills: list[tuple[Pages, Any]] = field(default_factory=list)  # with latents; before chunks are computed
    lost_images: list[tuple[Sequence, tuple[str, ...]]] = field(default_factory=list)  # evicted while waiting

    def only(self, chunks: list[Chunk]) -> Step:
        """These chunks of it, with what they need."""
        seen = {pages for chunk in chunks for pages in chunk.sequence.image_pages.values()}
        return Step(chunks, [(pages, latents) for pages, latents in self.image_fills if pages in seen])


class Scheduler:
    def __init__(
        self,
        blocks: KVBlocks,
        images: ImagePages,
        max_running: int,
        max_waiting: int,
        max_step_tokens: int,
        max_overtaken: int = 64,
        fill_tokens: int = 1,  # what it costs of the budget to fill a page
        max_prefill_tokens: int | None = None,  # of a step in which others decode, beside their tokens
        position_cost: float = 0.0,  # what each position before a prompt's token adds to its cost of 1
        reading_cost: float = 0.0,  # what each position that a decode attends to takes from prompts beside it
    ) -> None:
        self.blocks, self.images = blocks, images
        self.max_running, self.max_waiting, self.max_step_tokens = max_running, max_waiting, max_step_tokens
        self.max_overtaken, self.fill_tokens = max_overtaken, fill_tokens
        self.max_prefill_tokens, self.position_cost, self.reading_cost = max_prefill_tokens, position_cost, reading_cost
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_image_queries = self.num_image_hits = 0
        self.num_prefix_queries = self.num_prefix_hits = 0  # prompt tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises Overloaded when the queue is full, TooLarge if it could never fit."""
        max_tokens = sequence.num_prompt_tokens + sequence.sampling.max_tokens
        if max_tokens > self.blocks.num_blocks * BLOCK_SIZE:
            raise TooLarge(
                f"prompt and max_tokens are {max_tokens} tokens; the K/V cache holds "
                f"{self.blocks.num_blocks * BLOCK_SIZE}.",
                param="max_tokens",
            )
        num_pages = sum(
            self.images.num_pages_of(key) or len(sequence.latents.get(key, ())) for key in sequence.distinct_keys
        )
        if num_pages > self.images.num_pages:
            raise TooLarge(
                f"the pictures take {num_pages} pages; the picture cache holds {self.images.num_pages}.", param="images"
            )
        if len(self.waiting) >= self.max_waiting:
            raise Overloaded("The decoder's queue is full; try again later.", retry_after_s=1)
        self.waiting.append(sequence)

    def schedule(self) -> Step:
        step = Step()
        budget = self._schedule_decodes(step)
        if budget <= 0:
            return step
        prompts = [sequence for sequence in self.running if sequence.num_uncomputed > 1]
        oldest, others = prompts[:1], sorted(prompts[1:], key=lambda sequence: sequence.num_uncomputed)
        of_oldest = sum(self._least(sequence, budget) for sequence in oldest)
        left = self._schedule_waiting(step, budget - of_oldest)
        for sequence in others:
            if left > 0:
                left -= self._schedule_prompt(sequence, left, step)
        for sequence in oldest:
            self._schedule_prompt(sequence, of_oldest + max(left, 0), step)
        return step

    def computed(self, chunk: Chunk) -> None:
        """A chunk's self-K/V is in its blocks, its pictures on their pages: count it, and publish what is complete.

        Not to be called for a chunk that failed: nothing of it is published.
        """
        sequence = chunk.sequence
        for key in sequence.image_pages:
            self.images.filled(key)
        sequence.num_computed = chunk.start + chunk.count
        num_full = sequence.num_computed // BLOCK_SIZE
        hashes = sequence.block_hashes(num_full)
        for index in range(sequence.num_published, num_full):
            self.blocks.publish(sequence.block_table[index], hashes[index])
        sequence.num_published = max(sequence.num_published, num_full)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that finished or was cancelled, in whatever state, and free all that it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release_blocks(sequence)
        for key in sequence.image_pages:
            self.images.release(key)
        sequence.image_pages = {}

    def _schedule_decodes(self, step: Step) -> int:
        """The tokens of all who decode; returns the budget left for prompts."""
        decoding = [sequence for sequence in self.running if sequence.num_uncomputed == 1]
        budget = self.max_step_tokens
        if decoding and self.max_prefill_tokens is not None:
            reading = self.reading_cost * sum(sequence.num_computed for sequence in decoding)
            least = math.ceil(self.max_prefill_tokens * LEAST_SHARE)
            budget = min(budget, len(decoding) + max(self.max_prefill_tokens - math.ceil(reading), least))
        for sequence in decoding:
            if budget <= 0:
                break
            if sequence not in self.running:
                continue  # preempted for an older one in this very step
            if self._grow(sequence, step):
                step.chunks.append(Chunk.next(sequence, 1))
                budget -= 1
        return budget

    def _schedule_prompt(self, sequence: Sequence, budget: int, step: Step) -> int:
        """Tokens of a prompt under way, which has its blocks: one at least. Returns what they cost."""
        cost = self._token_cost(sequence.num_computed)
        count = min(sequence.num_uncomputed, max(int(budget / cost), 1))
        step.chunks.append(Chunk.next(sequence, count))
        return math.ceil(count * cost)

    def _least(self, oldest: Sequence, budget: int) -> int:
        """What nobody takes from the oldest prompt: half of the budget, or a token; no more than it needs."""
        cost = self._token_cost(oldest.num_computed)
        return math.ceil(min(max(budget / 2, cost), oldest.num_uncomputed * cost))

    def _token_cost(self, start: int) -> float:
        """Of a prompt's token with `start` before it, in tokens of a step's budget."""
        return 1 + start * self.position_cost

    def _schedule_waiting(self, step: Step, budget: int) -> int:
        """Chunks of newcomers, in their order but for those without a place that are passed; returns what is left."""
        passed: list[Sequence] = []
        for sequence in tuple(self.waiting):
            if budget <= 0 or len(self.running) == self.max_running or self.blocks.num_free == 0:
                break
            num_fills = len(step.image_fills)
            count = self._admit(sequence, budget, step)
            if count is None:
                passed.append(sequence)
                if not self._may_be_overtaken(sequence) or len(passed) == LOOK_AHEAD:
                    break
                continue
            self.waiting.remove(sequence)
            if count == 0:
                continue
            self.running.append(sequence)
            step.chunks.append(Chunk.next(sequence, count))
            budget -= math.ceil(count * self._token_cost(sequence.num_computed))
            budget -= self.fill_tokens * sum(len(pages) for pages, _ in step.image_fills[num_fills:])
            for other in passed:
                other.num_overtaken += 1
            if not all(map(self._may_be_overtaken, passed)):
                break
        return budget

    def _may_be_overtaken(self, sequence: Sequence) -> bool:
        return not sequence.was_preempted and sequence.num_overtaken < self.max_overtaken

    def _grow(self, sequence: Sequence, step: Step) -> bool:
        """A block for one more token if it needs one, taken from a younger sequence if need be.

        False: itself was preempted.
        """
        needed = num_blocks(sequence.num_computed + 1) - len(sequence.block_table)
        while needed > self.blocks.num_free:
            victim = self.running[-1]
            self._preempt(victim, step)
            if victim is sequence:
                return False
        if needed > 0:
            sequence.block_table += self.blocks.allocate(needed)
        return True

    def _preempt(self, victim: Sequence, step: Step) -> None:
        self.running.remove(victim)
        step.chunks = [chunk for chunk in step.chunks if chunk.sequence is not victim]
        self._release_blocks(victim)
        victim.was_preempted = True
        self.waiting.appendleft(victim)  # before all who wait for pages, since it holds some
        self.num_preemptions += 1

    def _admit(self, sequence: Sequence, budget: int, step: Step) -> int | None:
        """Give one of the waiting what it needs to start; returns how many tokens to compute.

        None: not yet, and nothing was taken. 0: never, its pictures were evicted while it waited. The first in a step
        that has pictures to fill gets them whatever they cost, and one token at least.
        """
        missing = [key for key in sequence.distinct_keys if not self.images.has_pages(key)]
        lost = tuple(key for key in missing if key not in sequence.latents)
        num_fills = sum(len(sequence.latents.get(key, ())) for key in missing)
        if num_fills + self.images.num_pages_of(*sequence.distinct_keys) > self.images.num_pages:
            lost = sequence.distinct_keys  # under one of its keys lies what has more pages than came with it
        if lost:
            step.lost_images.append((sequence, lost))
            return 0
        if num_fills > self.images.num_insertable(set(sequence.distinct_keys)):
            return None
        fill_cost = num_fills * self.fill_tokens
        if fill_cost > 0 and fill_cost >= budget and step.image_fills:
            return None
        num_reusable = (len(sequence.token_ids) - 1) // BLOCK_SIZE  # the last token is always computed: its logits
        cached = self.blocks.lookup(sequence.block_hashes(num_reusable))
        num_cached = len(cached) * BLOCK_SIZE
        affordable = int((budget - fill_cost) / self._token_cost(num_cached))
        count = min(len(sequence.token_ids) - num_cached, max(affordable, 1))
        needed = num_blocks(len(sequence.token_ids)) - len(cached)
        if needed > self.blocks.num_allocatable(cached):
            return None
        self.blocks.share(cached)
        sequence.block_table = cached + self.blocks.allocate(needed)
        sequence.num_computed = num_cached
        sequence.num_published = len(cached)
        self._hold_images(sequence, missing, step)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = num_cached
            self.num_prefix_queries += sequence.num_prompt_tokens
            self.num_prefix_hits += num_cached
        return count

    def _hold_images(self, sequence: Sequence, missing: list[str], step: Step) -> None:
        if sequence.image_pages or not sequence.image_keys:
            return  # kept through a preemption, or none
        present = [key for key in sequence.distinct_keys if key not in missing]
        for key in present:  # before any insert, which might evict them
            sequence.image_pages[key] = self.images.hold(key)
        for key in missing:
            latents = sequence.latents[key]
            sequence.image_pages[key] = self.images.insert(key, len(latents))
            step.image_fills.append((sequence.image_pages[key], latents))
        sequence.latents = {}
        sequence.num_cached_images = len(present)
        self.num_image_queries += len(sequence.distinct_keys)
        self.num_image_hits += len(present)

    def _release_blocks(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = sequence.num_published = 0


def num_blocks(num_tokens: int) -> int:
    """How many blocks hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)
