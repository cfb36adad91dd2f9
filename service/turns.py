"""Two stages on the same cores compute in turns: each with all of them, rather than both at once.

Threads of two pools that meet at barriers wait for cores that the other pool holds, and a decoder that gets half of
them spends twice as long on batches half as large. A turn is a decode step, or some layers of the encoder for one
picture, so neither waits long for the other.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHARE = 1.0  # of the other's turn, that one's own may last: between tokens then lie some two steps, three at most
POLL_S = 0.0002
TIMEOUT_S = 2.0  # then whoever has the turn is stopped or stuck, and takes no cores


class Turns:
    """One for each process, not for several threads of it: all take turns that run this same file.

    Locks the file and its folder, and writes nothing. A lock goes with the process that held it, however that ended.
    Whoever waits holds the folder's, so that the one whose turn ends cannot take the next one, too.
    """

    def __init__(self, file: Path = Path(__file__)) -> None:
        self._turn, self._next = (os.open(path, os.O_RDONLY) for path in (file, file.parent))
        self._began_s = self._waited_s = 0.0
        self._is_stuck = False  # it waited in vain; then it waits no more until it need not

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Holds the cores, but for one that is stopped or stuck with them."""
        self._take()
        try:
            yield
        finally:
            self._give()

    def pass_on(self) -> None:
        """Within a turn that has lasted its share: let another have one, if one waits."""
        if time.monotonic() - self._began_s >= SHARE * self._waited_s:
            self._give()
            self._take()

    def _take(self) -> None:
        start_s = time.monotonic()
        deadline_s = start_s if self._is_stuck else start_s + TIMEOUT_S
        has_turn = False
        if _lock(self._next, deadline_s):
            has_turn = _lock(self._turn, deadline_s)
            fcntl.flock(self._next, fcntl.LOCK_UN)
        self._is_stuck = not has_turn
        self._began_s = time.monotonic()
        self._waited_s = self._began_s - start_s

    def _give(self) -> None:
        fcntl.flock(self._turn, fcntl.LOCK_UN)


def _lock(descriptor: int, deadline_s: float) -> bool:
    """Python's flock cannot be given a deadline, hence the polling."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(POLL_S)
        else:
            return True
