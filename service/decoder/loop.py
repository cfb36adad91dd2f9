"""The thread that owns the engine: takes requests from other threads, steps while there is work, and does nothing else.

What is to be told leaves through the outbox, whose own thread asks for cancels, too.

It makes the engine, so that all of torch's work is in one thread. Each thread that computes in parallel gets a pool of
OpenMP threads of its own; two pools are more threads than cores, and then none of them waits awake for the next
parallel region any more. Idle, the thread sleeps on a condition and uses no processor time. What goes wrong about one
request ends that request. Where the loop itself cannot go on, or no computation works any more, everybody is told and
the process ends: whoever supervises it starts it anew. A process that answers nothing but errors is worse than none.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from service.contract import ValidRequest
from service.decoder.engine import Delivery, Engine, EngineStats
from service.decoder.outbox import Deliver, Outbox
from service.errors import CrossgateError, Internal, StageLost, Unavailable
from service.isolation import Broken, is_sticky

logger = logging.getLogger(__name__)
MAX_FAILED_STEPS = 3  # in a row, each of them as a whole
LEAVE_TIMEOUT_S = 5.0  # for telling everybody, at the end
ROOM_TIMEOUT_S = 0.1  # then it looks whether anything else is to be done


@dataclass(frozen=True)
class _Submission:
    request: ValidRequest
    latents: Tensor | None
    latent_index: list[int]
    deliver: Deliver
    is_cancelled: Callable[[], bool]


def end_process() -> None:
    """At once, since a thread cannot raise SystemExit for the process, and a sick accelerator may hang its exit."""
    os._exit(1)


def at_once(num_running: int) -> AbstractContextManager[None]:
    """A step that need not wait for the cores."""
    return nullcontext()


class EngineLoop:
    """`make_engine` is called in the loop's thread, and what it raises is raised here.

    `computing` is entered for each step, with the number of sequences that run. `on_step` is called from the outbox's
    thread with the counts after a step, where it lags after the last of several, and when the loop falls idle; `end`
    from the loop's thread, last of all, when this process is of no more use.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        on_step: Callable[[EngineStats], None] = lambda stats: None,
        end: Callable[[], None] = end_process,
        computing: Callable[[int], AbstractContextManager[None]] = at_once,
    ) -> None:
        self._end, self._computing = end, computing
        self._wake = threading.Condition()
        self._submitted: list[_Submission] = []
        self._live: set[int] = set()  # ids of those whose last answer was not posted yet
        self._next_id = 0
        self._num_failed_steps = 0
        self._refusal: str | None = None  # why nothing is taken any more
        self._outbox = Outbox(on_step)
        made: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._start, args=(make_engine, made), name="engine", daemon=True)
        self._thread.start()
        self._engine = made.result()

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken and answered. For any thread; asks nobody."""
        return self._refusal is None and self._thread.is_alive() and self._outbox.is_alive

    def submit(
        self,
        request: ValidRequest,
        latents: Tensor | None,
        latent_index: list[int],
        deliver: Deliver,
        is_cancelled: Callable[[], bool],
    ) -> None:
        """Hand a request over; returns at once.

        `deliver` is called from the outbox's thread with events, each with one token or more; the last call has an
        event with a finish reason, a CrossgateError, or None if the request was cancelled.
        """
        with self._wake:
            refusal = self._refusal
            if refusal is None:
                self._submitted.append(_Submission(request, latents, latent_index, deliver, is_cancelled))
                self._wake.notify()
                return
        deliver(Unavailable(refusal, retry_after_s=5))

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self, timeout_s: float = 2 * LEAVE_TIMEOUT_S) -> None:
        """Stop stepping; requests under way are told Unavailable."""
        with self._wake:
            self._refusal = self._refusal or "The decoder is shutting down."
            self._wake.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error("the decoder's thread did not end within %g s; its requests may not have been told", timeout_s)

    def _start(self, make_engine: Callable[[], Engine], made: Future[Engine]) -> None:
        try:
            self._engine = make_engine()
        except BaseException as error:
            self._outbox.close(LEAVE_TIMEOUT_S)
            made.set_exception(error)
            return
        made.set_result(self._engine)
        self._run()

    def _run(self) -> None:
        try:
            while self._wait():
                self._iterate()
        except BaseException as error:
            logger.critical("the decoder cannot go on; its process ends: %r", error, exc_info=True)
            try:
                self._leave("The decoder failed and is started anew.", under_way=StageLost)
            finally:  # even if it cannot be told
                self._end()
        else:
            self._leave("The decoder is shutting down.", under_way=Unavailable)

    def _wait(self) -> bool:
        """Sleep until there is something to do. False: closing."""
        with self._wake:
            while not (self._submitted or self._live or self._refusal):
                self._wake.wait()
            return self._refusal is None

    def _iterate(self) -> None:
        if not self._outbox.is_alive:
            raise Broken("nobody delivers answers any more")
        for request_id, submission in self._take_submitted():
            self._add(request_id, submission)
        for request_id, reason in self._outbox.take_given_up().items():
            if request_id in self._live:
                self._drop(request_id, reason)
        deliveries = self._step() if self._engine.has_work and self._outbox.has_room(ROOM_TIMEOUT_S) else []
        self._live -= self._outbox.post(deliveries, self._counts())

    def _leave(self, refusal: str, *, under_way: type[Unavailable]) -> None:
        """Take nothing any more, and tell all that is there; those that the engine had, by this kind of error."""
        with self._wake:
            self._refusal = refusal
        self._outbox.post((request_id, under_way(refusal, retry_after_s=5)) for request_id in self._live)
        submitted = self._take_submitted()
        self._outbox.post((request_id, Unavailable(refusal, retry_after_s=5)) for request_id, _ in submitted)
        self._live.clear()
        self._outbox.close(LEAVE_TIMEOUT_S)

    def _take_submitted(self) -> list[tuple[int, _Submission]]:
        """Newcomers and their ids. From now on they are among those that are told, whatever happens."""
        with self._wake:
            submitted, self._submitted = self._submitted, []
        taken = list(enumerate(submitted, self._next_id))
        self._next_id += len(taken)
        for request_id, submission in taken:
            self._outbox.open(request_id, submission.deliver, submission.is_cancelled)
            self._live.add(request_id)
        return taken

    def _add(self, request_id: int, submission: _Submission) -> None:
        try:
            self._engine.add(request_id, submission.request, submission.latents, submission.latent_index)
        except CrossgateError as error:
            self._drop(request_id, error)
        except Exception:
            logger.exception("a request was not added")
            self._drop(request_id, Internal("The decoder failed."))

    def _step(self) -> list[Delivery]:
        try:
            with self._computing(max(1, self._engine.num_running)):
                deliveries = self._engine.step()
        except Exception as error:  # no single request's: the engine sorts those out
            self._num_failed_steps += 1
            if isinstance(error, Broken) or is_sticky(error) or self._num_failed_steps == MAX_FAILED_STEPS:
                raise
            logger.exception("a decoder step failed; its requests are dropped")
            for request_id in list(self._live):
                self._drop(request_id, Internal("The decoder failed."))
            return []
        self._num_failed_steps = 0
        return deliveries

    def _counts(self) -> EngineStats | None:
        try:
            return self._engine.stats()
        except Exception:
            logger.exception("a step was not counted")
            return None

    def _drop(self, request_id: int, reason: CrossgateError | None) -> None:
        """End a request in whatever state it is."""
        self._engine.cancel(request_id)
        self._live -= self._outbox.post([(request_id, reason)])
