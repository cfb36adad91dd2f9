"""The decoder: a Llama-style language model with gated cross-attention blocks before some of its layers.

Works on N flat tokens. Where they attend to is not its business: an `Attention` is passed in, which holds the caches,
the page tables and the kernel. So serving, training and tests share this file.
Source: Flamingo (arXiv 2204.14198) §2.2 and fig. 4 for the gated block; Llama 2 for the rest;
`transformers` models/llama and models/idefics for the numerics.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.families.family import CrossAttentionConfig, DecoderConfig, Unseen


class Attention(Protocol):
    """What the tokens of one step attend to. `sees`: bool [N, 1], whether a token sees any picture."""

    sees: Tensor
    any_sees: bool  # known without asking the device

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, C], k and v [N, K, C], rotated -> [N, H*C]. Stores k and v."""
        ...

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        """q [N, H, C] of the block before decoder layer `layer` -> [N, H*C], 0 for tokens that see no picture."""
        ...


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        cross = config.cross_attention
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.cross_layers = nn.ModuleDict(
            {str(index): GatedCrossAttentionBlock(config.width, config.eps, cross, index) for index in cross.layers}
        )
        self.norm = RMSNorm(config.width, config.eps)
        self.lm_head: nn.Module | None = None
        if not config.tied_head:
            self.lm_head = nn.Linear(config.width, config.num_logits, bias=False)

    def forward(self, input_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """input_ids and positions int64 [N] -> hidden states before the head [N, D]."""
        x = self.embed_tokens(input_ids)  # (N, D)
        hidden: Tensor = self.norm(self.forward_layers(x, self.rope(positions, x.dtype), attention))
        return hidden

    def forward_layers(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], attention: Attention, first_layer: int = 0
    ) -> Tensor:
        """The layers from `first_layer` on, each after its gated block if it has one. [N, D] -> [N, D]."""
        for index in range(first_layer, self.config.num_layers):
            if str(index) in self.cross_layers:
                x = self.cross_layers[str(index)](x, attention)
            x = self.layers[index](x, cos_sin, attention)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> fp32 [N, num_logits]."""
        if self.lm_head is None:
            return F.linear(hidden, self.embed_tokens.weight[: self.config.num_logits]).float()
        logits: Tensor = self.lm_head(hidden).float()
        return logits

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles, each [N, 1, C]. Source: RoFormer (arXiv 2104.09864), halves rotated."""
        width = self.config.head_width
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
        angles = positions[:, None].float() * (1.0 / self.config.rope_theta**exponents)  # (N, C/2)
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # (N, 1, C)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def project_image(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """A picture's K and V for every gated block: [T, R, E] -> two of [X, T, R, K, C], X = number of blocks.

        They depend on the picture alone, not on the text before it: computed once, shared by every question.
        """
        blocks = cast("list[GatedCrossAttentionBlock]", list(self.cross_layers.values()))  # in the order of layers
        pairs = [block.project_image(latents) for block in blocks]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.num_heads, self.num_kv_heads, self.head_width = config.num_heads, config.num_kv_heads, config.head_width
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.qkv_proj = nn.Linear(config.width, (self.num_heads + 2 * self.num_kv_heads) * self.head_width, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_width, config.width, bias=False)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)
        self.mlp = SwiGLU(config.width, config.ffn_width)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        qkv = self.qkv_proj(self.input_layernorm(x))
        qkv = qkv.view(x.shape[0], -1, self.head_width)  # (N, H+2K, C)
        qk, v = qkv.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = rotate(qk, cos_sin).split((self.num_heads, self.num_kv_heads), dim=1)
        x = x + self.o_proj(attention.self_attention(self.index, q, k, v))
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class GatedCrossAttentionBlock(nn.Module):
    """x + tanh(attn_gate)·attention(x, latents), then x + tanh(ffn_gate)·ffn(x)."""

    def __init__(self, width: int, eps: float, config: CrossAttentionConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.unseen = config.unseen
        self.num_heads, self.num_kv_heads, self.head_width = config.num_heads, config.num_kv_heads, config.head_width
        self.input_layernorm = RMSNorm(width, eps)
        self.q_proj = nn.Linear(width, self.num_heads * self.head_width, bias=False)
        self.kv_proj = nn.Linear(config.vision_width, 2 * self.num_kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_width, width, bias=False)
        self.q_norm = RMSNorm(self.head_width, eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_width, eps) if config.qk_norm else None
        gate_width = width if config.vector_gate else 1
        self.attn_gate = nn.Parameter(torch.zeros(gate_width))
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, config.ffn_width)
        self.ffn_gate = nn.Parameter(torch.zeros(gate_width))

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        if self.unseen is Unseen.SKIP_BLOCK:
            return torch.where(attention.sees, self.block(x, attention), x) if attention.any_sees else x
        return self.block(x, attention)

    def block(self, x: Tensor, attention: Attention) -> Tensor:
        if attention.any_sees:
            q = self.q_proj(self.input_layernorm(x)).view(-1, self.num_heads, self.head_width)  # (N, H, C)
            q = self.q_norm(q) if self.q_norm is not None else q
            x = x + self.attn_gate.tanh() * self.o_proj(attention.cross_attention(self.index, q))
        out: Tensor = x + self.ffn_gate.tanh() * self.mlp(self.post_attention_layernorm(x))
        return out

    def project_image(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[..., R, E] -> K and V, each [..., R, K, C]."""
        kv = self.kv_proj(latents).unflatten(-1, (2, self.num_kv_heads, self.head_width))  # (..., R, 2, K, C)
        k, v = kv.unbind(-3)
        return self.k_norm(k) if self.k_norm is not None else k, v


class SwiGLU(nn.Module):
    """down(silu(gate(x))·up(x)), gate and up in one matrix."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * ffn_width, bias=False)
        self.down_proj = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the mean square in fp32. Source: arXiv 1910.07467, `transformers` LlamaRMSNorm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        normed: Tensor = self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)
        return normed


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each half-pair of [N, H, C] by its rotary angle."""
    cos, sin = cos_sin
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
