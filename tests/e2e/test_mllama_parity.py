"""Llama 3.2 Vision over HTTP through real Triton: every greedy token is the reference's, and latents do not travel."""

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

from loadtest import latents as transfer
from service.families import load_family
from tests.e2e.running import Running, data_url
from tests.families.test_mllama import CONFIGS, NUM_TOKENS, prompts
from tests.mllama import MllamaReference, make_mllama

LARGE = {"vision": {"image_size": 252, "num_hidden_layers": 3, "intermediate_layers_indices": [1]}}  # 1.3 MB of latents


@pytest.fixture(scope="module", params=[*CONFIGS, "large"])
def mllama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    folder = make_mllama(tmp_path_factory.mktemp(request.param), **CONFIGS.get(request.param, LARGE))
    running = Running("--no-question", MODEL_PATH=str(folder))
    try:
        running.wait_until_ready()
        yield running, folder
    finally:
        running.stop()


def png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return data_url(file.getvalue())


def test_greedy_tokens_over_http_equal_the_reference(mllama: tuple[Running, Path]) -> None:
    service, folder = mllama
    reference = MllamaReference(folder)
    cases = list(prompts(load_family(folder)).values())

    def ask(case: tuple[list[int], list[Image.Image]]) -> dict[str, Any]:
        input_ids, pictures = case
        body = {"prompt": input_ids, "images": [png(picture) for picture in pictures], "return_token_ids": True}
        body |= {"max_tokens": NUM_TOKENS, "ignore_eos": True}
        response = httpx.post(f"{service.url}/v1/generate", json=body, timeout=120)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    with ThreadPoolExecutor(len(cases)) as threads:  # together, so that they share steps
        answers = list(threads.map(ask, cases))
    for (input_ids, pictures), answer in zip(cases, answers, strict=True):
        assert answer["token_ids"] == reference.greedy(input_ids, pictures, NUM_TOKENS)
        assert answer["usage"]["images"] == len(pictures)
    again = ask(cases[-1])
    assert again["usage"]["cached_images"] == len({picture.tobytes() for picture in cases[-1][1]})


def test_a_chat_over_http_has_the_tokens_of_the_published_processor(mllama: tuple[Running, Path]) -> None:
    service, folder = mllama
    reference = MllamaReference(folder)
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 40, 3), dtype=np.uint8))
    said = "What is in the picture? It is the thing."
    parts = [{"type": "image"}, {"type": "text", "text": said}]
    text = reference.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    ids = reference.processor(picture, text, add_special_tokens=False)["input_ids"][0]
    content = [{"type": "image_url", "image_url": {"url": png(picture)}}, {"type": "text", "text": said}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 16, "temperature": 0}
    response = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    expected = reference.greedy(list(ids), [picture], answer["usage"]["completion_tokens"])
    skipped = reference.processor.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == skipped


@pytest.mark.parametrize("mllama", ["large"], indirect=True)
def test_the_first_question_about_a_picture_sends_its_latents_by_shared_memory_and_the_second_none(
    mllama: tuple[Running, Path],
) -> None:
    service, folder = mllama
    family = load_family(folder)
    shared, sent = (transfer.measure(service, family, shares_memory=shares, rounds=2) for shares in (True, False))
    num_bytes = sent.latents_bytes
    assert num_bytes == 4 * family.vision.latents_shape[0] * family.vision.latents_shape[1] * 4
    assert min(sent.first_bytes) > 2 * num_bytes  # out of the encoder, and into the decoder
    canvas = 3 * (2 * 252) ** 2
    assert max(shared.first_bytes) < canvas + 50_000
    assert max(*shared.second_bytes, *sent.second_bytes) < 20_000
