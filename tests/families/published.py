"""The published configs of models too large to be tried here, as far as shapes depend on them.

Source: config.json of each checkpoint as its publisher has it; what is not listed is `transformers`' default.
"""

from __future__ import annotations

from typing import Any

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
VISION = {
    "attention_heads": 16,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 560,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "intermediate_size": 5120,
    "max_num_tiles": 4,
    "model_type": "mllama_vision_model",
    "norm_eps": 1e-05,
    "num_global_layers": 8,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    "vision_output_dim": 7680,
}
TEXT = {
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "model_type": "mllama_text_model",
    "num_key_value_heads": 8,
    "pad_token_id": 128004,
    "rms_norm_eps": 1e-05,
    "rope_scaling": ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def mllama(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "mllama",
        "image_token_index": 128256,
        "text_config": {**TEXT, **text},
        "vision_config": VISION,
    }


PUBLISHED = {
    "Llama-3.2-11B-Vision": mllama(
        {
            "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
        }
    ),
    "Llama-3.2-90B-Vision": mllama(
        {
            "cross_attention_layers": list(range(3, 100, 5)),
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_hidden_layers": 100,
        }
    ),
}
