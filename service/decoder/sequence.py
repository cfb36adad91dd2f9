"""One request inside the decoder: its tokens, what they see, what it holds, and how far it is. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from service.contract import SamplingParams, Timings, Usage, ValidRequest
from service.decoder.kv_blocks import BLOCK_SIZE, hash_block
from service.families.family import Sight, sights

See = Callable[[Sight, int | None, int | None], Sight]


class Sequence:
    """`latents[key]`: what its pictures look like, for those sent along, one row a page; dropped once on pages.

    Every token at an index below `num_computed` has its self-K/V in `block_table`. A sequence is decoding when just
    its newest token is not computed yet. `stop_token_ids`: those that end it, EOS included.
    """

    def __init__(
        self,
        request_id: int,
        request: ValidRequest,
        latents: dict[str, Any],
        see: See,
        arrival_s: float,
        seed: int,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.request_id = request_id
        self.sampling: SamplingParams = request.sampling
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        self.token_ids = list(request.input_ids)
        self.num_prompt_tokens = len(request.input_ids)
        self.image_keys = request.image_keys
        self.cache_salt = request.cache_salt
        self.latents = latents
        self.image_pages: dict[str, tuple[int, ...]] = {}  # held pages by key; empty until admitted
        self.block_table: list[int] = []
        self.num_computed = 0
        self.num_published = 0  # blocks of the table that others can find
        self.num_overtaken = 0  # by later ones, while it waited for a place
        self.was_preempted = False
        self.unsent: list[int] = []  # tokens not delivered yet
        self._see = see
        self._sights = sights(see, request.input_ids, request.image_positions)
        self._hashes: list[bytes] = []
        self.num_cached_images = 0
        self.num_cached_tokens: int | None = None  # of the prompt, at first admission
        self.arrival_s = arrival_s
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def distinct_keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.image_keys))

    def append(self, token_id: int) -> None:
        self._sights.append(self._see(self._sights[-1], self.token_ids[-1], None))
        self.token_ids.append(token_id)
        self.unsent.append(token_id)

    def pages(self, position: int) -> tuple[int, ...]:
        """All pages of all pictures that the token at `position` sees; () if it sees none."""
        return tuple(page for ordinal in self._sights[position] for page in self.image_pages[self.image_keys[ordinal]])

    def runs(self, start: int, end: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The tokens [start, end) cut where the sight changes: how many, and the pages that they see."""
        for _, positions in groupby(range(start, end), key=self._sights.__getitem__):
            first, *others = positions
            yield 1 + len(others), self.pages(first)

    def block_hashes(self, count: int) -> list[bytes]:
        """Chained hashes of the first `count` blocks, which must be full."""
        for index in range(len(self._hashes), count):
            span = slice(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
            keys = [tuple(self.image_keys[ordinal] for ordinal in sight) for sight in self._sights[span]]
            previous = self._hashes[-1] if self._hashes else self.cache_salt
            self._hashes.append(hash_block(previous, self.token_ids[span], keys))
        return self._hashes[:count]

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_generated,
            images=len(self.image_keys),
            cached_images=self.num_cached_images,
            cached_prompt_tokens=self.num_cached_tokens or 0,
        )

    def timings(self, now_s: float) -> Timings:
        scheduled = self.first_scheduled_s or now_s
        first_token = self.first_token_s or now_s
        return Timings(
            queue_ms=(scheduled - self.arrival_s) * 1e3,
            prefill_ms=(first_token - scheduled) * 1e3,
            decode_ms=(now_s - first_token) * 1e3,
        )
