"""What the demo model is made of: sizes of the trained connector and the config its checkpoint is published with."""

from typing import Any

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 49152  # the row after SmolLM2's own; a copy of the row of IMAGE_WORD, never generated
IMAGE_WORD = "Ġimage"  # " image" in the vocabulary's spelling
CROSS_LAYERS = (15, 18, 21, 24, 27)

ENCODER = {
    "kind": "efficientnet_lite",
    "variant": "efficientnet-lite0",
    "image_size": 224,
    "width": 1280,
    "num_positions": 49,
    "mean": [127 / 255] * 3,
    "std": [128 / 255] * 3,
}
RESAMPLER = {
    "input_width": 1280,
    "width": 512,
    "depth": 2,
    "num_heads": 8,
    "head_width": 64,
    "num_latents": 24,
    "ffn_width": 2048,
    "activation": "gelu",
    "qk_norm": False,
    "eps": 1e-5,
    "num_positions": 49,
}
CROSS_ATTENTION = {
    "layers": list(CROSS_LAYERS),
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_width": 64,
    "ffn_width": 768,
    "qk_norm": False,
    "vector_gate": False,
}


def checkpoint_config(text_config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the demo checkpoint, in the layout that the `flamingo` family reads."""
    return {
        "model_type": "crossgate_flamingo",
        "image_token_id": IMAGE_TOKEN_ID,
        "bos_token_id": None,
        "eos_token_id": 2,
        "additional_vocab_size": 1,
        "vision_config": {"encoder": ENCODER, "resampler": RESAMPLER},
        "text_config": text_config,
        "cross_attention_config": CROSS_ATTENTION,
    }
