"""Driving an engine by hand: requests in, tokens out."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from service.contract import SamplingParams, TokenEvent, ValidRequest
from service.decoder.engine import Engine
from service.errors import CrossgateError
from service.families import Family
from service.vision.stage import VisionStage

Pictures = NDArray[np.uint8]  # [T, 3, H, W]


def make_request(family: Family, input_ids: list[int], pictures: Pictures, sampling: SamplingParams) -> ValidRequest:
    positions = tuple(index for index, token in enumerate(input_ids) if token == family.image_token_id)
    keys = tuple(hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures)
    return ValidRequest(tuple(input_ids), keys, positions, sampling)


def add(engine: Engine, request_id: int, request: ValidRequest, stage: VisionStage, pictures: Pictures) -> None:
    latents = stage.encode(torch.from_numpy(pictures)).flatten(0, 1) if len(pictures) else None
    engine.add(request_id, request, latents, list(range(len(pictures))))


def drain(engine: Engine) -> dict[int, list[TokenEvent]]:
    """Step until nothing is left. Any error is the test's."""
    events: dict[int, list[TokenEvent]] = {}
    while engine.has_work:
        for request_id, event in engine.step():
            assert not isinstance(event, CrossgateError), event
            events.setdefault(request_id, []).append(event)
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def prompt_logits(engine: Engine, request: ValidRequest, stage: VisionStage, pictures: Pictures) -> torch.Tensor:
    """Fp32 logits [L, V] of every prompt token, by the engine's own step; the request is dropped afterwards."""
    add(engine, 10**6, request, stage, pictures)
    return step_logits(engine, 10**6)


def step_logits(engine: Engine, request_id: int) -> torch.Tensor:
    """Of every token of the only request of an engine, in its first step; the request is dropped afterwards."""
    step = engine.scheduler.schedule()
    engine.runner.run(step)
    batch = engine.runner.batch(step.chunks)
    with torch.inference_mode():
        logits = engine.runner.logits(replace(batch, logits_rows=torch.arange(len(batch.input_ids))))
    engine.cancel(request_id)
    return logits
