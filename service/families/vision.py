"""Stage 1 as values: an encoder, and what makes latents of its features. No torch.

A picture is a canvas of tiles, `grids` of which an encoder takes: most take one tile, whatever the picture. Each tile
has a page of latents.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.families.parts import Activation

Grid = tuple[int, int]  # rows and columns of tiles
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class EfficientNetConfig:
    """EfficientNet-Lite; `variant`: its published name. `width`: of the features, per position."""

    variant: str
    image_size: int
    width: int
    num_positions: int  # P
    mean: tuple[float, float, float]  # of pixels in 0..1
    std: tuple[float, float, float]

    @property
    def grids(self) -> tuple[Grid, ...]:
        return ((1, 1),)


@dataclass(frozen=True)
class VitConfig:
    """CLIP's vision transformer. `width`: of the features, per position."""

    image_size: int
    width: int
    num_positions: int  # P, class token included
    mean: tuple[float, float, float]  # of pixels in 0..1
    std: tuple[float, float, float]
    patch_size: int
    num_layers: int
    num_heads: int
    ffn_width: int
    activation: Activation = Activation.GELU
    eps: float = 1e-5
    attention_bias: bool = True

    @property
    def grids(self) -> tuple[Grid, ...]:
        return ((1, 1),)


@dataclass(frozen=True)
class TiledVitConfig:
    """Llama 3.2 Vision's transformer over all tiles of a picture: local layers, then gated ones that it calls global.

    `width`: of its layers. The features of a position are those after the last layer, and for each of
    `intermediate_layers` what that local layer reads. `max_tiles`: it computes as many, empty ones among them.
    """

    image_size: int  # of a tile
    width: int
    num_positions: int  # P of a tile, class token included
    mean: tuple[float, float, float]  # of pixels in 0..1
    std: tuple[float, float, float]
    patch_size: int
    num_layers: int
    num_global_layers: int
    num_heads: int
    ffn_width: int
    activation: Activation
    eps: float
    intermediate_layers: tuple[int, ...]
    grids: tuple[Grid, ...]  # in the order of the published embeddings, whose number 0 is no grid
    max_tiles: int
    attention_bias: bool = False

    @property
    def features_width(self) -> int:
        return self.width * (1 + len(self.intermediate_layers))


EncoderConfig = EfficientNetConfig | VitConfig | TiledVitConfig


@dataclass(frozen=True)
class ResamplerConfig:
    """Perceiver Resampler. `num_positions`: learned position embeddings over the encoder's grid, None for none."""

    input_width: int
    width: int  # E
    depth: int
    num_heads: int
    head_width: int
    num_latents: int  # R
    ffn_width: int
    activation: Activation = Activation.RELU
    qk_norm: bool = False
    eps: float = 1e-5
    num_positions: int | None = None


@dataclass(frozen=True)
class ProjectorConfig:
    """A linear layer from features to latents, position by position."""

    input_width: int
    width: int  # E


@dataclass(frozen=True)
class VisionConfig:
    """At most one of `resampler` and `projector`."""

    encoder: EncoderConfig
    resampler: ResamplerConfig | None = None
    projector: ProjectorConfig | None = None

    @property
    def latents_shape(self) -> tuple[int, int]:
        """(R, E) of a page."""
        if self.resampler is not None:
            return self.resampler.num_latents, self.resampler.width
        width = self.encoder.width if self.projector is None else self.projector.width
        return self.encoder.num_positions, width

    @property
    def max_pages(self) -> int:
        """Of one picture."""
        return max(rows * columns for rows, columns in self.encoder.grids)

    @property
    def resized_side(self) -> int:
        """Pixels: resizing a picture to any canvas takes no more memory than to a square of that side.

        A picture keeps its shape on a grid of r rows and c columns: its rows are c tiles long where it is c/r times as
        wide as high, and so c/r times less high than its longer side.
        """
        return self.encoder.image_size * max(min(grid) for grid in self.encoder.grids)

    def grid(self, height: int, width: int) -> Grid | None:
        """Of a canvas of so many pixels; None if there is none such."""
        rows, columns = height // self.encoder.image_size, width // self.encoder.image_size
        fits = (rows * self.encoder.image_size, columns * self.encoder.image_size) == (height, width)
        return (rows, columns) if fits and (rows, columns) in self.encoder.grids else None
