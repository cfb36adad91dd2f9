"""The thread that owns the engine: takes requests and cancels from other threads, steps while there is work.

Idle, it sleeps on a condition and uses no processor time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from service.contract import TokenEvent, ValidRequest
from service.decoder.engine import Engine, EngineStats
from service.errors import CrossgateError, Internal, Unavailable

logger = logging.getLogger(__name__)
CANCEL_POLL_S = 0.01  # asking is_cancelled takes a call into Triton per request

Deliver = Callable[[TokenEvent | CrossgateError | None], None]


@dataclass(frozen=True)
class _Submission:
    request: ValidRequest
    latents: Tensor | None
    latent_index: list[int]
    deliver: Deliver
    is_cancelled: Callable[[], bool]


class EngineLoop:
    """`on_step` is called from the loop's thread after each step and when the loop falls idle."""

    def __init__(self, engine: Engine, on_step: Callable[[EngineStats], None] = lambda stats: None) -> None:
        self._engine = engine
        self._on_step = on_step
        self._wake = threading.Condition()
        self._submitted: list[_Submission] = []
        self._live: dict[int, _Submission] = {}
        self._next_id = 0
        self._last_poll_s = 0.0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

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
            if not self._closing:
                self._submitted.append(_Submission(request, latents, latent_index, deliver, is_cancelled))
                self._wake.notify()
                return
        deliver(Unavailable("The decoder is shutting down."))

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop stepping; requests under way are told Unavailable."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._submitted or self._live or self._closing):
                    self._wake.wait()
                if self._closing:
                    break
                submitted, self._submitted = self._submitted, []
            for submission in submitted:
                self._add(submission)
            self._cancel()
            if self._engine.has_work:
                self._step()
            self._on_step(self._engine.stats())
        for submission in [*self._live.values(), *self._submitted]:
            submission.deliver(Unavailable("The decoder is shutting down."))

    def _add(self, submission: _Submission) -> None:
        request_id, self._next_id = self._next_id, self._next_id + 1
        try:
            self._engine.add(request_id, submission.request, submission.latents, submission.latent_index)
        except CrossgateError as error:
            submission.deliver(error)
        else:
            self._live[request_id] = submission

    def _cancel(self) -> None:
        now_s = time.monotonic()
        if now_s - self._last_poll_s < CANCEL_POLL_S:
            return
        self._last_poll_s = now_s
        for request_id, submission in list(self._live.items()):
            if submission.is_cancelled():
                self._engine.cancel(request_id)
                self._live.pop(request_id).deliver(None)

    def _step(self) -> None:
        try:
            deliveries = self._engine.step()
        except Exception:  # a broken step must not end the thread: every request under way is told, and freed
            logger.exception("a decoder step failed; its requests are dropped")
            for request_id, submission in self._live.items():
                self._engine.cancel(request_id)
                submission.deliver(Internal("The decoder failed."))
            self._live = {}
            return
        for request_id, event in deliveries:
            submission = self._live[request_id]
            if isinstance(event, CrossgateError) or event.finish_reason is not None:
                del self._live[request_id]
            submission.deliver(event)
