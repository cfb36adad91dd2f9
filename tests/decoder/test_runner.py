"""A step on the device: what each row of it gets, in every layer, of its own text and of its own pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from service.contract import ValidRequest
from service.decoder.model import Decoder
from service.decoder.page_pool import PagePool, PageShape
from service.decoder.runner import PagedAttention, Runner
from service.decoder.scheduler import Chunk, Step
from service.decoder.sequence import Sequence
from service.families.family import CrossAttentionConfig, DecoderConfig, Unseen
from service.families.flamingo import see
from service.families.parts import Activation, AttentionConfig, FeedForwardConfig, RMSNormConfig, as_rotary
from tests.checkpoints import randomize
from tests.decoder.test_attention import formula
from tests.decoder.test_layers import fused

GATED = (0, 2, 3)  # the layers that have a gated block before them
NUM_LATENTS, VISION_WIDTH = 5, 24
LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
)


@pytest.fixture(scope="module")
def reference() -> LlamaModel:
    model = LlamaModel(LLAMA).eval()
    randomize(model, 1)
    return model


@pytest.fixture
def runner(reference: LlamaModel) -> Runner:
    """The reference with gated blocks, all of them wide open; skipped where a token sees no picture."""
    norm, heads = RMSNormConfig(LLAMA.rms_norm_eps), AttentionConfig(4, 2, 8)
    feed_forward = FeedForwardConfig(48, Activation.SILU, gated=True)
    config = DecoderConfig(
        vocab_size=LLAMA.vocab_size,
        num_logits=LLAMA.vocab_size,
        width=LLAMA.hidden_size,
        num_layers=LLAMA.num_hidden_layers,
        norm=norm,
        attention=heads,
        rotary=as_rotary(LLAMA.to_dict(), heads.head_width),
        feed_forward=feed_forward,
        max_positions=LLAMA.max_position_embeddings,
        tied_head=True,
        cross_attention=CrossAttentionConfig(
            GATED, VISION_WIDTH, NUM_LATENTS, norm, heads, feed_forward, False, Unseen.SKIP_BLOCK
        ),
    )
    torch.manual_seed(2)
    model = Decoder(config).eval()
    for parameter in model.cross_layers.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    missing, unexpected = model.load_state_dict(fused(reference.state_dict()), strict=False)
    assert not unexpected and all(name.startswith("cross_layers.") for name in missing)
    cpu = torch.device("cpu")
    text, images = PageShape.of_text(config), PageShape.of_images(config.cross_attention)
    return Runner(model, PagePool(text, 6, cpu, torch.float32), PagePool(images, 12, cpu, torch.float32))


def make_chunk(number: int, length: int, positions: tuple[int, ...] = ()) -> Chunk:
    """A whole prompt with pictures at these positions, each on two pages of its own; two blocks of its own."""
    keys = tuple(f"{number}.{ordinal}" for ordinal in range(len(positions)))
    input_ids = tuple((number * 11 + index * 7) % LLAMA.vocab_size for index in range(length))
    sequence = Sequence(number, ValidRequest(input_ids, keys, positions), {}, see, 0.0, 0)
    sequence.block_table = [2 * number + 1, 2 * number]
    sequence.image_pages = {key: (4 * number + ordinal, 4 * number + ordinal + 2) for ordinal, key in enumerate(keys)}
    return Chunk.next(sequence, length)


def compute(runner: Runner, chunks: list[Chunk]) -> tuple[PagedAttention, Tensor, dict[tuple[int, ...], Tensor]]:
    """A step of these, with random latents on their pages: its attention, its hidden states [N, D], the latents."""
    generator = torch.Generator().manual_seed(3)
    latents = {
        pages: torch.randn(len(pages), NUM_LATENTS, VISION_WIDTH, generator=generator)
        for chunk in chunks
        for pages in chunk.sequence.image_pages.values()
    }
    assert None not in runner.run(Step(chunks, list(latents.items())))
    batch = runner.batch(chunks)
    attention = PagedAttention(runner.self_kv, runner.image_kv, batch, GATED)
    with torch.inference_mode():
        return attention, runner.model(batch.input_ids, batch.positions, attention), latents


def test_each_gated_block_attends_to_its_own_keys_and_values_of_a_picture(runner: Runner) -> None:
    attention, _, latents = compute(runner, [make_chunk(0, 9, (0,))])
    (of_picture,) = latents.values()
    for layer in GATED:
        q = torch.randn(9, 4, 8)
        with torch.inference_mode():
            k_pages, v_pages = runner.model.cross_layers[str(layer)].project_image(of_picture)  # (2, R, K, C)
            ours = attention.cross_attention(layer, q)
        k_pages, v_pages = k_pages.transpose(1, 2), v_pages.transpose(1, 2)
        expected = formula(q, k_pages, v_pages, [(9, [0, 1], 2 * NUM_LATENTS)], causal=False)
        torch.testing.assert_close(ours.double(), expected.flatten(1), atol=1e-5, rtol=1e-5)


def test_text_before_any_picture_is_the_language_model_s_beside_rows_that_see_one(
    runner: Runner, reference: LlamaModel
) -> None:
    chunks = [make_chunk(0, 30, (13, 20)), make_chunk(1, 17), make_chunk(2, 9, (0,))]
    _, hidden, _ = compute(runner, chunks)
    for chunk, ours in zip(chunks, hidden.split([chunk.count for chunk in chunks]), strict=True):
        seeing = [position for position in range(chunk.count) if chunk.sequence.pages(position)]
        num_unseen = min(seeing, default=chunk.count)
        with torch.inference_mode():
            ids = torch.tensor([chunk.sequence.token_ids])
            expected = reference(input_ids=ids, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(ours[:num_unseen], expected[:num_unseen], atol=2e-5, rtol=1e-5)
        assert (ours[num_unseen:] - expected[num_unseen:]).abs().amax(-1).gt(1e-2).all()
