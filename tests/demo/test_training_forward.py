"""What training and evaluation compute is what is served: the same greedy answers, picture for picture."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from demo.assemble import CONNECTOR, assemble
from demo.model import END_ID, DemoModel, load_connector
from demo.questions import AFTER_QUESTION, SYSTEM
from demo.recipe import IMAGE_TOKEN, IMAGE_TOKEN_ID
from service.contract import SamplingParams, ValidRequest
from service.decoder.engine import Engine
from service.decoder.settings import DecoderSettings
from service.families import load_family
from service.vision.stage import VisionStage
from tests.decoder.drive import add, drain, tokens

EXAMPLES = sorted((Path(__file__).parents[2] / "demo" / "examples").glob("*.png"))
QUESTIONS = ("What is in the picture?", "Is there a fox in the picture?", "How many drawings are there?")


@pytest.mark.timeout(300)
@torch.inference_mode()
def test_training_forward_answers_as_the_engine_does(tmp_path: Path) -> None:
    checkpoint = assemble(tmp_path / "checkpoint", CONNECTOR)
    family = load_family(checkpoint)
    engine = Engine.from_family(family, DecoderSettings(kv_blocks=256, image_pages=16, max_running=8))
    stage = VisionStage(family, "cpu", "float32")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    model = DemoModel()
    load_connector(model, CONNECTOR)
    for index, path in enumerate(EXAMPLES[:4]):
        pictures = family.preprocess(Image.open(path))[None]
        latents = stage.encode(torch.from_numpy(pictures)).flatten(0, 1)
        expected = [answer(model, latents, question) for question in QUESTIONS]
        for place, question in enumerate(QUESTIONS):
            ids = tokenizer.encode(SYSTEM + IMAGE_TOKEN + question + AFTER_QUESTION).ids
            key = hashlib.sha256(path.read_bytes()).hexdigest()
            request = ValidRequest(tuple(ids), (key,), (ids.index(IMAGE_TOKEN_ID),), SamplingParams(max_tokens=20))
            add(engine, 10 * index + place, request, stage, pictures)
        for request_id, events in drain(engine).items():
            assert tokenizer.decode(tokens(events)) == expected[request_id % 10]


def answer(model: DemoModel, latents: torch.Tensor, question: str) -> str:
    sentence = prompt = model.prompt_ids(question)
    while len(sentence) < len(prompt) + 20 and sentence[-1] != END_ID:
        hidden = model.hidden([sentence], latents)[:, len(sentence) - 1]  # (1, D), of the last token
        sentence += (int(model.logits(hidden).argmax()),)
    return model.tokenizer.decode([token for token in sentence[len(prompt) :] if token != END_ID])
