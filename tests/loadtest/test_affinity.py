"""The model of a fleet: its figures follow theory where there is one, and show what affinity is for."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from loadtest.affinity import Fleet, Workload, lru_hit_ratio, simulate

FLEET = Fleet(gateways=2, decoders=4, pages=64)
ZIPF = Workload(pictures=1250, requests=8000, running=32)
HOT = Workload(pictures=1250, requests=8000, running=32, hot_share=0.3)


def test_lru_formula_agrees_with_an_lru():
    probabilities = ZIPF.probabilities()
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    draws = random.Random(0).choices(range(len(probabilities)), probabilities, k=40_000)
    for number, picture in enumerate(draws):
        hits += number >= 10_000 and picture in cache
        cache[picture] = None
        cache.move_to_end(picture)
        if len(cache) > 100:
            cache.popitem(last=False)
    assert hits / 30_000 == pytest.approx(lru_hit_ratio(probabilities, 100), abs=0.02)
    assert lru_hit_ratio(probabilities, 5000) == 1.0


def test_affinity_makes_four_caches_one():
    anywhere, hashed = simulate(FLEET, ZIPF, "any replica"), simulate(FLEET, ZIPF, "hash, bounded")
    probabilities = ZIPF.probabilities()
    assert anywhere.hit_ratio == pytest.approx(lru_hit_ratio(probabilities, 64), abs=0.04)
    assert hashed.hit_ratio == pytest.approx(lru_hit_ratio(probabilities, 4 * 64), abs=0.06)
    assert hashed.hit_ratio > anywhere.hit_ratio + 0.1
    assert hashed.second_rounds < anywhere.second_rounds / 2
    assert hashed.distinct > anywhere.distinct


def test_bound_spreads_a_hot_picture_at_little_cost():
    unbounded, bounded = simulate(FLEET, HOT, "hash"), simulate(FLEET, HOT, "hash, bounded")
    assert unbounded.busiest > 1.8
    assert bounded.busiest < 1.6
    assert bounded.hit_ratio > unbounded.hit_ratio - 0.06


def test_every_request_is_counted_once_and_runs_repeat():
    counts = simulate(FLEET, ZIPF, "hash")
    assert counts.requests == 6000
    assert counts == simulate(FLEET, ZIPF, "hash")
    assert counts.encoded <= counts.requests


def test_gateways_that_ask_first_send_no_latents_for_resident_pictures():
    asking = Fleet(gateways=8, decoders=4, pages=64, ask_first=True)
    believing = Fleet(gateways=8, decoders=4, pages=64)
    first, second = simulate(asking, ZIPF, "hash"), simulate(believing, ZIPF, "hash")
    assert first.second_rounds == first.requests - first.hits
    assert first.encoded < second.encoded
