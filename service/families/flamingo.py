"""Our own family: an image encoder, a Perceiver Resampler, and a frozen Llama with tanh-gated blocks.

Source: Flamingo (arXiv 2204.14198). A token sees the latest picture at or before it; a token that sees none skips the
whole gated block, so that text alone behaves as the frozen language model, token for token.

config.json: {"model_type": "crossgate_flamingo", "image_token_id", "bos_token_id", "eos_token_id",
"vision_config": {"encoder": {...}, "resampler": {...}}, "text_config": {...Llama's keys...},
"cross_attention_config": {"layers", "num_heads", "num_kv_heads", "head_width", "ffn_width", "qk_norm", "vector_gate"}}.
Weights: `vision.encoder.*`, `vision.resampler.*`, `decoder.*` with `transformers`' Llama names below `decoder.`, and
`decoder.cross_layers.{i}.*` for the gated block before layer i.
"""

from __future__ import annotations

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
)
from service.families.parts import Activation, AttentionConfig, FeedForwardConfig, RMSNormConfig, as_rotary
from service.families.pixels import resize_square
from service.families.vision import EfficientNetConfig, EncoderConfig, ResamplerConfig, VisionConfig, VitConfig

MODEL_TYPES = ("crossgate_flamingo",)


def load(folder: Path, config: dict[str, Any]) -> Family:
    """Raises KeyError for a config that lacks a key, ValueError for what is not served."""
    encoder = encoder_config(config["vision_config"]["encoder"])
    resampler = resampler_config(config["vision_config"]["resampler"])
    return Family(
        name="flamingo",
        folder=folder,
        vision=VisionConfig(encoder, resampler),
        decoder=decoder_config(
            config["text_config"], config["additional_vocab_size"], config["cross_attention_config"], resampler
        ),
        preprocess=partial(resize_square, size=encoder.image_size),
        image_token_id=config["image_token_id"],
        image_text=lambda after_image: "<image>",
        see=see,
        bos_token_id=config["bos_token_id"],
        eos_token_ids=as_ids(config["eos_token_id"]),
        chat_template=load_chat_template(folder),
        vision_weight=lambda name: Target(name.removeprefix("vision.")) if name.startswith("vision.") else None,
        decoder_weight=lambda name: (
            fused_target(name.removeprefix("decoder.")) if name.startswith("decoder.") else None
        ),
    )


def see(before: Sight, previous_token: int | None, picture: int | None) -> Sight:
    """The latest picture at or before a token."""
    return before if picture is None else (picture,)


def encoder_config(keys: dict[str, Any]) -> EncoderConfig:
    """`kind` names the type, the other keys are its fields."""
    fields = keys | {"mean": tuple(keys["mean"]), "std": tuple(keys["std"])}
    kind = fields.pop("kind")
    if kind == "efficientnet_lite":
        return EfficientNetConfig(**fields)
    if kind == "vit":
        return VitConfig(**fields | {"activation": Activation(fields.get("activation", "gelu"))})
    raise ValueError(f"an encoder of kind {kind!r} is not served")


def resampler_config(keys: dict[str, Any]) -> ResamplerConfig:
    return ResamplerConfig(**keys | {"activation": Activation(keys.get("activation", "relu"))})


def decoder_config(
    text: dict[str, Any], additional_vocab_size: int, cross: dict[str, Any], resampler: ResamplerConfig
) -> DecoderConfig:
    """A Llama by its own keys, and the gated blocks before some of its layers."""
    norm = RMSNormConfig(text["rms_norm_eps"])
    head_width = text["hidden_size"] // text["num_attention_heads"]
    return DecoderConfig(
        vocab_size=text["vocab_size"] + additional_vocab_size,
        num_logits=text["vocab_size"],
        width=text["hidden_size"],
        num_layers=text["num_hidden_layers"],
        norm=norm,
        attention=AttentionConfig(
            text["num_attention_heads"], text["num_key_value_heads"], head_width, bias=text.get("attention_bias", False)
        ),
        rotary=as_rotary(text, head_width),
        feed_forward=FeedForwardConfig(
            text["intermediate_size"],
            Activation(text.get("hidden_act", "silu")),
            gated=True,
            bias=text.get("mlp_bias", False),
        ),
        max_positions=text["max_position_embeddings"],
        tied_head=text["tie_word_embeddings"],
        cross_attention=CrossAttentionConfig(
            layers=tuple(cross["layers"]),
            vision_width=resampler.width,
            num_latents=resampler.num_latents,
            norm=norm,
            attention=AttentionConfig(
                cross["num_heads"],
                cross["num_kv_heads"],
                cross["head_width"],
                qk_norm=norm if cross["qk_norm"] else None,
            ),
            feed_forward=FeedForwardConfig(cross["ffn_width"], Activation.SILU, gated=True),
            vector_gate=cross["vector_gate"],
            unseen=Unseen.SKIP_BLOCK,
        ),
    )
