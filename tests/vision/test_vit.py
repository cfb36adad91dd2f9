"""The vision transformer against `transformers`' CLIP, whose activation IDEFICS does not use."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from service.families.parts import Activation
from service.families.vision import VitConfig
from service.vision.vit import VisionTransformer


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_features_equal_clips_last_hidden_state(activation: str) -> None:
    torch.manual_seed(0)
    reference = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
            hidden_act=activation,
        )
    ).eval()
    config = VitConfig(
        28,
        32,
        17,
        (0, 0, 0),
        (1, 1, 1),
        patch_size=7,
        num_layers=3,
        num_heads=4,
        ffn_width=64,
        activation=Activation(activation),
    )
    model = VisionTransformer(config).eval()
    state: dict[str, torch.Tensor] = {}
    published = reference.state_dict()
    for name, weight in published.items():
        ours = name.removeprefix("vision_model.").removeprefix("encoder.").replace("pre_layrnorm", "pre_layernorm")
        if ours.startswith("post_layernorm") or ours.endswith("position_ids"):
            continue
        if ".q_proj." in ours:
            parts = [published[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            state[ours.replace(".q_proj.", ".qkv_proj.")] = torch.cat(parts)
        elif ".k_proj." not in ours and ".v_proj." not in ours:
            state[ours] = weight
    model.load_state_dict(state)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(model(pixels), reference(pixels).last_hidden_state, atol=1e-5, rtol=0)
