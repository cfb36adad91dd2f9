"""Stage 1: uint8 pixels in, a picture's latents out. Encoder, then Resampler or projector if the family has one.

Knows nothing of Triton: `model_repo/vision_encoder` is its adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from service.checkpoint import load_weights
from service.errors import CrossgateError, Internal, InvalidRequest
from service.families.family import Family
from service.families.vision import EfficientNetConfig, EncoderConfig, TiledVitConfig, VisionConfig, VitConfig
from service.isolation import Pulse, all_finite, run_apart
from service.packed import pack_linears
from service.turns import Turns
from service.vision.efficientnet import EfficientNetLite
from service.vision.resampler import PerceiverResampler
from service.vision.tiled_vit import TiledVisionTransformer
from service.vision.vit import VisionTransformer


class VisionModel(nn.Module):
    """Float pixels, normalised, [B, 3, H, W] -> latents [B, S, R, E], a page for each of S tiles."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.encoder = make_encoder(config.encoder)
        self.resampler = PerceiverResampler(config.resampler) if config.resampler is not None else None
        self.projector = None
        if config.projector is not None:
            self.projector = nn.Linear(config.projector.input_width, config.projector.width)
        self.num_latents = config.latents_shape[0]  # R

    def forward(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.encoder(pixels)  # (B, S*P, features)
        if self.resampler is not None:
            latents = self.resampler(latents)  # (B, S*R, E)
        if self.projector is not None:
            latents = self.projector(latents)  # (B, S*R, E)
        pages: Tensor = latents.unflatten(1, (-1, self.num_latents))
        return pages


class VisionStage:
    """`dtype` "float32", "bfloat16" or "float16"; latents come out as fp32 on a CPU, fp16 on a GPU.

    `turns`: for a CPU on which a decoder computes, too.
    """

    def __init__(self, family: Family, device: str, dtype: str, turns: Turns | None = None) -> None:
        """Loads the weights. Raises InvalidRequest, in one line, for a checkpoint that does not fit."""
        encoder = family.vision.encoder
        self.vision = family.vision
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        with torch.device("meta"):
            model = VisionModel(family.vision)
        load_weights(model, family.folder, family.vision_weight, device, self.dtype)
        pack_linears(model)
        self.model = model.eval()
        self.latents_dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        self._mean = torch.tensor(encoder.mean, device=self.device)[:, None, None]
        self._std = torch.tensor(encoder.std, device=self.device)[:, None, None]
        self._pulse = Pulse(self._probe)
        self._turns = turns
        if turns is not None:
            pass_on_between_layers(self.model, turns)

    def encode_each(self, requests: list[Tensor]) -> list[Tensor | CrossgateError]:
        """Pixels [B, 3, H, W] of each request -> its latents [B, S, R, E] on the CPU, computed together.

        A request that fails, or whose latents are not finite, fails alone. Raises Broken if nothing works any more.
        """
        fitting = [pixels for pixels in requests if self._fits(pixels)]
        computed = run_apart(self._encode_together, fitting)
        self._pulse.beat(not fitting or any(latents is not None for latents in computed))
        of_fitting = iter(computed)
        return [self._result(next(of_fitting)) if self._fits(pixels) else self._misfit() for pixels in requests]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> latents [B, S, R, E]. Normalised here: uint8 is a quarter of the bytes to move."""
        normalised = (pixels.to(self.device).float() / 255 - self._mean) / self._std
        normalised = normalised.to(self.dtype).contiguous(memory_format=torch.channels_last)  # faster convolutions
        latents: Tensor = self.model(normalised)
        return latents.to(self.latents_dtype)

    def _encode_together(self, requests: list[Tensor]) -> list[Tensor | None]:
        pixels = torch.cat(requests)  # (sum of B, 3, H, W)
        if self._turns is None:
            latents = self.encode(pixels).cpu()  # (sum of B, S, R, E)
        else:  # one by one, so that a layer is a short time; on a CPU a batch is no faster
            with self._turns.turn(len(pixels)):
                latents = torch.cat([self.encode(picture) for picture in pixels.split(1)])
        return [part if all_finite(part) else None for part in latents.split([len(part) for part in requests])]

    def _fits(self, pixels: Tensor) -> bool:
        shape = tuple(pixels.shape[1:])
        fits = len(shape) == 3 and shape[0] == 3 and self.vision.grid(shape[1], shape[2]) is not None
        return fits and pixels.dtype == torch.uint8

    def _misfit(self) -> InvalidRequest:
        size, grids = self.vision.encoder.image_size, self.vision.encoder.grids
        shapes = " or ".join(f"[B, 3, {rows * size}, {columns * size}]" for rows, columns in grids)
        return InvalidRequest(f"pixels must be uint8 {shapes}.", param="pixels")

    @staticmethod
    def _result(latents: Tensor | None) -> Tensor | CrossgateError:
        return Internal("The vision encoder failed.") if latents is None else latents

    def _probe(self) -> bool:
        size = self.vision.encoder.image_size
        return self._encode_together([torch.zeros(1, 3, size, size, dtype=torch.uint8)]) != [None]


def make_encoder(config: EncoderConfig) -> nn.Module:
    match config:
        case EfficientNetConfig():
            return EfficientNetLite(config.variant)
        case VitConfig():
            return VisionTransformer(config)
        case TiledVitConfig():
            return TiledVisionTransformer(config)


def pass_on_between_layers(model: nn.Module, turns: Turns) -> None:
    """Before each layer of a stack the other stage may have its turn."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for layer in module:
                layer.register_forward_pre_hook(lambda *_: turns.pass_on())
