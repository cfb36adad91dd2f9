"""Norms and feed-forwards, made from their configs. Self- and cross-attention layers use the same ones.

Every matrix is an `nn.Linear`. Where tokens stand and what they attend to is not known here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.activations import activate
from service.families.parts import (
    Activation,
    AttentionConfig,
    FeedForwardConfig,
    LayerNormConfig,
    NormConfig,
    RMSNormConfig,
)


def make_norm(config: NormConfig, width: int) -> nn.Module:
    match config:
        case RMSNormConfig():
            return RMSNorm(width, config.eps)
        case LayerNormConfig():
            return nn.LayerNorm(width, eps=config.eps, bias=config.bias)


def make_head_norm(config: AttentionConfig) -> nn.Module:
    """Of queries, or of keys, [..., C]."""
    return nn.Identity() if config.qk_norm is None else make_norm(config.qk_norm, config.head_width)


def make_feed_forward(config: FeedForwardConfig, width: int) -> nn.Module:
    """[N, D] -> [N, D]."""
    return (GatedFeedForward if config.gated else FeedForward)(width, config.width, config.activation, config.bias)


class FeedForward(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, width: int, ffn_width: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up_proj = nn.Linear(width, ffn_width, bias=bias)
        self.down_proj = nn.Linear(ffn_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(activate(self.up_proj(x), self.activation))
        return out


class GatedFeedForward(nn.Module):
    """down(act(gate(x)) · up(x)), gate and up in one matrix. Source: GLU Variants (arXiv 2002.05202)."""

    def __init__(self, width: int, ffn_width: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up_proj = nn.Linear(width, 2 * ffn_width, bias=bias)
        self.down_proj = nn.Linear(ffn_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(activate(gate, self.activation) * up)
        return out


class QKNorm(nn.Module):
    """The norms of queries and keys that one projection made: [N, H+K, C] -> [N, H+K, C]."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads)
        self.q_norm = make_head_norm(config)
        self.k_norm = make_head_norm(config)

    def forward(self, qk: Tensor) -> Tensor:
        q, k = qk.split(self.heads, dim=1)
        return torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in fp32, one kernel on a GPU. Source: arXiv 1910.07467, `transformers` LlamaRMSNorm, which
    rounds before the weight, too."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
