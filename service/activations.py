"""The non-linear functions between two matrices, for every feed-forward of both stages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from service.families.parts import Activation


def activate(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case Activation.SILU:
            return F.silu(x)
        case Activation.GELU:
            return F.gelu(x)
        case Activation.QUICK_GELU:
            return x * torch.sigmoid(1.702 * x)
        case Activation.RELU:
            return F.relu(x)
        case Activation.SQUARED_RELU:
            return F.relu(x).square()
