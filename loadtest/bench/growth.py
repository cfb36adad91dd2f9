"""How speed and memory grow with users, context and pictures: our engine in process, and where each curve bends.

Memory is what the pools use: their tensors are measured, not computed, and stand beside what `service.capacity` says.
"""

from __future__ import annotations

import gc
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch import Tensor

from loadtest.bench.bounds import verdict
from loadtest.bench.peers.engine import InProcess
from loadtest.bench.scenario import BOS, VOCABULARY, Request, Scenario
from loadtest.charts import Line, line_chart, number, standalone
from service.capacity import BLOCK_SIZE, plan
from service.families import load_family
from tests.reliability.table import markdown

USERS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (64, 256, 1024, 2048, 4000)
PICTURES = (0, 1, 2, 4, 8)
NUM_SEQUENCES = 4  # of the last two
ANSWER = 64
STEPS = 24
KNEE = 0.8  # of the best rate
WITHIN = 0.05  # predicted bytes of measured ones
BLOCKS, PAGES = 2048, 128


@dataclass(frozen=True)
class Point:
    """`first_ms`: until all have their first token. `kv_bytes`: of blocks and pictures in use; `rss_bytes`: of all."""

    x: int
    users: int
    first_ms: float
    step_ms: float
    kv_bytes: float
    rss_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Of answers that have ANSWER tokens."""
        return self.users * ANSWER / (self.first_ms + (ANSWER - 1) * self.step_ms) * 1e3


@dataclass(frozen=True)
class Bytes:
    """Of a block of self-K/V and of a picture."""

    block: float
    picture: float


def knee(points: Sequence[Point]) -> int:
    """Where the rate rises: the first x with 80 % of the best. Where it falls: the last x that still has them."""
    good = [point.x for point in points if point.tokens_per_s >= KNEE * max(p.tokens_per_s for p in points)]
    rises = points[-1].tokens_per_s > points[0].tokens_per_s
    return good[0] if rises else good[-1]


def report(folder: Path, dtype: str, *, only: str, short: bool, plots: Path | None) -> str:
    """The tables: of curves whose name the pattern `only` finds, and of bytes. `plots`: where to put `growth_*.svg`."""
    measured = measured_bytes(folder, dtype)
    capacity = plan(load_family(folder).decoder, dtype, memory_bytes=0)
    predicted = Bytes(capacity.token_bytes * BLOCK_SIZE, capacity.page_bytes)
    system = InProcess(folder, dtype, kv_blocks=BLOCKS, image_pages=PAGES, max_running=max(USERS))
    at_users(system, 1, measured)  # warms
    tables = []
    for name, (at, places) in CURVES.items():
        if re.search(only, name):
            points = [at(system, x, measured) for x in (places[:3] if short else places)]
            tables.append(curve_table(name, points))
            if plots is not None:
                line = Line(name, "#1f5fa8", [(point.x, point.tokens_per_s) for point in points])
                svg = line_chart([line], name, "tokens/s", log_x=points[0].x > 0)
                (plots / f"growth_{name.split()[0].strip(',')}.svg").write_text(standalone(svg))
    return "\n\n".join([*tables, bytes_table(predicted, measured)])


def curve_table(name: str, points: Sequence[Point]) -> str:
    bend = knee(points)
    rows = [
        [
            f"{point.x:,}" + (" (knee)" if point.x == bend else ""),
            f"{point.first_ms:,.0f}",
            f"{point.step_ms:.1f}",
            f"{point.tokens_per_s:,.0f}",
            f"{point.kv_bytes / 1e6:,.1f}",
            f"{point.rss_bytes / 1e6:,.0f}",
        ]
        for point in points
    ]
    return markdown([name, "first tokens, ms", "a decode step, ms", "tokens/s", "K/V in use, MB", "process, MB"], rows)


def bytes_table(predicted: Bytes, measured: Bytes) -> str:
    rows = []
    for name, said, found in (
        (f"K/V of {BLOCK_SIZE} tokens", predicted.block, measured.block),
        ("K/V of a picture", predicted.picture, measured.picture),
    ):
        off = abs(said - found) / found
        rows.append([name, number(said), number(found), verdict(off, WITHIN, at_most=True)])
    return markdown(["bytes", "predicted", "measured", "off by"], rows)


def at_users(system: InProcess, users: int, size: Bytes) -> Point:
    scenario = Scenario("growth", users, 1, repeated=True)
    return _measure(system, scenario.requests(system.family.image_token_id, 0), users, size)


def at_context(system: InProcess, context: int, size: Bytes) -> Point:
    requests = []
    for user in range(NUM_SEQUENCES):
        rng = random.Random(f"{context} tokens of user {user}")
        requests.append(Request((BOS, *rng.choices(VOCABULARY, k=context - 1)), (), ANSWER))
    return _measure(system, requests, context, size)


def at_pictures(system: InProcess, pictures: int, size: Bytes) -> Point:
    scenario = Scenario(f"growth in pictures {pictures}", NUM_SEQUENCES, pictures)
    return _measure(system, scenario.requests(system.family.image_token_id, 0), pictures, size)


CURVES: dict[str, tuple[Callable[[InProcess, int, Bytes], Point], Sequence[int]]] = {
    "users, one picture for all": (at_users, USERS),
    f"tokens of context, {NUM_SEQUENCES} users": (at_context, CONTEXTS),
    f"pictures a question, {NUM_SEQUENCES} users": (at_pictures, PICTURES),
}


def _measure(system: InProcess, requests: Sequence[Request], x: int, size: Bytes) -> Point:
    """From pixels on; the memory is what they hold when all of them run."""
    latents: dict[str, Tensor] = {}
    begin_s = time.perf_counter()
    ids = [system.add(request, latents) for request in requests]
    system.first_tokens(ids)
    first_s = time.perf_counter() - begin_s
    step_s = statistics.median(system.step_times(STEPS))
    stats = system.engine.stats()
    for request_id in ids:
        system.engine.cancel(request_id)
    used = stats.kv_blocks_used * size.block + stats.image_pages_used * size.picture
    return Point(x, len(ids), 1e3 * first_s, 1e3 * step_s, used, psutil.Process().memory_info().rss)


def measured_bytes(folder: Path, dtype: str) -> Bytes:
    """What a block and a picture's page take: engines with more of them, and what all tensors of the process take."""
    few = _engine_bytes(folder, dtype, BLOCKS, PAGES)
    more_blocks = _engine_bytes(folder, dtype, 2 * BLOCKS, PAGES)
    more_pages = _engine_bytes(folder, dtype, BLOCKS, 2 * PAGES)
    return Bytes((more_blocks - few) / BLOCKS, (more_pages - few) / PAGES)


def _engine_bytes(folder: Path, dtype: str, blocks: int, pages: int) -> int:
    system = InProcess(folder, dtype, kv_blocks=blocks, image_pages=pages)
    total = tensor_bytes()
    del system
    gc.collect()
    return total


def tensor_bytes() -> int:
    """Of all storages that live in this process, whoever holds them."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]  # isinstance would run properties
    tensors = [
        tensor for tensor in found if tensor.device.type != "meta" and not tensor.is_mkldnn
    ]  # packed: no storage
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
