"""python -m loadtest.affinity: what hashing pictures to replicas does to the picture cache, as a table.

Gateways and decoders in one process and in virtual time: requests arrive at random, each looks at one picture and holds
its place for a while. The accounting is the service's own: the decoders' `ImagePages`, the gateways' `ResidentKeys`
and its second round when a picture was not resident after all. Only the computing is left out.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import itertools
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.ring import Ring
from service.decoder.image_pages import ImagePages
from service.gateway.pictures.residency import ResidentKeys

Route = Callable[[str], int]
POLICIES = ("any replica", "hash", "hash, bounded")


@dataclass(frozen=True)
class Fleet:
    """`pages`: pictures that one decoder holds. `latents`: pictures whose latents one gateway keeps.

    `believed`: pictures that a gateway remembers to be resident. `ask_first`: it tries without latents always, though
    it may never have seen the picture, because another gateway may have.
    """

    gateways: int = 2
    decoders: int = 4
    pages: int = 256
    latents: int = 400
    believed: int = 4096
    factor: float = 1.5
    ask_first: bool = False


@dataclass(frozen=True)
class Workload:
    """`pictures` asked for by Zipf's law with `exponent`; beside them one that `hot_share` of the requests want."""

    pictures: int = 5000
    exponent: float = 1.0
    hot_share: float = 0.0
    requests: int = 20_000
    running: int = 64  # on average, in the whole fleet

    def probabilities(self) -> list[float]:
        weights = [1 / rank**self.exponent for rank in range(1, self.pictures + 1)]
        total = sum(weights)
        rest = [(1 - self.hot_share) * weight / total for weight in weights]
        return [self.hot_share, *rest] if self.hot_share else rest


@dataclass
class Counts:
    requests: int = 0
    hits: int = 0  # resident where the request came first
    encoded: int = 0
    second_rounds: int = 0
    distinct: int = 0  # pictures that are resident somewhere, at the end
    busiest: float = 0.0  # time average of the fullest decoder's requests over the mean of all

    @property
    def hit_ratio(self) -> float:
        return self.hits / self.requests


def simulate(fleet: Fleet, work: Workload, policy: str, seed: int = 0) -> Counts:
    """The first quarter of the requests fills the caches and is not counted."""
    rng = random.Random(seed)
    decoders = [ImagePages(fleet.pages) for _ in range(fleet.decoders)]
    believed = [None if fleet.ask_first else ResidentKeys(fleet.believed) for _ in range(fleet.gateways)]
    kept = [ResidentKeys(fleet.latents) for _ in range(fleet.gateways)]
    ring = Ring(fleet.decoders, fleet.factor if policy == "hash, bounded" else None)
    route: Route = ring.server if policy != "any replica" else lambda _: rng.randrange(fleet.decoders)
    cumulative = list(itertools.accumulate(work.probabilities()))
    ending: list[tuple[float, int, str]] = []  # when, decoder, picture
    counts, now, busiest = Counts(), 0.0, 0.0
    for number in range(work.requests):
        now += rng.expovariate(work.running)  # a request lasts 1 on average
        while ending and ending[0][0] <= now:
            _, decoder, key = heapq.heappop(ending)
            decoders[decoder].release(key)
            ring.running[decoder] -= 1
        key = str(bisect.bisect(cumulative, rng.random() * cumulative[-1]))
        gateway = rng.randrange(fleet.gateways)
        counted = number >= work.requests // 4
        decoder = _serve(key, route, decoders, believed[gateway], kept[gateway], counts if counted else Counts())
        ring.running[decoder] += 1
        heapq.heappush(ending, (now + rng.expovariate(1.0), decoder, key))
        if counted:
            busiest += max(ring.running) * fleet.decoders / sum(ring.running)
    counts.busiest = busiest / counts.requests
    counts.distinct = len({key for key in map(str, range(work.pictures + 1)) if any(key in d for d in decoders)})
    return counts


def _serve(
    key: str,
    route: Route,
    decoders: list[ImagePages],
    believed: ResidentKeys | None,
    kept: ResidentKeys,
    counts: Counts,
) -> int:
    """A request up to its first token, in the gateway's order; returns the decoder that holds it.

    `believed` None: the gateway asks first.
    """
    counts.requests += 1
    send = believed is not None and bool(believed.missing([key]))
    decoder = route(key)
    counts.hits += key in decoders[decoder]
    if key not in decoders[decoder] and not send:  # IMAGE_NOT_RESIDENT: once more, with latents, through the balancer
        counts.second_rounds += 1
        send = True
        decoder = route(key)
    if send:
        counts.encoded += bool(kept.missing([key]))
        kept.add([key])
    if key in decoders[decoder]:
        decoders[decoder].hold(key)
    else:
        decoders[decoder].insert(key, 1)
        decoders[decoder].filled(key)
    if believed is not None:
        believed.add([key])
    return decoder


def lru_hit_ratio(probabilities: Sequence[float], pages: int) -> float:
    """Of one LRU cache under independent requests. Source: Che et al., IEEE JSAC 20(7), 2002, eq. 3-6."""
    if pages >= len(probabilities):
        return 1.0

    def filled(time: float) -> float:
        return sum(-math.expm1(-p * time) for p in probabilities)

    low, high = 0.0, 1.0
    while filled(high) < pages:
        low, high = high, high * 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if filled(middle) < pages else (low, middle)
    return sum(p * -math.expm1(-p * high) for p in probabilities)


def table(fleet: Fleet, workloads: Sequence[tuple[str, Workload]]) -> str:
    """Markdown, as in docs/scale.md."""
    lines = [
        "| pictures | routing | found resident | expected | encoder runs / 100 | second rounds / 100 | distinct"
        " | busiest / mean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, work in workloads:
        probabilities = work.probabilities()
        for policy in POLICIES:
            counts = simulate(fleet, work, policy)
            pages = fleet.pages * (1 if policy == "any replica" else fleet.decoders)
            lines.append(
                f"| {name} | {policy} | {counts.hit_ratio:.1%} | {lru_hit_ratio(probabilities, pages):.1%}"
                f" | {100 * counts.encoded / counts.requests:.1f} | {100 * counts.second_rounds / counts.requests:.1f}"
                f" | {counts.distinct:,} | {counts.busiest:.2f} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.affinity", description=__doc__)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--decoders", type=int, default=4)
    parser.add_argument("--pages", type=int, default=256, help="pictures that one decoder holds")
    parser.add_argument("--pictures", type=int, default=5000, help="of the catalogue")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--ask-first", action="store_true", help="gateways try without latents, whatever they believe")
    options = parser.parse_args(arguments)
    fleet = Fleet(options.gateways, options.decoders, options.pages, ask_first=options.ask_first)
    running = 16 * options.decoders
    zipf = Workload(options.pictures, requests=options.requests, running=running)
    hot = Workload(options.pictures, hot_share=0.3, requests=options.requests, running=running)
    print(f"{fleet}\n")
    print(table(fleet, [("Zipf", zipf), ("Zipf, and 30 % ask for one", hot)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
