"""Packed linear layers against float64's x·Wᵀ + bias."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from service.packed import PackedLinear, pack_linears, packed_linear


@pytest.mark.parametrize("shape", [(1,), (8,), (32,), (131,), (2, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_packed_layer_computes_what_the_formula_says(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 131, bias=bias).to(dtype)
    packed = packed_linear(layer.weight, layer.bias)
    assert packed is not None
    x = torch.randn(*shape, 512).to(dtype)
    expected = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_every_linear_layer_is_packed_and_its_weight_freed() -> None:
    inner = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256))
    module = nn.Sequential(nn.Linear(256, 256), nn.ModuleDict({"inner": inner}))
    weights = [weakref.ref(child.weight) for child in module.modules() if isinstance(child, nn.Linear)]
    pack_linears(module)
    assert sum(isinstance(child, PackedLinear) for child in module.modules()) == 2
    assert [weight() for weight in weights] == [None, None]


def test_a_layer_without_a_kernel_or_too_small_stays_as_it_is() -> None:
    layers = nn.Sequential(
        nn.Linear(256, 256, dtype=torch.float64), nn.Linear(256, 256, device="meta"), nn.Linear(8, 8)
    )
    before = list(layers)
    pack_linears(layers)
    assert list(layers) == before
