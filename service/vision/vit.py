"""CLIP's vision transformer, up to the features of the last layer.

Source: CLIP (arXiv 2103.00020); `transformers` models/clip and models/idefics/vision.py, whose parameter names these
are. The pooled output and its norm are not part of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.activations import activate
from service.families.vision import TiledVitConfig, VitConfig

LayerConfig = VitConfig | TiledVitConfig


class VisionTransformer(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layernorm = nn.LayerNorm(config.width, eps=config.eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> features [B, P, E], the class token first."""
        x: Tensor = self.pre_layernorm(self.embeddings(pixels))
        for layer in self.layers:
            x = layer(x)
        return x


class Embeddings(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.num_positions, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, P-1, E)
        first = self.class_embedding.expand(pixels.shape[0], 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


class EncoderLayer(nn.Module):
    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, num_real: int | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), num_real)
        x = x + self.mlp(self.layer_norm2(x))
        return x


class SelfAttention(nn.Module):
    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv_proj = nn.Linear(config.width, 3 * config.width, bias=config.attention_bias)
        self.out_proj = nn.Linear(config.width, config.width, bias=config.attention_bias)

    def forward(self, x: Tensor, num_real: int | None = None) -> Tensor:
        """[B, P, E] -> [B, P, E]. Positions from `num_real` on are padding: they see the real ones, not each other."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, P, C)
        if num_real is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            real = F.scaled_dot_product_attention(q[:, :, :num_real], k, v)
            padding = F.scaled_dot_product_attention(q[:, :, num_real:], k[:, :, :num_real], v[:, :, :num_real])
            out = torch.cat((real, padding), dim=2)
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, P, E)
        return projected


class MLP(nn.Module):
    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(activate(self.fc1(x), self.activation))
        return out
