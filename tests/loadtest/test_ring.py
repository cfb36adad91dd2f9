"""The ring keeps what consistent hashing with bounded loads promises."""

from __future__ import annotations

from collections import Counter

import pytest

from loadtest.ring import Ring

KEYS = [f"picture {number}" for number in range(4000)]


def test_a_key_goes_to_the_same_server_every_time_and_in_every_balancer():
    one, other = Ring(4, None), Ring(4, 1.5)
    assert [one.server(key) for key in KEYS] == [other.server(key) for key in KEYS]


def test_keys_are_spread_evenly():
    counts = Counter(map(Ring(4, None).server, KEYS))
    assert all(abs(count - 1000) < 150 for count in counts.values())


def test_a_server_that_joins_takes_its_share_and_moves_no_other_key():
    before, after = Ring(4, None), Ring(5, None)
    moved = [key for key in KEYS if before.server(key) != after.server(key)]
    assert {after.server(key) for key in moved} == {4}
    assert abs(len(moved) - len(KEYS) / 5) < 150


@pytest.mark.parametrize("factor", [1.1, 1.5, 2.0])
def test_no_server_gets_more_than_its_bound(factor):
    ring = Ring(4, factor)
    for number in range(1, 201):
        ring.running[ring.server("the hot one")] += 1
        assert sum(ring.running) == number
        assert max(ring.running) <= -(-number * factor // 4) + 1
    assert sum(count > 0 for count in ring.running) >= 4 / factor  # a hot picture spreads


def test_spilled_requests_come_home_when_there_is_room():
    ring = Ring(4, 1.5)
    home = ring.server("a picture")
    ring.running = [10, 10, 10, 10]
    ring.running[home] = 20
    assert ring.server("a picture") != home
    ring.running[home] = 5
    assert ring.server("a picture") == home


def test_without_a_bound_a_hot_picture_stays():
    ring = Ring(4, None)
    for _ in range(100):
        ring.running[ring.server("the hot one")] += 1
    assert sorted(ring.running) == [0, 0, 0, 100]
