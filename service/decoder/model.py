"""The decoder: a language model with gated cross-attention blocks before some of its layers.

Works on N flat tokens. Where they attend to is not its business: an `Attention` is passed in, which holds the caches,
the page tables and the kernel. So serving, training and tests share this file.
Source: Flamingo (arXiv 2204.14198) §2.2 and fig. 4 for the gated block; Llama 2 and GPT-NeoX for the layers;
`transformers` models/llama, models/gpt_neox and models/idefics for the numerics.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.decoder.layers import QKNorm, make_feed_forward, make_head_norm, make_norm
from service.decoder.rotary import RotaryPositions, Rotations, rotate
from service.families.family import CrossAttentionConfig, DecoderConfig, Unseen

Gates = tuple[Tensor, Tensor]  # tanh of a block's two gates, [D or 1]


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
        layer = ParallelDecoderLayer if config.parallel_residual else DecoderLayer
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_layers))
        self.cross_layers = nn.ModuleDict(
            {str(index): GatedCrossAttentionBlock(config.width, cross, index) for index in cross.layers}
        )
        self.norm = make_norm(config.norm, config.width)
        self.lm_head: nn.Module | None = None
        if not config.tied_head:
            self.lm_head = nn.Linear(config.width, config.num_logits, bias=False)
        self.rotary = RotaryPositions(config.rotary)

    def forward(self, input_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """input_ids and positions int64 [N] -> hidden states before the head [N, D]."""
        x = self.embed_tokens(input_ids)  # (N, D)
        hidden: Tensor = self.norm(self.forward_layers(x, self.rotary.rotations(positions, x.dtype), attention))
        return hidden

    def forward_layers(self, x: Tensor, rotations: Rotations, attention: Attention, first_layer: int = 0) -> Tensor:
        """The layers from `first_layer` on, each after its gated block if it has one. [N, D] -> [N, D]."""
        gates = self.gates()
        for index in range(first_layer, self.config.num_layers):
            if str(index) in self.cross_layers:
                x = self.cross_layers[str(index)](x, attention, gates[index])
            x = self.layers[index](x, rotations, attention)
        return x

    def gates(self) -> dict[int, Gates]:
        """Of every gated block by its layer, in two kernels for all of them."""
        blocks = cast("list[GatedCrossAttentionBlock]", list(self.cross_layers.values()))
        if not blocks:
            return {}
        gates = torch.stack([gate for block in blocks for gate in (block.attn_gate, block.ffn_gate)]).tanh()
        pairs = gates.unflatten(0, (-1, 2))  # (X, 2, D or 1)
        return {block.index: (pairs[place, 0], pairs[place, 1]) for place, block in enumerate(blocks)}

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> fp32 [N, num_logits]."""
        if self.lm_head is None:
            return F.linear(hidden, self.embed_tokens.weight[: self.config.num_logits]).float()
        logits: Tensor = self.lm_head(hidden).float()
        return logits

    def project_image(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """A picture's K and V for every gated block: [T, R, E] -> two of [X, T, R, K, C], X = number of blocks.

        They depend on the picture alone, not on the text before it: computed once, shared by every question.
        """
        blocks = cast("list[GatedCrossAttentionBlock]", list(self.cross_layers.values()))  # in the order of layers
        pairs = [block.project_image(latents) for block in blocks]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


class DecoderLayer(nn.Module):
    """Self-attention, then feed-forward, each added to what it read."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        heads = config.attention
        self.index = index
        self.num_heads, self.num_kv_heads, self.head_width = heads.num_heads, heads.num_kv_heads, heads.head_width
        self.input_layernorm = make_norm(config.norm, config.width)
        qkv_width = self.num_heads * self.head_width + heads.kv_numbers
        self.qkv_proj = nn.Linear(config.width, qkv_width, bias=heads.bias)
        self.qk_norm = QKNorm(heads) if heads.qk_norm is not None else nn.Identity()
        self.o_proj = nn.Linear(self.num_heads * self.head_width, config.width, bias=heads.bias)
        self.post_attention_layernorm = make_norm(config.norm, config.width)
        self.mlp = make_feed_forward(config.feed_forward, config.width)

    def forward(self, x: Tensor, rotations: Rotations, attention: Attention) -> Tensor:
        x = x + self.attend(self.input_layernorm(x), rotations, attention)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x

    def attend(self, x: Tensor, rotations: Rotations, attention: Attention) -> Tensor:
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_width)  # (N, H+2K, C)
        qk, v = qkv.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = rotate(self.qk_norm(qk), rotations).split((self.num_heads, self.num_kv_heads), dim=1)
        out: Tensor = self.o_proj(attention.self_attention(self.index, q, k, v))
        return out


class ParallelDecoderLayer(DecoderLayer):
    """Both read the layer's input, and are added to it together. Source: GPT-NeoX (arXiv 2204.06745) §2.1."""

    def forward(self, x: Tensor, rotations: Rotations, attention: Attention) -> Tensor:
        attended = self.attend(self.input_layernorm(x), rotations, attention)
        out: Tensor = x + attended + self.mlp(self.post_attention_layernorm(x))
        return out


class GatedCrossAttentionBlock(nn.Module):
    """x + tanh(attn_gate)·attention(x, latents), then x + tanh(ffn_gate)·ffn(x)."""

    def __init__(self, width: int, config: CrossAttentionConfig, index: int) -> None:
        super().__init__()
        heads = config.attention
        self.index = index
        self.unseen = config.unseen
        self.num_heads, self.num_kv_heads, self.head_width = heads.num_heads, heads.num_kv_heads, heads.head_width
        self.input_layernorm = make_norm(config.norm, width)
        self.q_proj = nn.Linear(width, self.num_heads * self.head_width, bias=heads.bias)
        self.kv_proj = nn.Linear(config.vision_width, heads.kv_numbers, bias=heads.bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_width, width, bias=heads.bias)
        self.q_norm = make_head_norm(heads)
        self.k_norm = make_head_norm(heads)
        gate_width = width if config.vector_gate else 1
        self.attn_gate = nn.Parameter(torch.zeros(gate_width))
        self.post_attention_layernorm = make_norm(config.norm, width)
        self.mlp = make_feed_forward(config.feed_forward, width)
        self.ffn_gate = nn.Parameter(torch.zeros(gate_width))

    def forward(self, x: Tensor, attention: Attention, gates: Gates | None = None) -> Tensor:
        """`gates`: those of this block, if they were made for all blocks together."""
        gates = (self.attn_gate.tanh(), self.ffn_gate.tanh()) if gates is None else gates
        if self.unseen is Unseen.SKIP_BLOCK:
            return torch.where(attention.sees, self.block(x, attention, gates), x) if attention.any_sees else x
        return self.block(x, attention, gates)

    def block(self, x: Tensor, attention: Attention, gates: Gates) -> Tensor:
        attn_gate, ffn_gate = gates
        if attention.any_sees:
            q = self.q_proj(self.input_layernorm(x)).view(-1, self.num_heads, self.head_width)  # (N, H, C)
            attended = attention.cross_attention(self.index, self.q_norm(q))
            x = torch.addcmul(x, attn_gate, self.o_proj(attended))
        return torch.addcmul(x, ffn_gate, self.mlp(self.post_attention_layernorm(x)))

    def project_image(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[..., R, E] -> K and V, each [..., R, K, C]."""
        kv = self.kv_proj(latents).unflatten(-1, (2, self.num_kv_heads, self.head_width))  # (..., R, 2, K, C)
        k, v = kv.unbind(-3)
        return self.k_norm(k), v
