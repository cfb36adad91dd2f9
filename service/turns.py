"""Two stages on the same cores compute in turns: each with all of them, rather than both at once.

Threads of two pools that meet at barriers wait for cores that the other pool holds, and a decoder that gets half of
them spends twice as long on batches half as large. A turn is a decode step, or some layers of the encoder for one
picture, so neither waits long for the other. The encoder's lasts as long as a step while there are at least half as
many sequences as pictures, and longer where there are fewer: who is encoded first would decode nearly alone, and a step
for one takes almost as long as for eight.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIN_SHARE = 1.0  # of the other's turn, that one's own may last: between tokens then lie some two steps, three at most
MAX_SHARE = 4.0
POLL_S = 0.0002
TIMEOUT_S = 2.0  # then whoever has the turn is stopped or stuck, and takes no cores


class Turns:
    """One for each process, not for several threads of it: all take turns that run this same file.

    Locks the file and its folder, and writes nothing. A lock goes with the process that held it, however that ended.
    Whoever waits holds the folder's, so that the one whose turn ends cannot take the next one, too. How many a process
    computes for, it tells by the length of a third one.
    """

    def __init__(self, file: Path = Path(__file__)) -> None:
        self._turn, self._next = (os.open(path, os.O_RDONLY) for path in (file, file.parent))
        self._served = os.open(file, os.O_RDONLY)
        self._num_served = 0
        self._began_s = self._waited_s = 0.0
        self._is_stuck = False  # it waited in vain; then it waits no more until it need not

    @contextmanager
    def turn(self, num_served: int = 1) -> Iterator[None]:
        """Holds the cores, but for one that is stopped or stuck with them. `num_served`: pictures or sequences."""
        if num_served != self._num_served:
            _set_length(self._served, num_served)
            self._num_served = num_served
        self._take()
        try:
            yield
        finally:
            self._give()

    def pass_on(self) -> None:
        """Within a turn that has lasted its share: let another have one, if one waits."""
        lasted_s = time.monotonic() - self._began_s
        if lasted_s >= MIN_SHARE * self._waited_s and lasted_s >= self.share() * self._waited_s:
            self._give()
            self._take()

    def share(self) -> float:
        """Of the other's turn: by how many wait for this one, and how many for the other as of its last turn."""
        share = self._num_served / (2 * max(1, _length(self._served)))
        return max(MIN_SHARE, min(share, MAX_SHARE))

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


_FLOCK = struct.Struct("hhqqi4x")  # type, whence, start, length, process
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37  # an open file's own locks, which Python's fcntl names from 3.13 on


def _set_length(descriptor: int, length: int) -> None:
    """Hold a shared lock on so many bytes, one at least, which need not be there."""
    for kind, start, count in ((fcntl.F_RDLCK, 0, length), (fcntl.F_UNLCK, length, 0)):  # 0: all that follow
        fcntl.fcntl(descriptor, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, count, 0))


def _length(descriptor: int) -> int:
    """Of another's shared lock; 0 if nobody has one."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, length, _ = _FLOCK.unpack(fcntl.fcntl(descriptor, _F_OFD_GETLK, asked))
    return 0 if kind == fcntl.F_UNLCK else int(length)


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
