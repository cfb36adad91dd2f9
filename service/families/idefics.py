"""IDEFICS (HuggingFaceM4/idefics-9b, -80b): CLIP ViT, Perceiver Resampler or none, Llama-1 with gated blocks.

Source: `transformers` models/idefics. A token sees the latest picture at or before it; after an end-of-document token
nothing until the next picture. Tokens that see none get attention output 0; their gated FFN still runs.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
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
from service.families.parts import Activation, AttentionConfig, FeedForwardConfig, RMSNormConfig, as_rotary
from service.families.pixels import resize_square
from service.families.vision import CLIP_MEAN, CLIP_STD, ResamplerConfig, VisionConfig, VitConfig

MODEL_TYPES = ("idefics",)


def load(folder: Path, config: dict[str, Any]) -> Family:
    """Raises KeyError for a key that is missing and has no published default, ValueError for what is not served."""
    vision = _vision(config, read_json(folder / "preprocessor_config.json"))
    num_latents, vision_width = vision.latents_shape
    eos = as_ids(config.get("eos_token_id", 2))
    eos += tuple(token for token in _generation_eos(folder) if token not in eos)
    interval, num_layers = config["cross_layer_interval"], config["num_hidden_layers"]
    num_heads = config["num_attention_heads"]
    vocab_size = config["vocab_size"] + config.get("additional_vocab_size", 0)
    head_width = config["hidden_size"] // num_heads
    norm = RMSNormConfig(config.get("rms_norm_eps", 1e-6))
    heads = AttentionConfig(num_heads, num_heads, head_width)
    feed_forward = FeedForwardConfig(
        config["intermediate_size"], Activation(config.get("hidden_act", "silu")), gated=True
    )
    end_of_document = as_ids(config.get("eos_token_id", 2))

    def see(before: Sight, previous_token: int | None, picture: int | None) -> Sight:
        if picture is not None:
            return (picture,)
        return () if previous_token in end_of_document else before

    return Family(
        name="idefics",
        folder=folder,
        vision=vision,
        decoder=DecoderConfig(
            vocab_size=vocab_size,
            num_logits=vocab_size,
            width=config["hidden_size"],
            num_layers=num_layers,
            norm=norm,
            attention=heads,
            rotary=as_rotary(config, head_width),
            feed_forward=feed_forward,
            max_positions=config.get("max_position_embeddings", config.get("max_sequence_length", 2048)),
            tied_head=config.get("tie_word_embeddings", False),
            cross_attention=CrossAttentionConfig(
                layers=tuple(range(0, num_layers // interval * interval, interval)),
                vision_width=vision_width,
                num_latents=num_latents,
                norm=norm,
                attention=replace(heads, qk_norm=norm if config.get("qk_layer_norms", False) else None),
                feed_forward=feed_forward,
                vector_gate=config.get("alpha_type", "float") == "vector",
                unseen=Unseen.ZERO_ATTENTION,
            ),
        ),
        preprocess=partial(resize_square, size=vision.encoder.image_size),
        image_token_id=_token_id(folder, "<image>", vocab_size),
        image_text=lambda after_image: ("" if after_image else FAKE) + "<image>" + FAKE,
        see=see,
        bos_token_id=config.get("bos_token_id", 1),
        eos_token_ids=eos,
        chat_template=load_chat_template(folder),
        vision_weight=_vision_weight,
        decoder_weight=lambda name: _decoder_weight(name, interval),
    )


FAKE = "<fake_token_around_image>"


def _vision(config: dict[str, Any], preprocessor: dict[str, Any]) -> VisionConfig:
    vision = config["vision_config"]
    image_size, patch_size = vision.get("image_size", 224), vision.get("patch_size", 14)
    width = vision.get("embed_dim", 768)
    encoder = VitConfig(
        image_size=image_size,
        width=width,
        num_positions=(image_size // patch_size) ** 2 + 1,
        mean=tuple(preprocessor.get("image_mean", CLIP_MEAN)),
        std=tuple(preprocessor.get("image_std", CLIP_STD)),
        patch_size=patch_size,
        num_layers=vision.get("num_hidden_layers", 32),
        num_heads=vision.get("num_attention_heads", 16),
        ffn_width=vision.get("intermediate_size", 5120),
        activation=Activation(vision.get("hidden_act", "gelu")),
        eps=vision.get("layer_norm_eps", 1e-5),
    )
    if not config.get("use_resampler", False):
        return VisionConfig(encoder, None)
    perceiver = config["perceiver_config"]
    resampler = ResamplerConfig(
        input_width=width,
        width=width,
        depth=perceiver.get("resampler_depth", 6),
        num_heads=perceiver.get("resampler_n_heads", 16),
        head_width=perceiver.get("resampler_head_dim", 96),
        num_latents=perceiver.get("resampler_n_latents", 64),
        ffn_width=4 * width,
        activation=Activation.RELU,
        qk_norm=perceiver.get("qk_layer_norms_perceiver", False),
    )
    return VisionConfig(encoder, resampler)


def _generation_eos(folder: Path) -> tuple[int, ...]:
    return as_ids(read_json(folder / "generation_config.json").get("eos_token_id"))


def _token_id(folder: Path, token: str, vocab_size: int) -> int:
    for added in read_json(folder / "tokenizer.json").get("added_tokens", ()):
        if added["content"] == token:
            return int(added["id"])
    return vocab_size - 1  # the published checkpoints' last additional token


_VISION = {
    "model.vision_model.embeddings.": "encoder.embeddings.",
    "model.vision_model.pre_layrnorm.": "encoder.pre_layernorm.",
    "model.vision_model.encoder.": "encoder.",
    "model.perceiver_resampler.layer_norm.": "resampler.norm.",
    "model.perceiver_resampler.": "resampler.",
}
_RESAMPLER_BLOCK = {
    "0.context_layer_norm": "attn.features_norm",
    "0.latents_layer_norm": "attn.latents_norm",
    "0.q_layer_norm": "attn.q_norm",
    "0.k_layer_norm": "attn.k_norm",
    "0.q_proj": "attn.q_proj",
    "0.k_proj": "attn.kv_proj",
    "0.v_proj": "attn.kv_proj",
    "0.output_proj": "attn.o_proj",
    "1.ln": "ffn.norm",
    "1.fc": "ffn.up_proj",
    "1.c_proj": "ffn.down_proj",
}


def _vision_weight(name: str) -> Target | None:
    if "post_layernorm" in name or "position_ids" in name:
        return None  # of CLIP's pooled output, which IDEFICS does not use
    prefix = next((prefix for prefix in _VISION if name.startswith(prefix)), None)
    if prefix is None:
        return None
    name = _VISION[prefix] + name.removeprefix(prefix)
    block = re.fullmatch(r"(resampler\.blocks\.\d+\.)(.+)\.(weight|bias)", name)
    if block:
        return Target(f"{block[1]}{_RESAMPLER_BLOCK[block[2]]}.{block[3]}", int(".v_proj" in name))
    projection = re.fullmatch(r"(encoder\..+\.)([qkv])_proj\.(weight|bias)", name)
    if projection:
        return Target(f"{projection[1]}qkv_proj.{projection[3]}", "qkv".index(projection[2]))
    return Target(name)


def _decoder_weight(name: str, interval: int) -> Target | None:
    if name.startswith("model.vision_model.") or name.startswith("model.perceiver_resampler."):
        return None
    if name.endswith("rotary_emb.inv_freq"):
        return None
    if name in _ADDITIONAL:
        return _ADDITIONAL[name]
    name = name.removeprefix("model.")
    gated = re.match(r"gated_cross_attn_layers\.(\d+)\.(.*)", name)
    if gated:
        name = f"cross_layers.{int(gated[1]) * interval}.{gated[2]}"
    for published, ours in _GATED:
        name = name.replace(published, ours)
    return fused_target(name)


_ADDITIONAL = {
    "model.embed_tokens.additional_embedding.weight": Target("embed_tokens.weight", 1),
    "lm_head.additional_fc.weight": Target("lm_head.weight", 1),
}
_GATED = (
    ("cross_attn.q_layer_norm.", "q_norm."),
    ("cross_attn.k_layer_norm.", "k_norm."),
    ("alpha_cross_attn", "attn_gate"),
    ("alpha_dense", "ffn_gate"),
)
