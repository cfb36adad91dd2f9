"""Our encoder and engine in one process, one after the other: what the service would reach if HTTP cost nothing.

python -m loadtest.bench.peers.engine FOLDER DTYPE
"""

from __future__ import annotations

import hashlib
import io
import itertools
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from loadtest.bench.scenario import Request
from loadtest.bench.worker import serve
from loadtest.pictures import jpeg
from service.contract import SamplingParams, TokenEvent, ValidRequest
from service.decoder.engine import Engine
from service.decoder.settings import CPU_PREFILL_TOKENS, DecoderSettings
from service.errors import CrossgateError, ImageNotResident
from service.families import load_family
from service.vision.stage import VisionStage


class InProcess:
    """Encoder and engine, driven by hand. `settings` as the engine takes them."""

    def __init__(self, folder: Path, dtype: str, **settings: Any) -> None:
        self.family = load_family(folder)
        self.stage = VisionStage(self.family, "cpu", dtype)
        as_served = {"max_prefill_tokens": CPU_PREFILL_TOKENS, **settings}
        self.engine = Engine.from_family(self.family, DecoderSettings(dtype=dtype, **as_served))
        self._ids = itertools.count()
        self.pixels = lru_cache(maxsize=1024)(self._pixels)

    def answer(self, requests: Sequence[Request]) -> tuple[float, list[list[int]]]:
        """(seconds from pixels to the last token, the tokens of each). Pictures that are resident are not encoded."""
        for request in requests:
            for number in request.pictures:
                self.pixels(number)
        begin_s = time.perf_counter()
        latents: dict[str, Tensor] = {}
        ids = [self.add(request, latents) for request in requests]
        tokens = self.drain()
        return time.perf_counter() - begin_s, [tokens[request_id] for request_id in ids]

    def add(self, request: Request, latents: dict[str, Tensor] | None = None, **sampling: Any) -> int:
        """Queue a request; returns its id. `latents`, by key, of what was encoded a moment ago; gains what is new."""
        latents = {} if latents is None else latents
        pictures = [self.pixels(number) for number in request.pictures]
        keys = tuple(hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures)
        positions = tuple(i for i, token in enumerate(request.input_ids) if token == self.family.image_token_id)
        params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True, **sampling)
        valid = ValidRequest(request.input_ids, keys, positions, params)
        request_id = next(self._ids)
        try:
            self.engine.add(request_id, valid)
        except ImageNotResident as missing:
            new = [index for index, key in enumerate(keys) if key in missing.keys and key not in latents]
            if new:
                encoded = self.stage.encode(torch.from_numpy(np.stack([pictures[index] for index in new]))).flatten(
                    0, 1
                )
                latents.update(zip((keys[index] for index in new), encoded, strict=True))
            sent = [index for index, key in enumerate(keys) if key in missing.keys]
            self.engine.add(request_id, valid, torch.stack([latents[keys[index]] for index in sent]), sent)
        return request_id

    def step(self) -> list[tuple[int, TokenEvent]]:
        """Raises the error that a request is told: here there should be none."""
        events = []
        for request_id, event in self.engine.step():
            if isinstance(event, CrossgateError):
                raise event
            events.append((request_id, event))
        return events

    def drain(self) -> dict[int, list[int]]:
        tokens: dict[int, list[int]] = {}
        while self.engine.has_work:
            for request_id, event in self.step():
                tokens.setdefault(request_id, []).extend(event.token_ids)
        return tokens

    def first_tokens(self, ids: Sequence[int]) -> None:
        """Step until each of these streams has a token."""
        waiting = set(ids)
        while waiting:
            waiting -= {request_id for request_id, _ in self.step()}

    def step_times(self, count: int) -> list[float]:
        """Seconds of each of so many steps."""
        seconds = []
        for _ in range(count):
            begin_s = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - begin_s)
        return seconds

    def _pixels(self, number: int) -> NDArray[np.uint8]:
        return self.family.preprocess(Image.open(io.BytesIO(jpeg(number))))


def main() -> None:
    folder, dtype = sys.argv[1:]

    def start() -> Any:
        system = InProcess(Path(folder), dtype)

        def handle(message: dict[str, Any]) -> dict[str, Any]:
            seconds, tokens = system.answer([Request.from_json(fields) for fields in message["requests"]])
            return {"seconds": seconds, "tokens": tokens}

        return handle

    serve(start)


if __name__ == "__main__":
    main()
