"""The thread that talks to those who asked, so that the engine's does nothing but step.

It sends what the engine posts, asks whether requests were cancelled, and reports the engine's counts: each of these is
a call into Triton that waits for another process. Where it lags behind the engine, tokens of a request that wait
together are sent together, so that each request has one place at most; when too many have one, the engine is to wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from service.contract import TokenEvent
from service.errors import CrossgateError, Internal

logger = logging.getLogger(__name__)
MAX_UNSENT = 1024  # requests that have ended and wait to be told are nobody's else to bound
CANCEL_POLL_S = 0.05  # a tenth of a millisecond of two processes per request

Answer = TokenEvent | CrossgateError | None  # None: the request was cancelled
Deliver = Callable[[Answer], None]
Stats = TypeVar("Stats")


@dataclass
class _Recipient:
    """`unsent`: in order, no two of them token events that could be one."""

    deliver: Deliver
    is_cancelled: Callable[[], bool]
    unsent: list[Answer] = field(default_factory=list)


class Outbox(Generic[Stats]):
    """`tell` is called with the latest counts posted, from the outbox's thread like all that requests bring along.

    What one of these calls raises is that request's misfortune alone, or that report's.
    """

    def __init__(self, tell: Callable[[Stats], None], max_unsent: int = MAX_UNSENT) -> None:
        self._tell = tell
        self._max_unsent = max_unsent
        lock = threading.Lock()
        self._changed, self._taken = threading.Condition(lock), threading.Condition(lock)
        self._open: dict[int, _Recipient] = {}  # those whose last answer was not posted yet
        self._posted: dict[int, _Recipient] = {}  # those with something unsent
        self._untold: Stats | None = None  # the latest, if nobody was told yet
        self._given_up: dict[int, CrossgateError | None] = {}
        self._closing = False
        self._next_poll_s = 0.0
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def open(self, request_id: int, deliver: Deliver, is_cancelled: Callable[[], bool]) -> None:
        """From now on the request is asked whether it was cancelled, and can be posted to until its last answer."""
        with self._changed:
            self._open[request_id] = _Recipient(deliver, is_cancelled)
            self._changed.notify()

    def post(self, answers: Iterable[tuple[int, Answer]], stats: Stats | None = None) -> set[int]:
        """Have answers delivered, each request's in their order, and the counts told.

        Returns at once, and the requests whose last answers these are.
        """
        ended = set()
        with self._changed:
            for request_id, answer in answers:
                recipient = self._open[request_id]
                if not isinstance(answer, TokenEvent) or answer.finish_reason is not None:
                    del self._open[request_id]
                    ended.add(request_id)
                _append(recipient.unsent, answer)
                self._posted[request_id] = recipient
            if stats is not None:
                self._untold = stats
            self._changed.notify()
        return ended

    def has_room(self, timeout_s: float) -> bool:
        """Whether so few requests wait to be told that more may come; it waits for that."""
        with self._changed:
            return self._taken.wait_for(lambda: len(self._posted) < self._max_unsent, timeout_s)

    def take_given_up(self) -> Mapping[int, CrossgateError | None]:
        """Requests that nobody waits for any more, or that cannot be answered, and what they are to be told."""
        with self._changed:
            given_up, self._given_up = self._given_up, {}
        return given_up

    def close(self, timeout_s: float) -> None:
        """Return once all that was posted is delivered. Nothing may be posted any more."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive() or self._posted:
            logger.error("answers were not delivered within %g s; %d requests were next", timeout_s, len(self._posted))

    def _run(self) -> None:
        while self._wait():
            with self._changed:
                posted, self._posted = self._posted, {}
                unsent = [(request_id, recipient.deliver, recipient.unsent) for request_id, recipient in posted.items()]
                for recipient in posted.values():
                    recipient.unsent = []
                stats, self._untold = self._untold, None
                self._taken.notify()
            for request_id, deliver, answers in unsent:
                for answer in answers:
                    self._deliver(request_id, deliver, answer)
            if stats is not None:
                self._report(stats)
            self._poll()

    def _wait(self) -> bool:
        """Sleep until there is something to do. False: all is delivered, and nothing will come."""
        with self._changed:
            while not (self._posted or self._untold is not None or self._closing):
                if not self._open:
                    self._changed.wait()
                elif (left_s := self._next_poll_s - time.monotonic()) > 0:
                    self._changed.wait(left_s)
                else:
                    break
            return not self._closing or bool(self._posted)

    def _deliver(self, request_id: int, deliver: Deliver, answer: Answer) -> None:
        try:
            deliver(answer)
        except Exception:
            logger.exception("an answer was not delivered")
            self._give_up(request_id, Internal("The decoder failed."))

    def _report(self, stats: Stats) -> None:
        try:
            self._tell(stats)
        except Exception:
            logger.exception("the engine's counts were not told")

    def _poll(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_poll_s:
            return
        self._next_poll_s = now_s + CANCEL_POLL_S
        with self._changed:
            asked = list(self._open.items())
        for request_id, recipient in asked:
            try:
                if recipient.is_cancelled():
                    self._give_up(request_id, None)
            except Exception:
                logger.exception("a request cannot say whether it was cancelled")
                self._give_up(request_id, Internal("The decoder failed."))

    def _give_up(self, request_id: int, reason: CrossgateError | None) -> None:
        with self._changed:
            if request_id in self._open:
                self._given_up.setdefault(request_id, reason)


def _append(unsent: list[Answer], answer: Answer) -> None:
    """Put an answer at the end, tokens into the same event as those before it."""
    last = unsent[-1] if unsent else None
    if isinstance(last, TokenEvent) and isinstance(answer, TokenEvent):
        unsent[-1] = TokenEvent(last.token_ids + answer.token_ids, answer.finish_reason, answer.usage, answer.timings)
    else:
        unsent.append(answer)
