"""The decoder's parts, and decoders put together from them, against `transformers`' modules on random weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    MllamaTextConfig,
    MptConfig,
    Qwen3Config,
    Qwen3Model,
)
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer
from transformers.models.mpt.modeling_mpt import MptBlock

from service.activations import activate
from service.decoder.layers import make_feed_forward, make_norm
from service.decoder.model import Decoder, GatedCrossAttentionBlock
from service.families.family import CrossAttentionConfig, DecoderConfig, Unseen, fused_target
from service.families.parts import (
    Activation,
    AttentionConfig,
    FeedForwardConfig,
    LayerNormConfig,
    NormConfig,
    RMSNormConfig,
    as_rotary,
)
from tests.checkpoints import randomize

WIDTH, LAYERS, LENGTH, VOCABULARY = 32, 3, 40, 50
IDS = torch.arange(LENGTH) * 7 % VOCABULARY
TRANSFORMERS_NAMES = {Activation.SQUARED_RELU: "relu2"}


class PlainAttention:
    """One prompt without a cache, or tokens that see one picture's K and V [R, K, C], all or those that `sees` says."""

    def __init__(self, image_kv: tuple[Tensor, Tensor] | None = None, sees: Tensor | None = None) -> None:
        self.image_kv = image_kv
        self.any_sees = image_kv is not None
        self.sees = torch.full((LENGTH, 1), self.any_sees) if sees is None else sees

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v, causal=True)

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        assert self.image_kv is not None
        return self.attend(q, *self.image_kv, causal=False) * self.sees

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


def cross(
    norm: NormConfig, heads: AttentionConfig, feed_forward: FeedForwardConfig, layers: tuple[int, ...] = ()
) -> CrossAttentionConfig:
    return CrossAttentionConfig(layers, 24, 5, norm, heads, feed_forward, False, Unseen.SKIP_BLOCK)


def decoder_config(
    published: dict[str, Any],
    norm: NormConfig,
    heads: AttentionConfig,
    feed_forward: FeedForwardConfig,
    parallel_residual: bool = False,
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=VOCABULARY,
        num_logits=VOCABULARY,
        width=WIDTH,
        num_layers=LAYERS,
        norm=norm,
        attention=heads,
        rotary=as_rotary(published, heads.head_width),
        feed_forward=feed_forward,
        max_positions=128,
        tied_head=True,
        cross_attention=cross(norm, heads, feed_forward),
        parallel_residual=parallel_residual,
    )


def assert_equal_hidden_states(config: DecoderConfig, state: dict[str, Tensor], reference: nn.Module) -> None:
    decoder = Decoder(config).eval()
    decoder.load_state_dict(state)
    with torch.inference_mode():
        ours = decoder(IDS, torch.arange(LENGTH), PlainAttention())
        theirs = reference(input_ids=IDS[None], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def fused(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Llama's weight names -> ours, as a family maps them."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, weight in published.items():
        target = fused_target(name)
        ours = target.name.replace("self_attn.q_norm", "qk_norm.q_norm").replace("self_attn.k_norm", "qk_norm.k_norm")
        parts.setdefault(ours, {})[target.part] = weight
    return {name: torch.cat([pieces[part] for part in sorted(pieces)]) for name, pieces in parts.items()}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1000.0}, LLAMA3])
def test_llama_with_biases_and_llama3_scaling_equals_transformers(bias: bool, rope: dict[str, Any]) -> None:
    published = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
        mlp_bias=bias,
        rope_parameters=rope,
        max_position_embeddings=128,
    )
    reference = LlamaModel(published).eval()
    randomize(reference, 1)
    config = decoder_config(
        published.to_dict(),
        RMSNormConfig(published.rms_norm_eps),
        AttentionConfig(4, 2, 8, bias=bias),
        FeedForwardConfig(48, Activation.SILU, gated=True, bias=bias),
    )
    assert_equal_hidden_states(config, fused(reference.state_dict()), reference)


