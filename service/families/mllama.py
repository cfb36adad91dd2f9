"""Llama 3.2 Vision (11B, 90B): a vision transformer over tiles, one linear layer, Llama 3 with cross-attention layers.

A cross-attention layer, which stands in place of a decoder layer, is a gated block before the self-attention layer that
follows it. A token sees the latest run of consecutive pictures at or before it, all their tiles; tokens before the
first picture get nothing from the blocks, and without pictures the model is the Llama that it was made of.

Source: Meta's llama-models, models/llama3/reference_impl/multimodal; `transformers` models/mllama for names, configs
and preprocessing. `transformers` lets tokens that see no picture attend evenly to all tiles; here they get nothing, as
Meta's do. In a prompt of text that begins with a picture, `transformers`' processor puts the begin-of-text token behind
the picture; here it comes first, as it does with Meta's and in chats.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from service.families.family import (
    CrossAttentionConfig,
    DecoderConfig,
    Family,
    Sight,
    Target,
    Unseen,
    as_ids,
    fused_target,
    load_chat_template,
    read_json,
)
from service.families.parts import (
    Activation,
    AttentionConfig,
    FeedForwardConfig,
    RMSNormConfig,
    as_rotary,
    whole,
    whole_ones,
)
from service.families.pixels import fit_tiles, grids_of
from service.families.vision import CLIP_MEAN, CLIP_STD, ProjectorConfig, TiledVitConfig, VisionConfig

MODEL_TYPES = ("mllama",)
NUM_EXTRA_EMBEDDINGS = 8  # rows past the vocabulary, of which the image token's is the first; they have no logits


def load(folder: Path, config: dict[str, Any]) -> Family:
    """Raises KeyError for a section that is missing, ValueError for what is not served."""
    text, vision = (_section(config, name) for name in ("text_config", "vision_config"))
    encoder = _encoder(vision, read_json(folder / "preprocessor_config.json"))
    cross_layers = _cross_layers(text)
    decoder = _decoder(text, encoder.num_positions, cross_layers)
    image_token_id = whole("image_token_index", config.get("image_token_index", 128256), 0)
    if image_token_id >= decoder.vocab_size:
        raise ValueError(f"image_token_index is {image_token_id}, and there are {decoder.vocab_size} embeddings")
    generation = read_json(folder / "generation_config.json")

    def see(before: Sight, previous_token: int | None, picture: int | None) -> Sight:
        if picture is None:
            return before
        return (*before, picture) if previous_token == image_token_id else (picture,)

    return Family(
        name="mllama",
        folder=folder,
        vision=VisionConfig(encoder, projector=ProjectorConfig(encoder.features_width, decoder.width)),
        decoder=decoder,
        preprocess=partial(fit_tiles, tile_size=encoder.image_size, grids=encoder.grids),
        image_token_id=image_token_id,
        image_text=lambda after_image: "<|image|>",
        see=see,
        bos_token_id=text.get("bos_token_id", 128000),
        eos_token_ids=as_ids(generation.get("eos_token_id", text.get("eos_token_id", 128001))),
        chat_template=load_chat_template(folder),
        vision_weight=_vision_weight,
        decoder_weight=lambda name: _decoder_weight(name, cross_layers),
    )


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Without its nulls, which stand for defaults."""
    section = config[name]
    if not isinstance(section, dict):
        raise ValueError(f"{name} is {section!r}, not an object")
    return {key: value for key, value in section.items() if value is not None}


