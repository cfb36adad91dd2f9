"""How many kernels a decode step would launch on a GPU, in the depth of the models that are served there.

Widths are tiny: they change how long a kernel runs, not how many there are.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from service.contract import ValidRequest
from service.decoder.attention import Scratch
from service.decoder.batch import make_batch
from service.decoder.kv_blocks import BLOCK_SIZE
from service.decoder.model import Decoder
from service.decoder.page_pool import PagePool, PageShape
from service.decoder.runner import Runner
from service.decoder.scheduler import Chunk, Step
from service.decoder.sequence import Sequence
from service.families.family import CrossAttentionConfig, DecoderConfig, Unseen
from service.families.flamingo import see
from service.families.parts import Activation, AttentionConfig, FeedForwardConfig, RMSNormConfig, Rotary
from tests.decoder.launches import Launches

NUM_SEQUENCES = 8
CPU = torch.device("cpu")
NORM = RMSNormConfig(1e-5)
HEADS = AttentionConfig(4, 4, 16)
FEED_FORWARD = FeedForwardConfig(96, Activation.SILU, gated=True)
CROSS = CrossAttentionConfig(
    layers=tuple(range(0, 32, 4)),
    vision_width=24,
    num_latents=5,
    norm=NORM,
    attention=replace(HEADS, qk_norm=NORM),
    feed_forward=FEED_FORWARD,
    vector_gate=True,
    unseen=Unseen.ZERO_ATTENTION,
)
IDEFICS_9B = DecoderConfig(
    vocab_size=52,
    num_logits=50,
    width=64,
    num_layers=32,
    norm=NORM,
    attention=HEADS,
    rotary=Rotary(1e4, HEADS.head_width),
    feed_forward=FEED_FORWARD,
    max_positions=128,
    tied_head=False,
    cross_attention=CROSS,
)
FLAMINGO = replace(  # the demo's family in the same depth, over heads that share K and V
    IDEFICS_9B,
    attention=replace(HEADS, num_kv_heads=2),
    tied_head=True,
    cross_attention=replace(CROSS, attention=HEADS, vector_gate=False, unseen=Unseen.SKIP_BLOCK),
)


@pytest.mark.parametrize(("config", "bound"), [(IDEFICS_9B, 600), (FLAMINGO, 600)], ids=["idefics", "flamingo"])
def test_a_decode_step_launches_few_kernels(config: DecoderConfig, bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = decode_step(config, monkeypatch)
    print(launches.table())
    assert launches.kernels["attend"] == 32 + 8
    assert launches.kernels.total() <= bound, launches.table()


def test_a_batch_comes_to_the_device_in_one_copy_and_is_planned_without_asking_the_device() -> None:
    """The "meta" device stands for a GPU: it is not the host, and what asks it for numbers raises."""
    sequences = [decoding(number) for number in range(NUM_SEQUENCES)]
    sequences[2].num_computed -= 3  # a chunk of four tokens among decodes
    with Launches("meta") as launches:
        chunks = [Chunk.next(each, each.num_uncomputed) for each in sequences]
        batch = make_batch(chunks, 5, torch.device("meta"), Scratch())
        assert launches.uploads == 1
        batch.text.plan(torch.Size((2, BLOCK_SIZE, 8)), torch.bfloat16)
        batch.images.plan(torch.Size((2, 5, 8)), torch.bfloat16)
    assert batch.input_ids.device == batch.text.table.device == batch.images.used.device == torch.device("meta")


def test_a_decode_step_copies_nothing_but_its_batch_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_step(IDEFICS_9B, monkeypatch).uploads == 0, "of the batch, the CPU's own memory is used"


@torch.no_grad()
def decode_step(config: DecoderConfig, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What the runner does for sequences with a picture each, in the dtype that a GPU computes in."""
    torch.manual_seed(0)
    model = Decoder(config).to(torch.bfloat16).eval()
    pools = [
        PagePool(shape, 2 * NUM_SEQUENCES, CPU, torch.bfloat16)
        for shape in (PageShape.of_text(config), PageShape.of_images(config.cross_attention))
    ]
    runner, launches = Runner(model, *pools), Launches()
    step = Step([Chunk.next(decoding(number), 1) for number in range(NUM_SEQUENCES)])
    runner.run(step)  # makes what is made only once
    monkeypatch.setattr("service.decoder.runner.attend", launches.attend)
    with launches:
        tokens = runner.run(step)
    assert None not in tokens
    return launches


def decoding(number: int) -> Sequence:
    """A sequence with one picture; its next token begins a block."""
    sequence = Sequence(number, ValidRequest((1,) * (BLOCK_SIZE + 1), ("key",), (0,)), {}, see, 0.0, 0)
    sequence.block_table, sequence.image_pages = [2 * number, 2 * number + 1], {"key": (number,)}
    sequence.num_computed = BLOCK_SIZE
    return sequence
