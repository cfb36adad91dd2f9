"""Consistent hashing with bounded loads, as HAProxy does it: which replica a picture's request goes to.

Every server has POINTS places on a ring; a key belongs to the nearest, and while that server has its share of all
requests now running, times the factor, the next on the ring takes over.
Source: HAProxy src/lb_chash.c (chash_get_server_hash, chash_server_is_eligible); Mirrokni et al., arXiv 1608.01350.
Departure: points and keys are hashed with BLAKE2 instead of SDBM and Jenkins' avalanche; all weights are the same.
"""

from __future__ import annotations

import bisect
import hashlib

POINTS = 1600  # weight 100 times HAProxy's 16


class Ring:
    """`factor` 1.5: at most half more than the average; None: no bound. The caller counts what runs in `running`."""

    def __init__(self, num_servers: int, factor: float | None) -> None:
        self.running = [0] * num_servers
        self._factor = factor
        points = [(_hash(f"{server}:{point}"), server) for server in range(num_servers) for point in range(POINTS)]
        points.sort()
        self._places = [place for place, _ in points]
        self._servers = [server for _, server in points]

    def server(self, key: str) -> int:
        """Where a request with this key goes now."""
        place = _hash(key)
        after = bisect.bisect_left(self._places, place) % len(self._places)
        before = after - 1  # -1 is the last: a ring
        size = 1 << 64
        nearest = before if (place - self._places[before]) % size <= (self._places[after] - place) % size else after
        for step in range(len(self._places)):
            server = self._servers[(nearest + step) % len(self._servers)]
            if self._has_room(server):
                return server
        return self._servers[nearest]

    def _has_room(self, server: int) -> bool:
        if self._factor is None:
            return True
        slots = -int(-(sum(self.running) + 1) * self._factor // 1)  # rounded up, for all servers together
        each, rest = divmod(slots, len(self.running))
        return self.running[server] < max(1, each + (server < rest))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
