"""IDEFICS over HTTP through real Triton: every greedy token is the one that `transformers` chooses."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.families import load_family
from tests.checkpoints import make_idefics
from tests.e2e.running import Running, data_url
from tests.families.test_idefics import CONFIGS, NUM_TOKENS, prompts
from tests.reference import IdeficsReference


@pytest.fixture(scope="module", params=CONFIGS)
def idefics(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    folder = make_idefics(tmp_path_factory.mktemp(request.param), **CONFIGS[request.param])
    running = Running("--no-question", MODEL_PATH=str(folder))
    try:
        running.wait_until_ready()
        yield running, folder
    finally:
        running.stop()


def png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG")
    return data_url(file.getvalue())


def test_greedy_tokens_over_http_equal_transformers(idefics: tuple[Running, Path]) -> None:
    service, folder = idefics
    family = load_family(folder)
    reference = IdeficsReference(folder, family.image_token_id)
    rng = np.random.default_rng(5)
    cases = []
    for input_ids, num_pictures in prompts(family).values():
        pictures = rng.integers(0, 256, (num_pictures, 3, 28, 28), dtype=np.uint8)  # the encoder's size: not resized
        cases.append((input_ids, pictures))

    def ask(case: tuple[list[int], np.ndarray]) -> dict[str, Any]:
        input_ids, pictures = case
        body = {"prompt": input_ids, "images": [png(picture) for picture in pictures], "return_token_ids": True}
        body |= {"max_tokens": NUM_TOKENS, "ignore_eos": True}
        response = httpx.post(f"{service.url}/v1/generate", json=body, timeout=60)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    with ThreadPoolExecutor(len(cases)) as threads:  # together, so that they share steps and encoder batches
        answers = list(threads.map(ask, cases))
    for (input_ids, pictures), answer in zip(cases, answers, strict=True):
        assert answer["token_ids"] == reference.greedy(input_ids, pictures, NUM_TOKENS)
        assert answer["usage"]["images"] == len(pictures)