def _encoder(vision: dict[str, Any], preprocessor: dict[str, Any]) -> TiledVitConfig:
    def number(name: str, default: int) -> int:
        return whole(name, vision.get(name, default))

    image_size, patch_size, max_tiles = number("image_size", 448), number("patch_size", 14), number("max_num_tiles", 4)
    num_layers, width, num_heads = (
        number("num_hidden_layers", 32),
        number("hidden_size", 1280),
        number("attention_heads", 16),
    )
    intermediate = whole_ones(
        "intermediate_layers_indices", vision.get("intermediate_layers_indices", (3, 7, 15, 23, 30))
    )
    grids = grids_of(max_tiles)
    if patch_size > image_size or width % num_heads:
        raise ValueError(
            f"patches of {patch_size} in {image_size} pixels, {num_heads} heads in {width}: that cannot be"
        )
    if intermediate and intermediate[-1] >= num_layers:
        raise ValueError(f"intermediate_layers_indices are {list(intermediate)} of {num_layers} layers")
    if [list(grid) for grid in grids] != vision.get("supported_aspect_ratios", [list(grid) for grid in grids]):
        raise ValueError(f"supported_aspect_ratios are not those of {max_tiles} tiles, which alone are served")
    mean, std = _check_preprocessor(preprocessor, image_size, max_tiles)
    return TiledVitConfig(
        image_size=image_size,
        width=width,
        num_positions=(image_size // patch_size) ** 2 + 1,
        mean=mean,
        std=std,
        patch_size=patch_size,
        num_layers=num_layers,
        num_global_layers=whole("num_global_layers", vision.get("num_global_layers", 8), 0),
        num_heads=num_heads,
        ffn_width=number("intermediate_size", 5120),
        activation=Activation(vision.get("hidden_act", "gelu")),
        eps=vision.get("norm_eps", 1e-5),
        intermediate_layers=intermediate,
        grids=grids,
        max_tiles=max_tiles,
    )


Colour = tuple[float, float, float]


def _check_preprocessor(preprocessor: dict[str, Any], image_size: int, max_tiles: int) -> tuple[Colour, Colour]:
    """Mean and deviation of a pixel's colours. Raises ValueError for pictures that are made in another way."""
    side = {"height": image_size, "width": image_size}
    made = {"size": side, "max_image_tiles": max_tiles, "resample": 2, "do_pad": True, "do_normalize": True}
    for name, value in {**made, "do_resize": True, "do_rescale": True}.items():
        if preprocessor.get(name, value) != value:
            raise ValueError(
                f"{name} of preprocessor_config.json is {preprocessor[name]!r}, and only {value!r} is served"
            )
    colours = (preprocessor.get("image_mean", CLIP_MEAN), preprocessor.get("image_std", CLIP_STD))
    for values in colours:
        numbers = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
        if not numbers or len(values) != 3:
            raise ValueError(f"image_mean or image_std of preprocessor_config.json is {values!r}, not three numbers")
    if 0 in colours[1]:
        raise ValueError("image_std of preprocessor_config.json has a 0")
    mean, std = (tuple(map(float, values)) for values in colours)
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _decoder(text: dict[str, Any], num_latents: int, cross_layers: tuple[int, ...]) -> DecoderConfig:
    def number(name: str, default: int) -> int:
        return whole(name, text.get(name, default))

    width, num_heads, num_kv_heads = (
        number("hidden_size", 4096),
        number("num_attention_heads", 32),
        number("num_key_value_heads", 8),
    )
    if width % num_heads or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads and {num_kv_heads} of K and V in a width of {width}: that cannot be")
    vocab_size = number("vocab_size", 128256)
    norm = RMSNormConfig(text.get("rms_norm_eps", 1e-5))
    heads = AttentionConfig(num_heads, num_kv_heads, width // num_heads)
    feed_forward = FeedForwardConfig(
        number("intermediate_size", 14336), Activation(text.get("hidden_act", "silu")), gated=True
    )
    return DecoderConfig(
        vocab_size=vocab_size + NUM_EXTRA_EMBEDDINGS,
        num_logits=vocab_size,
        width=width,
        num_layers=number("num_hidden_layers", 40) - len(cross_layers),
        norm=norm,
        attention=heads,
        rotary=as_rotary({"rope_theta": 500000.0, **text}, heads.head_width),
        feed_forward=feed_forward,
        max_positions=number("max_position_embeddings", 131072),
        tied_head=text.get("tie_word_embeddings", False),
        cross_attention=CrossAttentionConfig(
            layers=tuple(_place(layer, cross_layers) for layer in cross_layers),
            vision_width=width,
            num_latents=num_latents,
            norm=norm,
            attention=replace(heads, qk_norm=norm),
            feed_forward=feed_forward,
            vector_gate=False,
            unseen=Unseen.SKIP_BLOCK,
        ),
    )


def _cross_layers(text: dict[str, Any]) -> tuple[int, ...]:
    """Of all layers, those that attend to pictures. Raises ValueError where one has no other layer to stand before."""
    layers = whole_ones("cross_attention_layers", text.get("cross_attention_layers", (3, 8, 13, 18, 23, 28, 33, 38)))
    num_layers = whole("num_hidden_layers", text.get("num_hidden_layers", 40))
    if not layers or any(after - before < 2 for before, after in pairwise((*layers, num_layers))):
        raise ValueError(
            f"cross_attention_layers are {list(layers)} of {num_layers}: each needs another layer behind it"
        )
    return layers


def _place(layer: int, cross_layers: tuple[int, ...]) -> int:
    """Of a layer among those of self-attention: its own, or of a cross-attention layer that of the next behind it."""
    return layer - sum(other < layer for other in cross_layers)


_VISION = (
    ("multi_modal_projector.", "projector."),
    ("vision_model.global_transformer.layers.", "encoder.global_layers."),
    ("vision_model.transformer.layers.", "encoder.layers."),
    ("vision_model.gated_positional_embedding.tile_embedding.", "encoder.tile_position_embedding."),
    ("vision_model.gated_positional_embedding.embedding", "encoder.position_embedding"),
    ("vision_model.gated_positional_embedding.gate", "encoder.position_gate"),
    ("vision_model.pre_tile_positional_embedding.embedding.", "encoder.pre_tile_embedding."),
    ("vision_model.pre_tile_positional_embedding.gate", "encoder.pre_tile_gate"),
    ("vision_model.post_tile_positional_embedding.embedding.", "encoder.post_tile_embedding."),
    ("vision_model.post_tile_positional_embedding.gate", "encoder.post_tile_gate"),
    ("vision_model.layernorm_pre.", "encoder.pre_layernorm."),
    ("vision_model.layernorm_post.", "encoder.post_layernorm."),
    ("vision_model.", "encoder."),
)
_VISION_LAYER = {
    "self_attn.q_proj.": ("self_attn.qkv_proj.", 0),
    "self_attn.k_proj.": ("self_attn.qkv_proj.", 1),
    "self_attn.v_proj.": ("self_attn.qkv_proj.", 2),
    "self_attn.o_proj.": ("self_attn.out_proj.", 0),
    "input_layernorm.": ("layer_norm1.", 0),
    "post_attention_layernorm.": ("layer_norm2.", 0),
    "gate_attn": ("attn_gate", 0),
    "gate_ffn": ("ffn_gate", 0),
}


def _vision_weight(name: str) -> Target | None:
    prefix = next((prefix for prefix in _VISION if name.startswith(prefix[0])), None)
    if prefix is None:
        return None
    name = prefix[1] + name.removeprefix(prefix[0])
    if re.match(r"encoder\.(global_)?layers\.", name):
        for published, (ours, part) in _VISION_LAYER.items():
            if f".{published}" in name:
                return Target(name.replace(published, ours), part)
    return Target(name)


def _decoder_weight(name: str, cross_layers: tuple[int, ...]) -> Target | None:
    if not name.startswith("language_model."):
        return None
    name = name.removeprefix("language_model.").removeprefix("model.")
    layer = re.match(r"layers\.(\d+)\.(.*)", name)
    if layer is None:
        return Target(name)
    index = int(layer[1])
    kind = "cross_layers" if index in cross_layers else "layers"
    name = f"{kind}.{_place(index, cross_layers)}.{layer[2]}"
    for published, ours in _GATED:
        name = name.replace(published, ours)
    return fused_target(name)


_GATED = (
    ("cross_attn.q_norm.", "q_norm."),
    ("cross_attn.k_norm.", "k_norm."),
    ("cross_attn_attn_gate", "attn_gate"),
    ("cross_attn_mlp_gate", "ffn_gate"),
)
