"""Runners that break, in place of an engine's own."""

from __future__ import annotations

from collections.abc import Callable

from service.decoder.engine import Engine
from service.decoder.runner import Runner
from service.decoder.scheduler import Step


class FaultyRunner(Runner):
    """Computes as the engine's own does, and then raises where `fault` returns an exception for the step."""

    def __init__(self, runner: Runner, fault: Callable[[Step], BaseException | None]) -> None:
        super().__init__(runner.model, runner.self_kv, runner.image_kv)
        self.fault = fault
        self.steps: list[Step] = []

    def run(self, step: Step) -> list[int | None]:
        self.steps.append(step)
        results = super().run(step)
        error = self.fault(step)
        if error is not None:
            raise error
        return results


def install(engine: Engine, fault: Callable[[Step], BaseException | None]) -> FaultyRunner:
    engine.runner = FaultyRunner(engine.runner, fault)
    return engine.runner


def raises_for(*request_ids: int) -> Callable[[Step], BaseException | None]:
    def fault(step: Step) -> BaseException | None:
        guilty = {chunk.sequence.request_id for chunk in step.chunks} & set(request_ids)
        return RuntimeError("this request breaks the step") if guilty else None

    return fault
