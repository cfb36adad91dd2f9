"""The Perceiver Resampler against `transformers`' IDEFICS, and its options against the Flamingo paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from service.families.parts import Activation
from service.families.vision import ResamplerConfig
from service.vision.resampler import PerceiverResampler

WIDTH, DEPTH, HEADS, HEAD_WIDTH, LATENTS = 48, 3, 4, 8, 6


def reference_names(depth: int, qk_norm: bool) -> dict[str, str]:
    """Our parameter -> the reference's; k and v are one matrix of ours."""
    names = {"latents": "latents", "norm.weight": "layer_norm.weight", "norm.bias": "layer_norm.bias"}
    pairs = {
        "attn.features_norm": ("0.context_layer_norm", True),
        "attn.latents_norm": ("0.latents_layer_norm", True),
        "attn.q_proj": ("0.q_proj", False),
        "attn.o_proj": ("0.output_proj", False),
        "ffn.norm": ("1.ln", True),
        "ffn.up_proj": ("1.fc", False),
        "ffn.down_proj": ("1.c_proj", False),
    }
    if qk_norm:
        pairs |= {"attn.q_norm": ("0.q_layer_norm", True), "attn.k_norm": ("0.k_layer_norm", True)}
    for block in range(depth):
        for ours, (theirs, has_bias) in pairs.items():
            for kind in ("weight", "bias") if has_bias else ("weight",):
                names[f"blocks.{block}.{ours}.{kind}"] = f"blocks.{block}.{theirs}.{kind}"
    return names


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.inference_mode()
def test_latents_equal_transformers_idefics(qk_norm: bool) -> None:
    torch.manual_seed(1)
    idefics = IdeficsConfig(perceiver_config={"qk_layer_norms_perceiver": qk_norm}, vision_config={"embed_dim": WIDTH})
    reference = IdeficsPerceiverResampler(idefics, WIDTH, DEPTH, HEADS, HEAD_WIDTH, LATENTS).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.3)
    ours = PerceiverResampler(
        ResamplerConfig(WIDTH, WIDTH, DEPTH, HEADS, HEAD_WIDTH, LATENTS, 4 * WIDTH, qk_norm=qk_norm)
    )
    theirs = reference.state_dict()
    state = {our_name: theirs[name] for our_name, name in reference_names(DEPTH, qk_norm).items()}
    for block in range(DEPTH):
        kv = [theirs[f"blocks.{block}.0.{part}_proj.weight"] for part in "kv"]
        state[f"blocks.{block}.attn.kv_proj.weight"] = torch.cat(kv)
    ours.load_state_dict(state)
    features = torch.randn(3, 11, WIDTH)
    torch.testing.assert_close(ours(features), reference(features), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_projection_positions_and_activation_follow_the_formula() -> None:
    """Flamingo (arXiv 2204.14198) fig. 5, written out in float64: X_f + positions, then attention over [X_f; x]."""
    torch.manual_seed(2)
    config = ResamplerConfig(20, WIDTH, 1, HEADS, HEAD_WIDTH, LATENTS, 32, activation=Activation.GELU, num_positions=11)
    resampler = PerceiverResampler(config).double().eval()
    for parameter in resampler.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    features = torch.randn(1, 11, 20, dtype=torch.float64)
    p = dict(resampler.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * p[f"{name}.weight"] + p[f"{name}.bias"]

    seen = features[0] @ p["in_proj.weight"].T + p["in_proj.bias"] + p["positions"]  # (P, E)
    latents, block = p["latents"], "blocks.0."
    queries = norm(latents, block + "attn.latents_norm")
    context = torch.cat((norm(seen, block + "attn.features_norm"), queries))  # (P+R, E)
    q = queries @ p[block + "attn.q_proj.weight"].T
    k, v = (context @ p[block + "attn.kv_proj.weight"].T).chunk(2, dim=-1)
    heads = []
    for head in range(HEADS):
        part = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        weights = (q[:, part] @ k[:, part].T / math.sqrt(HEAD_WIDTH)).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ v[:, part])
    latents = latents + torch.cat(heads, dim=-1) @ p[block + "attn.o_proj.weight"].T
    hidden = norm(latents, block + "ffn.norm") @ p[block + "ffn.up_proj.weight"].T
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    expected = norm(latents + hidden @ p[block + "ffn.down_proj.weight"].T, "norm")
    torch.testing.assert_close(resampler(features)[0], expected, atol=1e-9, rtol=1e-9)
