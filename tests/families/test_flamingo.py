"""Our own family's config.json: which parts it names, and what is refused in one line."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from demo.recipe import checkpoint_config
from service.errors import InvalidRequest
from service.families import load_family
from service.families.parts import (
    Activation,
    AttentionConfig,
    FeedForwardConfig,
    Llama3Scaling,
    RMSNormConfig,
    Rotary,
)
from service.families.vision import EfficientNetConfig, ResamplerConfig, VitConfig

TEXT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 30,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 1e5,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VIT = {
    "kind": "vit",
    "image_size": 28,
    "width": 48,
    "num_positions": 17,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "patch_size": 7,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_width": 80,
    "activation": "quick_gelu",
}


def write(folder: Path, changes: dict[tuple[str, ...], Any]) -> Path:
    """The demo's config with other values, by their path."""
    config = deepcopy(checkpoint_config(TEXT))
    for (*path, key), value in changes.items():
        part = config
        for name in path:
            part = part[name]
        part[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_demo_s_parts_are_named_by_what_they_are(tmp_path: Path) -> None:
    family = load_family(write(tmp_path, {}))
    decoder, cross = family.decoder, family.decoder.cross_attention
    assert isinstance(family.vision.encoder, EfficientNetConfig)
    assert isinstance(family.vision.resampler, ResamplerConfig)
    assert family.vision.resampler.activation is Activation.GELU
    assert decoder.norm == cross.norm == RMSNormConfig(1e-5)
    assert decoder.attention == AttentionConfig(4, 2, 16)
    assert decoder.rotary == Rotary(1e5, 16)
    assert decoder.feed_forward == FeedForwardConfig(96, Activation.SILU, gated=True)
    assert cross.attention == AttentionConfig(9, 3, 64)
    assert family.vision.latents_shape == (24, 512)


def test_a_vit_a_longer_context_and_biases_are_values(tmp_path: Path) -> None:
    changes = {
        ("vision_config", "encoder"): VIT,
        ("text_config", "rope_scaling"): LLAMA3,
        ("text_config", "attention_bias"): True,
        ("text_config", "mlp_bias"): True,
        ("text_config", "hidden_act"): "gelu",
    }
    family = load_family(write(tmp_path, changes))
    assert family.decoder.attention == AttentionConfig(4, 2, 16, bias=True)
    assert family.decoder.feed_forward == FeedForwardConfig(96, Activation.GELU, gated=True, bias=True)
    assert isinstance(family.vision.encoder, VitConfig)
    assert family.vision.encoder.activation is Activation.QUICK_GELU
    assert family.decoder.rotary == Rotary(1e5, 16, Llama3Scaling(32.0, 1.0, 4.0, 8192))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("vision_config", "encoder", "kind"), "resnet", "an encoder of kind 'resnet' is not served"),
        (("vision_config", "encoder", "patch_size"), 14, "unexpected keyword argument 'patch_size'"),
        (("vision_config", "resampler", "activation"), "swish", "'swish' is not a valid Activation"),
        (("vision_config", "encoder"), VIT | {"activation": "swish"}, "'swish' is not a valid Activation"),
        (("text_config", "rope_scaling"), {"rope_type": "yarn"}, "rotary positions of type 'yarn' are not served"),
        (("text_config", "rope_scaling"), {"rope_type": "llama3", "factor": 8.0}, "'llama3' need low_freq_factor"),
        (("text_config", "rope_scaling"), "llama3", "rope_scaling is 'llama3', not an object"),
        (("text_config", "rope_scaling"), LLAMA3 | {"factor": "8"}, "factor is '8', not a positive number"),
        (("text_config", "hidden_size"), 60, "rotate 15 numbers of a head's 15, which cannot be in pairs"),
        (("text_config",), "llama", "config.json: "),
        (("vision_config", "resampler"), "perceiver", "config.json: "),
        (("cross_attention_config",), {}, "config.json lacks 'layers'"),
    ],
)
def test_what_is_not_served_is_one_line(tmp_path: Path, path: tuple[str, ...], value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        load_family(write(tmp_path, {path: value}))
    assert "config.json" in error.value.message and "\n" not in error.value.message
    assert error.value.param == "MODEL_PATH"
