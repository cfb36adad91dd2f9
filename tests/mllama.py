"""Tiny random Llama 3.2 Vision checkpoints, and `transformers` as their reference.

It computes as Meta's own code does, of which `transformers` leaves in two places: tokens that see no picture get
nothing from a cross-attention layer, and an intermediate layer of the encoder gives what it read, not what it wrote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from tests.checkpoints import write_json

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
IMAGE = "<|image|>"
IMAGE_SIZE = 28  # of a tile
CHAT_TEMPLATE = (  # writes pictures by itself, and another opening where there are some, as the published one does
    "{{ bos_token }}{% set ns = namespace(pictures=false) %}"
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set ns.pictures = true %}{% endif %}{% endfor %}{% endfor %}"
    "{% if not ns.pictures %}{{ '<|start_header_id|>system<|end_header_id|>\n\nA plain chat.<|eot_id|>' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def make_mllama(
    folder: Path,
    *,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a checkpoint of the published layout and return `folder`. `text`, `vision`: over the small values here."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = llama3_tokenizer()
    vocab_size = tokenizer.get_vocab_size() - 1  # the image token is the first of the extra embeddings
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_global_layers": 2,
        "attention_heads": 4,
        "intermediate_size": 48,
        "image_size": IMAGE_SIZE,
        "patch_size": 7,
        "intermediate_layers_indices": [1, 3],
        "max_num_tiles": 4,
        **(vision or {}),
    }
    vision["vision_output_dim"] = vision["hidden_size"] * (1 + len(vision["intermediate_layers_indices"]))
    config = MllamaConfig(
        vision_config=vision,
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "cross_attention_layers": [1, 3],
            "max_position_embeddings": 512,
            "bos_token_id": vocab_size - len(SPECIAL),
            "eos_token_id": vocab_size - len(SPECIAL) + 1,
            "pad_token_id": vocab_size - 1,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            **(text or {}),
        },
        image_token_index=vocab_size,
    )
    model = MllamaForConditionalGeneration(config).eval()
    randomize(model, seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[5]}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    processor(folder, vision["image_size"], vision["max_num_tiles"]).image_processor.save_pretrained(folder)
    return folder


def processor(folder: Path, image_size: int, max_tiles: int) -> MllamaProcessor:
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[5]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    pictures = MllamaImageProcessorPil(
        size={"height": image_size, "width": image_size},
        max_image_tiles=max_tiles,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    return MllamaProcessor(pictures, tokenizer, chat_template=CHAT_TEMPLATE)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Redraw every parameter: matrices at gain 1 or 2, norms near 1, biases near 0, gates between 0.5 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "gate" in name and parameter.numel() == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.5 + 0.5)
        elif "patch_embedding" not in name and ("embed" in name or name.endswith("class_embedding")):
            parameter.copy_(noise)
        elif parameter.dim() >= 2:
            gain = 2.0 if "language_model" in name or "lm_head" in name else 1.0
            parameter.copy_(noise * gain / math.sqrt(math.prod(parameter.shape[1:])))
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.1)
        else:
            parameter.copy_(1.0 + noise * 0.1)


def llama3_tokenizer() -> Tokenizer:
    """Llama 3's in small: byte-level BPE, the special tokens behind the words, the image token last of all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a"), ("i", "s"), ("Ġ", "is"), ("i", "n"), ("in", "g")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in (*SPECIAL, IMAGE)])
    first = (SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", pair=f"{SPECIAL[0]} $A {SPECIAL[0]} $B", special_tokens=[first]
    )
    return tokenizer


class MllamaReference:
    """fp32 on the CPU. `as_meta` False: as `transformers` computes it."""

    def __init__(self, folder: Path, *, as_meta: bool = True) -> None:
        self.model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        config = self.model.config
        self.image_token_id = config.image_token_index
        self.max_tiles = config.vision_config.max_num_tiles
        self.processor = processor(folder, config.vision_config.image_size, self.max_tiles)
        if as_meta:
            encoder = self.model.model.vision_model
            encoder.intermediate_layers_indices = [index - 1 for index in encoder.intermediate_layers_indices]
            for layer in self.model.modules():
                if isinstance(layer, MllamaCrossAttentionDecoderLayer):
                    _give_nothing_where_nothing_is_seen(layer)

    @torch.inference_mode()
    def vision(self, pictures: Sequence[Image.Image]) -> tuple[torch.Tensor | None, list[int]]:
        """Cross-attention states [T * max tiles, P, D] and how many tiles each picture has."""
        if not pictures:
            return None, []
        inputs = self.processor.image_processor(list(pictures), return_tensors="pt")
        (num_tiles,) = inputs.pop("num_tiles")
        features = self.model.model.vision_model(**inputs).last_hidden_state
        states = self.model.model.multi_modal_projector(features)
        return states.reshape(-1, *states.shape[-2:]), list(num_tiles)

    @torch.inference_mode()
    def logits(
        self, input_ids: list[int], vision: tuple[torch.Tensor | None, list[int]], generated: int = 0
    ) -> torch.Tensor:
        """[L, V]. The last `generated` tokens go on with the mask of the last prompt token, as in `generate`."""
        states, num_tiles = vision
        mask = None
        if states is not None:
            prompt = input_ids[: len(input_ids) - generated]
            sparse = get_cross_attention_token_mask(prompt, self.image_token_id)
            dense = convert_sparse_cross_attention_mask_to_dense([sparse], [num_tiles], self.max_tiles, len(prompt))
            mask = torch.from_numpy(dense)
            mask = torch.cat((mask, mask[:, -1:].expand(-1, generated, -1, -1)), dim=1)
        output = self.model(
            input_ids=torch.tensor([input_ids]),
            cross_attention_states=states,
            cross_attention_mask=mask,
            use_cache=False,
        )
        return output.logits[0]

    def greedy(self, input_ids: list[int], pictures: Sequence[Image.Image], num_tokens: int) -> list[int]:
        """Recomputes everything at every step: slow, and free of any cache's mistakes."""
        vision, tokens = self.vision(pictures), list(input_ids)
        for generated in range(num_tokens):
            tokens.append(int(self.logits(tokens, vision, generated)[-1].argmax()))
        return tokens[len(input_ids) :]


def _give_nothing_where_nothing_is_seen(layer: MllamaCrossAttentionDecoderLayer) -> None:
    """Meta's rule for the attention's output; for the feed-forward `transformers` has it, too."""
    rows: list[torch.Tensor] = []

    def remember(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows[:] = [kwargs["full_text_row_masked_out_mask"][:, 0]]  # [B, L, 1]

    layer.register_forward_pre_hook(remember, with_kwargs=True)
    layer.cross_attn.register_forward_hook(lambda _, args, output: (output[0] * rows[0], *output[1:]))