def test_norms_of_queries_and_keys_equal_qwen3() -> None:
    published = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-2,
    )
    reference = Qwen3Model(published).eval()
    randomize(reference, 2)
    norm = RMSNormConfig(1e-2)
    heads = AttentionConfig(4, 2, 16, qk_norm=norm)
    config = decoder_config(published.to_dict(), norm, heads, FeedForwardConfig(48, Activation.SILU, gated=True))
    assert_equal_hidden_states(config, fused(reference.state_dict()), reference)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_partial_rotary_and_parallel_residual_equal_gpt_neox(parallel: bool, bias: bool) -> None:
    published = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=parallel,
        attention_bias=bias,
        layer_norm_eps=1e-2,
    )
    reference = GPTNeoXModel(published).eval()
    randomize(reference, 3)
    heads = AttentionConfig(2, 2, 16, bias=bias)
    feed_forward = FeedForwardConfig(64, Activation.GELU, gated=False, bias=True)
    norm = LayerNormConfig(1e-2, bias=True)
    config = decoder_config(published.to_dict(), norm, heads, feed_forward, parallel)
    assert config.rotary.width == 4
    names = {
        "embed_in.": "embed_tokens.",
        "final_layer_norm.": "norm.",
        "attention.query_key_value.": "qkv_proj.",
        "attention.dense.": "o_proj.",
        "mlp.dense_h_to_4h.": "mlp.up_proj.",
        "mlp.dense_4h_to_h.": "mlp.down_proj.",
    }
    state: dict[str, Tensor] = {}
    for name, weight in reference.state_dict().items():
        ours = name
        for theirs, replacement in names.items():
            ours = ours.replace(theirs, replacement)
        if "qkv_proj" in ours:  # a head's q, k and v lie side by side
            weight = weight.unflatten(0, (2, 3, 16)).transpose(0, 1).flatten(0, 2)
        state[ours] = weight
    assert_equal_hidden_states(config, state, reference)


def test_gated_block_with_norms_of_queries_and_keys_equals_mllama() -> None:
    published = MllamaTextConfig(
        hidden_size=WIDTH, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-2
    )
    published._attn_implementation = "sdpa"
    reference = MllamaCrossAttentionDecoderLayer(published, 0).eval()
    randomize(reference, 4)
    for gate in (reference.cross_attn_attn_gate, reference.cross_attn_mlp_gate):
        nn.init.constant_(gate, 0.7)
    norm = RMSNormConfig(1e-2)
    heads, feed_forward = AttentionConfig(4, 2, 8, qk_norm=norm), FeedForwardConfig(48, Activation.SILU, gated=True)
    block = GatedCrossAttentionBlock(
        WIDTH, CrossAttentionConfig((0,), WIDTH, 5, norm, heads, feed_forward, False, Unseen.ZERO_ATTENTION), 0
    )
    renamed = {
        f"layers.0.{name}".replace("cross_attn_attn_gate", "attn_gate").replace("cross_attn_mlp_gate", "ffn_gate"): w
        for name, w in reference.state_dict().items()
    }
    state = {name.removeprefix("layers.0.").removeprefix("cross_attn."): w for name, w in fused(renamed).items()}
    block.load_state_dict(state)
    x, latents = torch.randn(LENGTH, WIDTH), torch.randn(5, WIDTH)
    with torch.inference_mode():
        ours = block(x, PlainAttention(block.project_image(latents)))
        nothing_masked = torch.zeros(1, 1, LENGTH, 5)
        theirs = reference(x[None], latents[None], nothing_masked, None, None)
    torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-5)


