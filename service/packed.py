"""Linear layers whose weights lie in memory as the processor's matrix kernels read them.

oneDNN's kernels read a weight in blocks that fit their registers. `F.linear`, the reference, has it row by row and
brings it into that form on every call, or does without; here it is done once, after loading.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TYPICAL_ROWS = 32  # for which the blocks are chosen; any number of rows can be computed
MIN_SIZE = 1 << 16  # of a weight; a call takes some 20 µs more than F.linear's, which is more than a small one gains


class PackedLinear(nn.Module):
    """x·Wᵀ + bias on a CPU. Has no parameters: a packed weight means nothing to anybody but its kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def packed_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear | None:
    """None: it would not pay, or this torch or this processor has no kernel for such a weight."""
    has_kernel = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if weight.numel() < MIN_SIZE or weight.device.type != "cpu" or not has_kernel:
        return None
    try:
        packed = PackedLinear(weight, bias)
        packed(weight.new_zeros(1, weight.shape[1]))  # some weights can be packed and then not be computed with
    except RuntimeError:
        return None
    return packed


def pack_linears(module: nn.Module) -> None:
    """Replace every linear layer in a module by a packed one where that can be, and free its weight."""
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            pack_linears(child)
        elif (packed := packed_linear(child.weight, child.bias)) is not None:
            setattr(module, name, packed)
