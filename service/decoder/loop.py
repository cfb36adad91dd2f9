"""The thread that owns the engine: takes requests and cancels from other threads, steps while there is work.

It makes the engine, too, so that all of torch's work is in one thread. Each thread that computes in parallel gets a
pool of OpenMP threads of its own; two pools are more threads than cores, and then none of them waits awake for the next
parallel region any more. Idle, the thread sleeps on a condition and uses no processor time. What goes wrong about one
request ends that request. Where the loop itself cannot go on, or no computation works any more, everybody is told and
the process ends: whoever supervises it starts it anew. A process that answers nothing but errors is worse than none.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from service.contract import TokenEvent, ValidRequest
from service.decoder.engine import Engine, EngineStats
from service.errors import CrossgateError, Internal, StageLost, Unavailable
from service.isolation import Broken, is_sticky

logger = logging.getLogger(__name__)
MAX_FAILED_STEPS = 3  # in a row, each of them as a whole
CANCEL_POLL_S = 0.01  # asking is_cancelled takes a call into Triton per request

Deliver = Callable[[TokenEvent | CrossgateError | None], None]


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


class EngineLoop:
    """`make_engine` is called in the loop's thread, and what it raises is raised here.

    `on_step` is called from the loop's thread after each step and when the loop falls idle; `end` last of all, when
    this process is of no more use.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        on_step: Callable[[EngineStats], None] = lambda stats: None,
        end: Callable[[], None] = end_process,
    ) -> None:
        self._on_step = on_step
        self._end = end
        self._wake = threading.Condition()
        self._submitted: list[_Submission] = []
        self._live: dict[int, _Submission] = {}
        self._next_id = 0
        self._num_failed_steps = 0
        self._last_poll_s = 0.0
        self._refusal: str | None = None  # why nothing is taken any more
        made: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._start, args=(make_engine, made), name="engine", daemon=True)
        self._thread.start()
        self._engine = made.result()

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken and answered. For any thread; asks nobody."""
        return self._refusal is None and self._thread.is_alive()

    def submit(
        self,
        request: ValidRequest,
        latents: Tensor | None,
        latent_index: list[int],
        deliver: Deliver,
        is_cancelled: Callable[[], bool],
    ) -> None:
        """Hand a request over; returns at once.

        `deliver` is called from the loop's thread with events; the last call has an event with a finish reason, a
        CrossgateError, or None if the request was cancelled.
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

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop stepping; requests under way are told Unavailable."""
        with self._wake:
            self._refusal = self._refusal or "The decoder is shutting down."
            self._wake.notify()
        self._thread.join(timeout_s)

    def _start(self, make_engine: Callable[[], Engine], made: Future[Engine]) -> None:
        try:
            self._engine = make_engine()
        except BaseException as error:
            made.set_exception(error)
        else:
            made.set_result(self._engine)
            self._run()

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
        except BaseException as error:
            logger.critical("the decoder cannot go on; its process ends: %r", error, exc_info=True)
            self._leave("The decoder failed and is started anew.", under_way=StageLost)
            self._end()
        else:
            self._leave("The decoder is shutting down.", under_way=Unavailable)

    def _wait(self) -> bool:
        """Sleep until there is something to do. False: closing."""
        with self._wake:
            while not (self._submitted or self._live or self._refusal):
                self._wake.wait()
            return self._refusal is None

    def _turn(self) -> None:
        with self._wake:
            submitted = dict(enumerate(self._submitted, self._next_id))
            self._submitted = []
        self._next_id += len(submitted)
        self._live |= submitted  # at once: whatever happens now, all of them are told
        for request_id, submission in submitted.items():
            self._add(request_id, submission)
        self._cancel()
        if self._engine.has_work:
            self._step()
        try:
            self._on_step(self._engine.stats())
        except Exception:
            logger.exception("a step was not reported")

    def _leave(self, refusal: str, *, under_way: type[Unavailable]) -> None:
        """Take nothing any more, and tell all that is there; those that the engine had, by this kind of error."""
        with self._wake:
            self._refusal = refusal
            submitted, self._submitted = self._submitted, []
        for submission in self._live.values():
            self._deliver(submission, under_way(refusal, retry_after_s=5))
        for submission in submitted:
            self._deliver(submission, Unavailable(refusal, retry_after_s=5))
        self._live = {}

    def _add(self, request_id: int, submission: _Submission) -> None:
        try:
            self._engine.add(request_id, submission.request, submission.latents, submission.latent_index)
        except CrossgateError as error:
            self._drop(request_id, error)
        except Exception:
            logger.exception("a request was not added")
            self._drop(request_id, Internal("The decoder failed."))

    def _cancel(self) -> None:
        now_s = time.monotonic()
        if now_s - self._last_poll_s < CANCEL_POLL_S:
            return
        self._last_poll_s = now_s
        for request_id, submission in list(self._live.items()):
            try:
                is_cancelled = submission.is_cancelled()
            except Exception:
                logger.exception("a request cannot say whether it was cancelled")
                self._drop(request_id, Internal("The decoder failed."))
            else:
                if is_cancelled:
                    self._drop(request_id, None)

    def _step(self) -> None:
        try:
            deliveries = self._engine.step()
        except Exception as error:  # no single request's: the engine sorts those out
            self._num_failed_steps += 1
            if isinstance(error, Broken) or is_sticky(error) or self._num_failed_steps == MAX_FAILED_STEPS:
                raise
            logger.exception("a decoder step failed; its requests are dropped")
            for request_id in list(self._live):
                self._drop(request_id, Internal("The decoder failed."))
            return
        self._num_failed_steps = 0
        for request_id, event in deliveries:
            if isinstance(event, CrossgateError) or event.finish_reason is not None:
                self._deliver(self._live.pop(request_id), event)
            elif not self._deliver(self._live[request_id], event):
                self._drop(request_id, Internal("The decoder failed."))

    def _drop(self, request_id: int, reason: CrossgateError | None) -> None:
        """End a request in whatever state it is."""
        self._engine.cancel(request_id)
        self._deliver(self._live.pop(request_id), reason)

    def _deliver(self, submission: _Submission, event: TokenEvent | CrossgateError | None) -> bool:
        """Whether it arrived. That it did not is this request's misfortune alone."""
        try:
            submission.deliver(event)
        except Exception:
            logger.exception("an answer was not delivered")
            return False
        return True
