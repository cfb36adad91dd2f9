"""A family and a tokenizer small enough to make in a test: byte-level BPE, or sentencepiece-like with byte fallback."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from service.families.family import CrossAttentionConfig, DecoderConfig, Family, Sight, Unseen
from service.families.parts import Activation, AttentionConfig, FeedForwardConfig, RMSNormConfig, Rotary
from service.families.pixels import resize_square
from service.families.vision import ResamplerConfig, VisionConfig, VitConfig

CORPUS = [
    "What is in the picture? A red apple and a yellow banana stand on a blue table.",
    "How many animals are there? There are three cats, two dogs and one small bird.",
    "naïve café, größer, Straße, 日本語のテキスト, 한국어, русский язык, 🙂🚀👩‍👩‍👧",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<image>")
MAX_POSITIONS = 160
IMAGE_SIZE = 16
NORM, HEADS = RMSNormConfig(1e-5), AttentionConfig(1, 1, 8)
FEED_FORWARD = FeedForwardConfig(16, Activation.SILU, gated=True)


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 1 and IDEFICS: `▁` for a space, unknown characters as UTF-8 bytes, the first space stripped."""
    words = ["▁", "a", "e", "t", "s", "▁a", "▁the", "▁cat", "▁sat", "ing", "é", "中"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>", "<image>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def make_family(folder: Path, tokenizer: Tokenizer, *, chat_template: str | None = CHAT_TEMPLATE) -> Family:
    """A flamingo-like family whose checkpoint folder holds a tokenizer's config and no weights."""
    end = tokenizer.token_to_id("<|im_end|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": None}))
    size = tokenizer.get_vocab_size()
    return Family(
        name="flamingo",
        folder=folder,
        vision=VisionConfig(
            VitConfig(IMAGE_SIZE, 8, 5, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 8, 1, 1, 16),
            ResamplerConfig(8, 8, 1, 1, 8, 4, 16),
        ),
        decoder=DecoderConfig(
            vocab_size=size,
            num_logits=size,
            width=8,
            num_layers=1,
            norm=NORM,
            attention=HEADS,
            rotary=Rotary(1e4, 8),
            feed_forward=FEED_FORWARD,
            max_positions=MAX_POSITIONS,
            tied_head=True,
            cross_attention=CrossAttentionConfig(
                (0,), 8, 4, NORM, HEADS, FEED_FORWARD, vector_gate=False, unseen=Unseen.SKIP_BLOCK
            ),
        ),
        preprocess=partial(resize_square, size=IMAGE_SIZE),
        image_token_id=tokenizer.token_to_id("<image>"),
        image_text=lambda after_image: "<image>",
        see=_see,
        bos_token_id=None,
        eos_token_ids=(end,) if end is not None else (),
        chat_template=chat_template,
        vision_weight=lambda name: None,
        decoder_weight=lambda name: None,
    )


def _see(before: Sight, previous_token: int | None, picture: int | None) -> Sight:
    return before if picture is None else (picture,)
