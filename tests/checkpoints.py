"""Tiny random checkpoints in their publishers' own layout, written by `transformers` itself.

Weights are drawn so that every part matters: gates are open, logits are spread, no greedy run is one repeated token.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import IdeficsConfig, IdeficsForVisionText2Text

IDEFICS_MEAN = [0.48145466, 0.4578275, 0.40821073]
IDEFICS_STD = [0.26862954, 0.26130258, 0.27577711]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def make_idefics(
    folder: Path,
    *,
    seed: int = 0,
    use_resampler: bool = True,
    qk_layer_norms: bool = True,
    qk_layer_norms_perceiver: bool = True,
    alpha_type: str = "vector",
    additional_vocab_size: int = 2,
    image_size: int = 28,
    chat_template: str | None = CHAT_TEMPLATE,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    vocab_size: int = 0,
    vision: dict[str, Any] | None = None,
    perceiver: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write an IDEFICS checkpoint of the published layout and return `folder`.

    `overrides`, `vision` and `perceiver` go to IdeficsConfig and its two parts. A small `max_shard_size` ("200KB")
    gives several files with an index. `additional_vocab_size` 0 puts the image tokens into the ordinary vocabulary.
    `vocab_size`: at least so many words, the image tokens among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = llama_tokenizer(vocab_size)
    total = tokenizer.get_vocab_size()  # the two image tokens are its last two
    config = IdeficsConfig(
        vocab_size=total - 2 if additional_vocab_size else total,
        additional_vocab_size=additional_vocab_size,
        **{
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "cross_layer_interval": 2,
            "max_position_embeddings": 512,
            "alpha_initializer": "ones",
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **overrides,
        },
        alpha_type=alpha_type,
        qk_layer_norms=qk_layer_norms,
        use_resampler=use_resampler,
        vision_config={
            "embed_dim": 48,
            "image_size": image_size,
            "patch_size": 7,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            **(vision or {}),
        },
        perceiver_config={
            "use_resampler": use_resampler,
            "resampler_n_latents": 8,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 12,
            "qk_layer_norms_perceiver": qk_layer_norms_perceiver,
            **(perceiver or {}),
        },
    )
    model = IdeficsForVisionText2Text(config).eval()
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": ["<fake_token_around_image>", "<image>"],
            **({"chat_template": chat_template} if chat_template else {}),
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_mean": IDEFICS_MEAN,
            "image_num_channels": 3,
            "image_processor_type": "IdeficsImageProcessor",
            "image_size": image_size,
            "image_std": IDEFICS_STD,
        },
    )
    return folder


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Redraw every parameter: matrices at gain 1 or 2, norms near 1, biases near 0, gates between 0.5 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "alpha_" in name:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.5 + 0.5)
        elif "embed" in name or "latents" in name:
            parameter.copy_(noise)
        elif parameter.dim() >= 2:
            gain = 2.0 if name.startswith("model.layers") or "cross_attn" in name or "lm_head" in name else 1.0
            parameter.copy_(noise * gain / math.sqrt(math.prod(parameter.shape[1:])))
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.1)
        else:
            parameter.copy_(1.0 + noise * 0.1)


def llama_tokenizer(vocab_size: int = 0) -> Tokenizer:
    """Llama's tokenizer in small: BPE with byte fallback, `▁` for a space, `<s>` in front; the image tokens last.

    Words that no text is made of fill it up to `vocab_size`.
    """
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [chr(code) for code in range(33, 127)]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("i", "s"), ("▁", "is"), ("i", "n"), ("in", "g")]
    words += ["".join(pair) for pair in merges]
    words += [f"▁word{index}" for index in range(len(words), vocab_size - 2)]
    tokenizer = Tokenizer(
        BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    special = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>"]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    return tokenizer


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False))
