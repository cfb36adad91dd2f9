"""Rotary positions against `transformers`: frequencies of whole heads, of part of them, and with Llama 3's scaling."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from service.decoder.rotary import RotaryPositions, frequencies, rotate
from service.families.parts import Llama3Scaling, Rotary, as_rotary

LLAMA_3_1 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
LLAMA_3_2 = Llama3Scaling(32.0, 1.0, 4.0, 8192)


def published(scaling: Llama3Scaling) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


@pytest.mark.parametrize("scaling", [LLAMA_3_1, LLAMA_3_2])
@pytest.mark.parametrize("head_width", [64, 128])
def test_llama3_frequencies_equal_transformers(scaling: Llama3Scaling, head_width: int) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_width,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **published(scaling)},
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    rotary = as_rotary(config.to_dict(), head_width)
    assert rotary == Rotary(500000.0, head_width, scaling)
    ours = frequencies(rotary, torch.device("cpu"))
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6)
    plain = frequencies(Rotary(500000.0, head_width), torch.device("cpu"))
    assert 0 < int((ours == plain).sum()) < head_width // 2, "some pairs are scaled, some are not"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_equal_llamas_far_into_a_context(dtype: torch.dtype) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters={"rope_theta": 1e4})
    positions = torch.tensor([0, 1, 2, 77, 2047, 8191])
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions[None])
    ours = RotaryPositions(Rotary(1e4, 64)).angles(positions, dtype)
    for our_part, their_part in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_part[:, 0], their_part[0], atol=0, rtol=0)


@pytest.mark.parametrize("width", [4, 8, 16])
def test_heads_are_rotated_as_gpt_neox_rotates_them(width: int) -> None:
    torch.manual_seed(0)
    positions = torch.tensor([0, 5, 31])
    x = torch.randn(3, 2, 16)
    rotary = RotaryPositions(Rotary(1e4, width))
    cos, sin = rotary.angles(positions, torch.float32)
    rotated = rotate(x, rotary.rotations(positions, torch.float32))
    expected, _ = apply_rotary_pos_emb(x, x, cos[:, 0], sin[:, 0])
    torch.testing.assert_close(rotated, expected)
    assert torch.equal(rotated[..., width:], x[..., width:])


def test_frequencies_do_not_lose_precision_with_the_model() -> None:
    positions = torch.tensor([30000])
    cos, _ = RotaryPositions(Rotary(1e4, 64)).angles(positions, torch.bfloat16)
    exact = torch.cos(30000 * 1e4 ** -(torch.arange(0, 64, 2).double() / 64))
    torch.testing.assert_close(cos[0, 0, :32].double(), exact, atol=8e-3, rtol=0)


def test_older_and_newer_spellings_of_a_config_say_the_same() -> None:
    older = {"rope_theta": 5e5, "rope_scaling": published(LLAMA_3_1)}
    newer = {"rope_parameters": {"rope_theta": 5e5, **published(LLAMA_3_1)}}
    assert as_rotary(older, 64) == as_rotary(newer, 64) == Rotary(5e5, 64, LLAMA_3_1)
    assert as_rotary({"rope_theta": 1e6}, 64) == Rotary(1e6, 64)
    oldest = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    with pytest.raises(ValueError, match="'linear' are not served"):
        as_rotary(oldest, 64)


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_llama3_scaling_that_lacks_a_key_or_has_a_wrong_one_is_refused_by_its_name(spelling: str, key: str) -> None:
    complete = published(LLAMA_3_1)
    with pytest.raises(ValueError, match=f"'llama3' need {key}$"):
        as_rotary({spelling: {name: value for name, value in complete.items() if name != key}}, 64)
    for wrong in (None, "8", [8], True, 0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^{key} is {re.escape(repr(wrong))}, not a positive number"):
            as_rotary({spelling: complete | {key: wrong}}, 64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', not an object"),
        ({"rope_parameters": []}, r"rope_scaling is \[\], not an object"),
        ({"rope_scaling": {"factor": 8.0}}, "type None are not served"),
        (
            {"rope_scaling": published(LLAMA_3_1) | {"low_freq_factor": 4.0}},
            "low_freq_factor is 4.0, which is not below",
        ),
        (
            {"rope_scaling": published(LLAMA_3_1) | {"original_max_position_embeddings": 8192.5}},
            "original_max_position_embeddings is 8192.5, not a whole number",
        ),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4', not a positive number"),
        ({"rope_theta": 0}, "rope_theta is 0, not a positive number"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor is None, not a positive number"),
        ({"partial_rotary_factor": 0.05}, "rotate 3 numbers of a head's 64"),
        ({"partial_rotary_factor": 0.01}, "rotate 0 numbers of a head's 64"),
        ({"partial_rotary_factor": 1.5}, "rotate 96 numbers of a head's 64"),
    ],
)
def test_rotary_positions_that_make_no_sense_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_rotary(config, 64)


def test_heads_of_an_odd_width_are_refused() -> None:
    with pytest.raises(ValueError, match="rotate 15 numbers of a head's 15"):
        as_rotary({}, 15)