def test_gated_block_with_layer_norms_biases_and_gelu_follows_the_formula() -> None:
    """OpenFlamingo's block written out in float64, with biases: src/helpers.py, GatedCrossAttentionBlock."""
    torch.manual_seed(5)
    heads = AttentionConfig(2, 2, 8, bias=True, qk_norm=LayerNormConfig(1e-3, bias=False))
    feed_forward = FeedForwardConfig(20, Activation.GELU, gated=False, bias=True)
    block = GatedCrossAttentionBlock(WIDTH, cross(LayerNormConfig(1e-5, bias=True), heads, feed_forward), 0).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    p = dict(block.named_parameters())
    x, latents = torch.randn(LENGTH, WIDTH).double(), torch.randn(5, 24).double()

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * p[f"{name}.weight"]
        return scaled + p[f"{name}.bias"] if f"{name}.bias" in p else scaled

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    q = linear(norm(x, "input_layernorm", 1e-5), "q_proj").view(LENGTH, 2, 8)
    k, v = linear(latents, "kv_proj").view(5, 2, 2, 8).unbind(1)
    q, k = norm(q, "q_norm", 1e-3), norm(k, "k_norm", 1e-3)
    weights = torch.einsum("nhc,rhc->hnr", q, k).div(math.sqrt(8)).softmax(-1)
    attended = torch.einsum("hnr,rhc->nhc", weights, v).flatten(1)
    expected = x + p["attn_gate"].tanh() * linear(attended, "o_proj")
    hidden = linear(norm(expected, "post_attention_layernorm", 1e-5), "mlp.up_proj")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    expected = expected + p["ffn_gate"].tanh() * linear(hidden, "mlp.down_proj")
    ours = block(x, PlainAttention(block.project_image(latents)))
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("unseen", Unseen)
def test_a_token_that_sees_no_picture_gets_of_a_gated_block_what_its_family_says(unseen: Unseen) -> None:
    """Beside tokens that see one: nothing at all, or the feed-forward alone (both written out in float64)."""
    torch.manual_seed(6)
    norm, heads = RMSNormConfig(1e-2), AttentionConfig(4, 2, 8)
    config = cross(norm, heads, FeedForwardConfig(20, Activation.RELU, gated=False))
    block = GatedCrossAttentionBlock(WIDTH, replace(config, unseen=unseen), 0).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    p = dict(block.named_parameters())
    x, sees = torch.randn(LENGTH, WIDTH).double(), (torch.arange(LENGTH) % 3 == 1)[:, None]
    image_kv = block.project_image(torch.randn(5, 24).double())
    expected = x
    if unseen is Unseen.ZERO_ATTENTION:
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * p["post_attention_layernorm.weight"]
        hidden = (normed @ p["mlp.up_proj.weight"].T).relu()
        expected = x + p["ffn_gate"].tanh() * (hidden @ p["mlp.down_proj.weight"].T)
    ours, all_see = block(x, PlainAttention(image_kv, sees)), block(x, PlainAttention(image_kv))
    rows = ~sees[:, 0]
    torch.testing.assert_close(ours[rows], expected[rows], atol=1e-10, rtol=1e-10)
    assert unseen is Unseen.ZERO_ATTENTION or torch.equal(ours[rows], x[rows])
    torch.testing.assert_close(ours[~rows], all_see[~rows])
    assert (all_see - expected).abs().amax(-1).min() > 1e-3, "what it would get of a picture is not little"


def test_norms_without_bias_and_feed_forward_without_bias_equal_mpt() -> None:
    reference = MptBlock(MptConfig(d_model=WIDTH, n_heads=4, layer_norm_epsilon=1e-2)).eval()
    randomize(reference, 6)
    norm = make_norm(LayerNormConfig(1e-2, bias=False), WIDTH)
    feed_forward = make_feed_forward(FeedForwardConfig(4 * WIDTH, Activation.GELU, gated=False), WIDTH)
    norm.load_state_dict(reference.norm_2.state_dict())
    feed_forward.load_state_dict(reference.ffn.state_dict())
    x = torch.randn(LENGTH, WIDTH)
    expected = reference.ffn(reference.norm_2(x), torch.zeros(()))
    torch.testing.assert_close(feed_forward(norm(x)), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_equals_llamas(dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    reference = LlamaRMSNorm(WIDTH, eps=1e-2)
    nn.init.normal_(reference.weight, 1.0, 0.3)
    norm = make_norm(RMSNormConfig(1e-2), WIDTH)
    norm.load_state_dict(reference.state_dict())
    x = (torch.randn(LENGTH, WIDTH) * 3).to(dtype)
    torch.testing.assert_close(norm.to(dtype)(x), reference.to(dtype)(x))


@pytest.mark.parametrize("activation", Activation)
def test_activations_equal_transformers(activation: Activation) -> None:
    x = torch.linspace(-6, 6, 101)
    expected = ACT2FN[TRANSFORMERS_NAMES.get(activation, activation.value)](x)
    torch.testing.assert_close(activate(x, activation), expected)
