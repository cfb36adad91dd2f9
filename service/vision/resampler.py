"""The Perceiver Resampler: a picture's features of any number -> a fixed number of latents.

One class serves our own family and IDEFICS; parameter names are ours, families map theirs.
Source: Flamingo (arXiv 2204.14198) §3.1.1 and appendix A.1.1; `transformers` models/idefics/perceiver.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.activations import activate
from service.families.vision import ResamplerConfig


class PerceiverResampler(nn.Module):
    """`blocks` of latents that attend to features and themselves, each followed by an FFN; then a norm."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.input_width, config.width) if config.input_width != config.width else None
        self.positions = (
            nn.Parameter(torch.zeros(config.num_positions, config.width)) if config.num_positions is not None else None
        )
        self.latents = nn.Parameter(torch.randn(config.num_latents, config.width))
        self.blocks = nn.ModuleList(ResamplerBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, features: Tensor) -> Tensor:
        """[B, P, input_width] -> latents [B, R, E]."""
        if self.in_proj is not None:
            features = self.in_proj(features)  # (B, P, E)
        if self.positions is not None:
            features = features + self.positions
        latents = self.latents.expand(features.shape[0], -1, -1)  # (B, R, E)
        for block in self.blocks:
            latents = block(features, latents)
        normed: Tensor = self.norm(latents)
        return normed


class ResamplerBlock(nn.Module):
    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.attn = PerceiverAttention(config)
        self.ffn = FeedForward(config)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        latents = latents + self.attn(features, latents)
        latents = latents + self.ffn(latents)
        return latents


class PerceiverAttention(nn.Module):
    """Queries from the latents; keys and values from features and latents together."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        inner = config.num_heads * config.head_width
        self.features_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.latents_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.q_proj = nn.Linear(config.width, inner, bias=False)
        self.kv_proj = nn.Linear(config.width, 2 * inner, bias=False)
        self.o_proj = nn.Linear(inner, config.width, bias=False)
        self.q_norm = nn.LayerNorm(config.head_width, eps=config.eps) if config.qk_norm else None
        self.k_norm = nn.LayerNorm(config.head_width, eps=config.eps) if config.qk_norm else None

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        latents = self.latents_norm(latents)
        context = torch.cat((self.features_norm(features), latents), dim=1)  # (B, P+R, E)
        q = self.q_proj(latents).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, R, C)
        kv = self.kv_proj(context).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]  # (B, heads, P+R, C)
        q = self.q_norm(q) if self.q_norm is not None else q
        k = self.k_norm(k) if self.k_norm is not None else k
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, R, heads*C)
        projected: Tensor = self.o_proj(out)
        return projected


class FeedForward(nn.Module):
    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.up_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(activate(self.up_proj(self.norm(x)), self.activation))
        return out
