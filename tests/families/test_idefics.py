"""IDEFICS against `transformers`: latents, logits and every greedy token, over the options of its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import IdeficsImageProcessor

from service.contract import SamplingParams
from service.decoder.engine import Engine
from service.decoder.settings import DecoderSettings
from service.families import Family, load_family
from service.families.family import sights
from service.vision.stage import VisionStage
from tests.checkpoints import make_idefics
from tests.decoder.drive import add, drain, make_request, prompt_logits, tokens
from tests.reference import IdeficsReference

CONFIGS: dict[str, dict[str, Any]] = {
    "resampler-norms-vector": {},
    "no_resampler": {"use_resampler": False},
    "no_norms": {"qk_layer_norms": False, "qk_layer_norms_perceiver": False},
    "scalar_gates": {"alpha_type": "float"},
    "no_additional_vocab": {"additional_vocab_size": 0},
    "cross_every_layer": {"cross_layer_interval": 1, "num_hidden_layers": 3},
    "interval_three": {"cross_layer_interval": 3, "num_hidden_layers": 6, "use_resampler": False},
    "sharded": {"max_shard_size": "100KB", "alpha_type": "float", "qk_layer_norms": False},
    "plain": {
        "use_resampler": False,
        "qk_layer_norms": False,
        "alpha_type": "float",
        "additional_vocab_size": 0,
    },
}
NUM_TOKENS = 64


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_idefics(tmp_path_factory.mktemp(request.param), **CONFIGS[request.param])


def prompts(family: Family) -> dict[str, tuple[list[int], int]]:
    """Prompts with their number of pictures: text before the first, several end-of-document tokens, 1 to 4 pictures."""
    rng = np.random.default_rng(7)
    image, end = [family.image_token_id], [2]

    def text(count: int) -> list[int]:
        return [int(token) for token in rng.integers(3, 300, count)]

    return {
        "one": ([1, *image, *text(9)], 1),
        "text_before": ([1, *text(12), *image, *text(5)], 1),
        "two_in_a_row": ([1, *image, *image, *text(6)], 2),
        "documents": ([1, *image, *text(4), *end, *text(5), *end, *text(2), *image, *text(3)], 2),
        "four": ([1, *text(3), *image, *text(4), *end, *image, *text(20), *image, *end, *text(3), *image, *text(2)], 4),
    }


def test_logits_and_greedy_tokens_equal_transformers(checkpoint: Path) -> None:
    family = load_family(checkpoint)
    reference = IdeficsReference(checkpoint, family.image_token_id)
    stage = VisionStage(family, "cpu", "float32")
    engine = Engine.from_family(family, DecoderSettings(kv_blocks=64, image_pages=8))
    rng = np.random.default_rng(1)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    for name, (input_ids, num_pictures) in prompts(family).items():
        pictures = rng.integers(0, 256, (num_pictures, 3, 28, 28), dtype=np.uint8)
        request = make_request(family, input_ids, pictures, sampling)

        vision = reference.vision(pictures)
        expected = reference.logits(input_ids, vision)
        torch.testing.assert_close(prompt_logits(engine, request, stage, pictures), expected, atol=1e-4, rtol=0)

        add(engine, 0, request, stage, pictures)
        generated = tokens(drain(engine)[0])
        assert generated == reference.greedy(input_ids, pictures, NUM_TOKENS), name
        assert len(set(generated)) > 8, "a run of one repeated token would prove little"


def test_text_alone_equals_transformers_with_every_picture_masked(checkpoint: Path) -> None:
    family = load_family(checkpoint)
    reference = IdeficsReference(checkpoint, family.image_token_id)
    engine = Engine.from_family(family, DecoderSettings(kv_blocks=64, image_pages=8))
    stage = VisionStage(family, "cpu", "float32")
    input_ids = [1, 40, 50, 60, 70, 80]
    unseen = np.zeros((1, 3, 28, 28), dtype=np.uint8)
    none = np.zeros((0, 3, 28, 28), dtype=np.uint8)
    request = make_request(family, input_ids, none, SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True))
    expected = reference.logits(input_ids, reference.vision(unseen))
    torch.testing.assert_close(prompt_logits(engine, request, stage, none), expected, atol=1e-4, rtol=0)
    add(engine, 0, request, stage, none)
    assert tokens(drain(engine)[0]) == reference.greedy(input_ids, unseen, NUM_TOKENS)


def test_preprocessing_equals_the_published_image_processor(tmp_path: Path) -> None:
    family = load_family(make_idefics(tmp_path))
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 256, (61, 47, 3), dtype=np.uint8))
    stage = VisionStage(family, "cpu", "float32")
    ours = (torch.from_numpy(family.preprocess(picture)).float() / 255 - stage._mean) / stage._std
    theirs = torch.as_tensor(IdeficsImageProcessor.from_pretrained(tmp_path)(picture)[0])
    # theirs resizes with torch, ours with Pillow: at most one grey level (1/255/0.26) apart
    torch.testing.assert_close(ours, theirs, atol=1.01 / 255 / 0.26, rtol=0)


def test_a_token_after_end_of_document_sees_nothing_until_the_next_picture(tmp_path: Path) -> None:
    family = load_family(make_idefics(tmp_path))
    image = family.image_token_id
    input_ids = (1, 5, image, 6, 2, 7, 8, image, 9, 2, image, image, 4)
    expected = [(), (), (0,), (0,), (0,), (), (), (1,), (1,), (1,), (2,), (3,), (3,)]
    assert sights(family.see, input_ids, (2, 7, 10, 11)) == expected
