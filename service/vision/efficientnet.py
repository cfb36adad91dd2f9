"""EfficientNet-Lite as a frozen picture encoder: normalised pixels in, a grid of features out.

Knows nothing about uint8, preprocessing or the resampler: the stage normalises on the device before it calls
this. Batch normalisation is folded into the convolutions when published weights are converted, because a frozen
encoder never updates it and the folded network is faster on a CPU.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Variant(NamedTuple):
    width: float
    depth: float
    image_size: int


VARIANTS = {
    "efficientnet-lite0": Variant(width=1.0, depth=1.0, image_size=224),
    "efficientnet-lite2": Variant(width=1.1, depth=1.2, image_size=260),
}

# repeats, kernel, stride, expansion, output channels of each of the seven stages of EfficientNet-B0
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
FEATURE_CHANNELS = 1280
BATCH_NORM_EPS = 1e-3


class EfficientNetLite(nn.Module):
    """Maps [B, 3, H, W] pixels, already normalised to (x - 127) / 128, to features [B, P, 1280], row by row.

    P is ceil(H / 32) * ceil(W / 32). Any height and width are accepted; the published weights were trained at
    the variant's `image_size`.
    Source: tensorflow/tpu models/official/efficientnet/lite/efficientnet_lite_builder.py (stem and head are not
    scaled, ReLU6, no squeeze-and-excitation), read through the package efficientnet-lite-pytorch.
    """

    def __init__(self, variant: str) -> None:
        super().__init__()
        width, depth, _ = VARIANTS[variant]
        self.stem = SameConv(3, STEM_CHANNELS, kernel=3, stride=2)
        blocks: list[nn.Module] = []
        channels = STEM_CHANNELS
        for index, (repeats, kernel, stride, expansion, outputs) in enumerate(STAGES):
            outputs = round_channels(outputs, width)
            if index not in (0, len(STAGES) - 1):
                repeats = math.ceil(repeats * depth)
            for repeat in range(repeats):
                blocks.append(InvertedResidual(channels, outputs, kernel, stride if repeat == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(channels, FEATURE_CHANNELS, kernel=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu6(self.stem(pixels))  # [B, 32, H/2, W/2]
        for block in self.blocks:
            x = block(x)
        x = F.relu6(self.head(x))  # [B, 1280, H/32, W/32]
        return x.flatten(2).transpose(1, 2)  # [B, P, 1280]


class InvertedResidual(nn.Module):
    """Expand, filter each channel alone, project; the input is added where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = SameConv(inputs, hidden, kernel=1) if expansion != 1 else None
        self.depthwise = SameConv(hidden, hidden, kernel=kernel, stride=stride, groups=hidden)
        self.project = SameConv(hidden, outputs, kernel=1)
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.adds_input else y


class SameConv(nn.Conv2d):
    """A convolution padded like TensorFlow's 'SAME': the odd pixel goes to the right and the bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2 if stride == 1 else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] > 1:
            top, bottom = same_padding(x.shape[2], self.kernel_size[0], self.stride[0])
            left, right = same_padding(x.shape[3], self.kernel_size[1], self.stride[1])
            x = F.pad(x, (left, right, top, bottom))
        return super().forward(x)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def round_channels(channels: int, width: float, divisor: int = 8) -> int:
    """Scales a channel count, rounded to a multiple of `divisor` but never more than 10 % down."""
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def fold_published_weights(published: Mapping[str, Tensor], variant: str) -> dict[str, Tensor]:
    """Converts the published state dict (`_conv_stem`, `_blocks.0._bn1` …) to this module's names, norms folded in.

    The classifier (`_fc`) is left out. Raises KeyError where a weight is missing.
    """
    folded: dict[str, Tensor] = {}

    def fold(ours: str, conv: str, norm: str) -> None:
        scale = published[f"{norm}.weight"] / torch.sqrt(published[f"{norm}.running_var"] + BATCH_NORM_EPS)
        folded[f"{ours}.weight"] = published[f"{conv}.weight"] * scale[:, None, None, None]
        folded[f"{ours}.bias"] = published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * scale

    fold("stem", "_conv_stem", "_bn0")
    with torch.device("meta"):
        blocks = EfficientNetLite(variant).blocks
    for index, block in enumerate(blocks):
        ours, theirs = f"blocks.{index}", f"_blocks.{index}"
        if isinstance(block, InvertedResidual) and block.expand is not None:
            fold(f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        fold(f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        fold(f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
    fold("head", "_conv_head", "_bn1")
    return folded
