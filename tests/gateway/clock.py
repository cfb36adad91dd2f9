"""An event loop whose clock jumps: seconds of waiting take none, and end at exactly their time."""

from __future__ import annotations

import asyncio
import selectors


class _Selector(selectors.DefaultSelector):
    """Never waits where something is due: it says that the time has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(None if timeout is None else 0)
        if not events and timeout is not None:
            self.now_s += timeout
        return events


class JumpingLoop(asyncio.SelectorEventLoop):
    """Nothing but timers passes its time: what is computed takes none. For code without threads and sockets."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s
