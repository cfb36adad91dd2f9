"""The planner's counts against the tensors that the decoder really makes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from service.capacity import BLOCK_SIZE, main, parse_size, plan
from service.decoder import kv_blocks
from service.decoder.model import Decoder
from service.decoder.page_pool import PagePool, PageShape
from service.decoder.pool_sizes import HOST_SHARE, pool_sizes
from service.decoder.settings import DTYPES, DecoderSettings
from service.families.card import BYTES
from service.families.family import CrossAttentionConfig, DecoderConfig, Unseen
from service.families.parts import (
    Activation,
    AttentionConfig,
    FeedForwardConfig,
    LayerNormConfig,
    RMSNormConfig,
    Rotary,
)
from service.shares import MAX_PAGES

RMS, LAYER_NORM = RMSNormConfig(1e-5), LayerNormConfig(1e-5, bias=True)
HEADS = AttentionConfig(num_heads=4, num_kv_heads=2, head_width=8)
CROSS = CrossAttentionConfig(
    layers=(0, 2),
    vision_width=24,
    num_latents=5,
    norm=RMS,
    attention=replace(HEADS, qk_norm=RMS),
    feed_forward=FeedForwardConfig(48, Activation.SILU, gated=True),
    vector_gate=True,
    unseen=Unseen.SKIP_BLOCK,
)
CONFIG = DecoderConfig(
    vocab_size=103,
    num_logits=100,
    width=32,
    num_layers=3,
    norm=RMS,
    attention=HEADS,
    rotary=Rotary(1e4, 8),
    feed_forward=FeedForwardConfig(64, Activation.SILU, gated=True),
    max_positions=128,
    tied_head=False,
    cross_attention=CROSS,
)
PLAIN = FeedForwardConfig(40, Activation.GELU, gated=False, bias=True)
OTHERS = [
    CONFIG,
    replace(CONFIG, tied_head=True),
    replace(CONFIG, cross_attention=replace(CROSS, attention=HEADS, vector_gate=False)),
    replace(CONFIG, attention=replace(HEADS, num_kv_heads=4), cross_attention=replace(CROSS, layers=(1,))),
    replace(CONFIG, norm=LAYER_NORM, feed_forward=PLAIN, parallel_residual=True),
    replace(CONFIG, norm=replace(LAYER_NORM, bias=False), attention=replace(HEADS, bias=True, qk_norm=LAYER_NORM)),
    replace(CONFIG, cross_attention=replace(CROSS, attention=replace(HEADS, bias=True), feed_forward=PLAIN)),
    replace(CONFIG, feed_forward=replace(CONFIG.feed_forward, bias=True)),
]
IDEFICS_9B = {
    "model_type": "idefics",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "cross_layer_interval": 4,
    "vocab_size": 32000,
    "additional_vocab_size": 2,
    "qk_layer_norms": True,
    "use_resampler": True,
    "vision_config": {"embed_dim": 1280},
    "perceiver_config": {"resampler_n_latents": 64},
}


@pytest.mark.parametrize("config", OTHERS)
def test_parameters_are_those_of_the_real_decoder(config):
    with torch.device("meta"):
        decoder = Decoder(config)
    assert config.num_parameters == sum(parameter.numel() for parameter in decoder.parameters())


@pytest.mark.parametrize("config", OTHERS)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_bytes_are_those_of_the_real_caches(config, dtype):
    capacity = plan(config, dtype, memory_bytes=10**9)
    device = torch.device("meta")
    tokens = PagePool(PageShape.of_text(config), 7, device, DTYPES[dtype])
    assert capacity.token_bytes * 7 * BLOCK_SIZE == tokens.k.nbytes + tokens.v.nbytes
    pictures = PagePool(PageShape.of_images(config.cross_attention), 11, device, DTYPES[dtype])
    assert capacity.page_bytes * 11 == pictures.k.nbytes + pictures.v.nbytes


def test_constants_are_the_engines():
    assert kv_blocks.BLOCK_SIZE == BLOCK_SIZE
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == BYTES


@pytest.mark.parametrize("memory", [10**6, 10**7, 10**9])  # the last has room for more pictures than are made
def test_what_fits_is_what_the_engine_would_make(monkeypatch, memory):
    capacity = plan(CONFIG, "bfloat16", memory)
    free = memory - capacity.weight_bytes
    monkeypatch.setattr("service.decoder.pool_sizes.free_host_bytes", lambda: int(free / HOST_SHARE))
    roomy = DecoderSettings(dtype="bfloat16", max_running=10**6, max_step_tokens=10**6 + 1)
    num_blocks, num_pages = pool_sizes(
        SimpleNamespace(decoder=CONFIG, vision=SimpleNamespace(max_pages=1)), None, roomy
    )
    assert (capacity.num_tokens, capacity.num_pages) == (num_blocks * BLOCK_SIZE, num_pages)
    assert (num_pages == MAX_PAGES) == (memory == 10**9)


@pytest.mark.parametrize("max_pages", [1, 4])
def test_for_each_context_there_are_32_of_the_largest_pictures(max_pages):
    capacity = plan(CONFIG, "bfloat16", 10**7, max_pages)
    free = 10**7 - capacity.weight_bytes
    text = capacity.num_tokens * capacity.token_bytes * 4 / 3  # of 3 layers, 4
    pictures = capacity.num_pages * capacity.page_bytes * 3 / 2
    assert text + pictures == pytest.approx(free, rel=0.01)
    num_contexts = capacity.num_tokens / CONFIG.max_positions
    per_context = capacity.num_pages / max_pages / num_contexts
    assert per_context == pytest.approx(32 * (4 / 3) / (3 / 2), rel=0.05)
    assert capacity.max_batch(100) == capacity.num_tokens // 112  # whole blocks


def test_model_that_does_not_fit_leaves_room_for_nothing():
    capacity = plan(CONFIG, "float32", memory_bytes=1000)
    assert (capacity.num_tokens, capacity.num_pages) == (0, 0)


def test_step_reads_weights_once_and_kv_for_each_sequence():
    capacity = plan(CONFIG, "float16", memory_bytes=10**9)
    one, many = capacity.step_bytes(1, 64, 2), capacity.step_bytes(9, 64, 2)
    assert many - one == 8 * (64 * capacity.token_bytes + 2 * capacity.page_bytes)
    assert capacity.weight_bytes - capacity.read_bytes == CONFIG.vocab_size * CONFIG.width * 2
    tied = plan(OTHERS[1], "float16", memory_bytes=10**9)
    assert tied.read_bytes == tied.weight_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("3.35TB/s", 3_350_000_000_000), ("141 gb", 141 * 10**9), ("7", 7)],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "much", "8XB", "GB", "-3GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError):
        parse_size(text)


def test_command_plans_from_a_config_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(IDEFICS_9B))
    assert main([str(tmp_path), "--gpu-memory", "80GB", "--bandwidth", "3.35TB/s"]) == 0
    out = capsys.readouterr().out
    assert "a token    524.29 kB" in out  # 2 · 32 · 32 · 128 · 2 bytes
    assert "a picture  8.39 MB" in out  # 2 · 8 · 64 · 32 · 128 · 2 bytes
    assert "as much as 16.0 tokens" in out
    assert "does not fit" in out


def test_folder_that_is_no_checkpoint_is_one_clear_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
