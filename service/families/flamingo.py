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
    EncoderConfig,
    Family,
    ResamplerConfig,
    Sight,
    Target,
    Unseen,
    VisionConfig,
    as_ids,
    fused_target,
    load_chat_template,
)
from service.families.pixels import resize_square

MODEL_TYPES = ("crossgate_flamingo",)


def load(folder: Path, config: dict[str, Any]) -> Family:
    """Raises KeyError for a config that lacks a key."""
    encoder_keys = dict(config["vision_config"]["encoder"])
    encoder_keys["mean"], encoder_keys["std"] = tuple(encoder_keys["mean"]), tuple(encoder_keys["std"])
    encoder = EncoderConfig(**encoder_keys)
    resampler = ResamplerConfig(**config["vision_config"]["resampler"])
    text = config["text_config"]
    cross = dict(config["cross_attention_config"])
    layers = tuple(cross.pop("layers"))
    return Family(
        name="flamingo",
        folder=folder,
        vision=VisionConfig(encoder, resampler),
        decoder=DecoderConfig(
            vocab_size=text["vocab_size"] + config["additional_vocab_size"],
            num_logits=text["vocab_size"],
            width=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_width=text["hidden_size"] // text["num_attention_heads"],
            ffn_width=text["intermediate_size"],
            eps=text["rms_norm_eps"],
            rope_theta=text["rope_theta"],
            max_positions=text["max_position_embeddings"],
            tied_head=text["tie_word_embeddings"],
            cross_attention=CrossAttentionConfig(
                layers=layers,
                vision_width=resampler.width,
                num_latents=resampler.num_latents,
                unseen=Unseen.SKIP_BLOCK,
                **cross,
            ),
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
