"""Llama 3.2 Vision's encoder: one transformer over all tiles of a picture, padding included.

A picture of n tiles is computed as `max_tiles`, of which the others are empty, and each tile's positions are filled up
to a multiple of eight. Real positions attend to all of that, padding to what is real; only the real ones come out. They
stand first here, so that no mask is needed.

Source: the Llama 3 report (arXiv 2407.21783) §7.1; Meta's llama-models, models/llama3/reference_impl/multimodal, for
the numerics; `transformers` models/mllama for the weights, whose embeddings of tiles are made for each grid. A
departure from its versions since 4.55: an intermediate layer gives what it reads, as Meta's and the older ones have it;
theirs gives what it wrote.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.families.vision import TiledVitConfig
from service.vision.vit import EncoderLayer

MULTIPLE = 8  # of positions, for each tile


class TiledVisionTransformer(nn.Module):
    def __init__(self, config: TiledVitConfig) -> None:
        super().__init__()
        self.config = config
        width, numbers = config.width, len(config.grids) + 1
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Parameter(torch.zeros(config.num_positions, width))
        self.position_gate = nn.Parameter(torch.zeros(1))
        self.tile_position_embedding = nn.Embedding(numbers, config.max_tiles * config.num_positions * width)
        self.pre_tile_embedding = nn.Embedding(numbers, config.max_tiles * width)
        self.pre_tile_gate = nn.Parameter(torch.zeros(1))
        self.post_tile_embedding = nn.Embedding(numbers, config.max_tiles * width)
        self.post_tile_gate = nn.Parameter(torch.zeros(1))
        self.pre_layernorm = nn.LayerNorm(width)
        self.post_layernorm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.global_layers = nn.ModuleList(GatedEncoderLayer(config) for _ in range(config.num_global_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised canvases [B, 3, rows*H, columns*W] of one grid -> features [B, S*P, features_width], by tile."""
        config = self.config
        rows, columns = pixels.shape[2] // config.image_size, pixels.shape[3] // config.image_size
        num_real_tiles = rows * columns
        grid = config.grids.index((rows, columns)) + 1
        x = self._embed(pixels, rows, columns, grid)  # (B, max_tiles, P, E)
        x = F.pad(self.pre_layernorm(x), (0, 0, 0, -config.num_positions % MULTIPLE))  # (B, max_tiles, P', E)
        is_real = torch.zeros(x.shape[1:3], dtype=torch.bool)
        is_real[:num_real_tiles, : config.num_positions] = True
        order = torch.cat((is_real.flatten().nonzero(), (~is_real).flatten().nonzero()))[:, 0].to(x.device)
        num_real = num_real_tiles * config.num_positions
        tiles = order // x.shape[2]  # of each position
        x = x.flatten(1, 2)[:, order]  # (B, max_tiles*P', E), the real ones first

        intermediate: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            if index in config.intermediate_layers:
                intermediate.append(x[:, :num_real])
            x = layer(x, num_real)
        after = self.post_tile_embedding.weight[grid].unflatten(0, (config.max_tiles, -1))  # (max_tiles, E)
        x = self.post_layernorm(x) + after[tiles] * self.post_tile_gate.tanh()
        for layer in self.global_layers:
            x = layer(x, num_real)
        features: Tensor = x[:, :num_real]
        if intermediate:  # by channel: (B, S*P, E * intermediate layers)
            features = torch.cat((features, torch.stack(intermediate, dim=-1).flatten(-2)), dim=-1)
        return features

    def _embed(self, pixels: Tensor, rows: int, columns: int, grid: int) -> Tensor:
        """[B, max_tiles, P, E]: patches, class token, and where they are in tile and picture."""
        config, size = self.config, self.config.image_size
        tiles = pixels.unflatten(2, (rows, size)).unflatten(4, (columns, size)).permute(0, 2, 4, 1, 3, 5)
        patches = self.patch_embedding(tiles.flatten(0, 2)).flatten(2).transpose(1, 2)  # (B*S, P-1, E)
        patches = patches.unflatten(0, (-1, rows * columns))  # (B, S, P-1, E)
        x = F.pad(patches, (0, 0, 0, 0, 0, config.max_tiles - rows * columns))  # an empty tile: 0
        before = self.pre_tile_embedding.weight[grid].view(config.max_tiles, 1, -1)
        x = x + before * self.pre_tile_gate.tanh()
        x = torch.cat((self.class_embedding.expand(*x.shape[:2], 1, -1), x), dim=2)  # (B, max_tiles, P, E)
        of_tiles = self.tile_position_embedding.weight[grid].view(config.max_tiles, config.num_positions, -1)
        gate = self.position_gate.tanh()
        return x + (1 - gate) * self.position_embedding + gate * of_tiles


class GatedEncoderLayer(EncoderLayer):
    def __init__(self, config: TiledVitConfig) -> None:
        super().__init__(config)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ffn_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, num_real: int | None = None) -> Tensor:
        x = x + self.attn_gate.tanh() * self.self_attn(self.layer_norm1(x), num_real)
        x = x + self.ffn_gate.tanh() * self.mlp(self.layer_norm2(x))
        return x
