"""The demo checkpoint, assembled from its packages: text alone is SmolLM2, token for token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.assemble import CONNECTOR, assemble
from demo.questions import AFTER_QUESTION, SYSTEM
from demo.recipe import IMAGE_TOKEN, IMAGE_TOKEN_ID
from service.contract import SamplingParams
from service.decoder.engine import Engine
from service.decoder.settings import DecoderSettings
from service.families import load_family
from service.vision.stage import VisionStage
from tests.decoder.drive import add, drain, make_request, prompt_logits, tokens

SETTINGS = DecoderSettings(kv_blocks=64, image_pages=4, max_running=4, max_step_tokens=512)
PROMPTS = ("What is the capital of France?", "Write one sentence about 12 foxes.", "naïve café — 東京 🦊?")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble(tmp_path_factory.mktemp("demo") / "checkpoint", CONNECTOR)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> LlamaForCausalLM:
    """`transformers`' Llama on the same dequantized weights, nothing of ours in between."""
    text_config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    model = LlamaForCausalLM(LlamaConfig(**text_config, attn_implementation="eager")).eval()
    weights = {
        name.replace("decoder.", "model.", 1): weight
        for name, weight in load_file(checkpoint / "model.safetensors").items()
        if name.startswith("decoder.") and ".cross_layers." not in name
    }
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][: text_config["vocab_size"]]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model


def prompt_ids(checkpoint: Path, text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids
    return ids


@torch.inference_mode()
def test_text_alone_gives_smollm2_tokens_and_logits(checkpoint: Path, reference: LlamaForCausalLM) -> None:
    family = load_family(checkpoint)
    engine, stage = Engine.from_family(family, SETTINGS), VisionStage(family, "cpu", "float32")
    no_pictures = np.zeros((0, 3, 224, 224), np.uint8)
    for index, question in enumerate(PROMPTS):
        ids = prompt_ids(checkpoint, SYSTEM + question + AFTER_QUESTION)
        request = make_request(family, ids, no_pictures, SamplingParams(max_tokens=24, ignore_eos=True))
        logits = prompt_logits(engine, request, stage, no_pictures)
        expected_logits = reference(torch.tensor([ids])).logits[0, -len(logits) :]  # the shared prefix is cached
        torch.testing.assert_close(logits, expected_logits, atol=1e-3, rtol=1e-4)
        add(engine, index, request, stage, no_pictures)
        expected = reference.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=24, min_new_tokens=24, eos_token_id=None
        )
        assert tokens(drain(engine)[index]) == expected[0, len(ids) :].tolist()


def test_tokenizer_round_trips_and_knows_the_picture(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    for text in PROMPTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode(IMAGE_TOKEN).ids == [IMAGE_TOKEN_ID]
    assert tokenizer.encode("2026").tokens == ["2", "0", "2", "6"]


def test_training_prompts_are_what_the_chat_template_renders(checkpoint: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{IMAGE_TOKEN}What is this?"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == f"{SYSTEM}{IMAGE_TOKEN}What is this?{AFTER_QUESTION}"


def test_assembling_again_replaces_and_leaves_nothing_else(checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors").stat().st_size
    assemble(checkpoint, CONNECTOR)
    assert (checkpoint / "model.safetensors").stat().st_size == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_connector_is_half_precision_and_small() -> None:
    assert CONNECTOR.stat().st_size <= 40_000_000
    with safe_open(CONNECTOR, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
