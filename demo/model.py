"""The demo model as training runs it: padded batches, text below the first gated block computed once a sentence.

The modules are those that are served; only `DenseAttention` stands in for the engine's caches. Text before the picture
sees none, so its keys and values are constants, computed once (`Prefix`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from demo.assemble import with_image_row
from demo.questions import AFTER_QUESTION, SYSTEM
from demo.recipe import CROSS_ATTENTION, CROSS_LAYERS, ENCODER, IMAGE_TOKEN, IMAGE_WORD, RESAMPLER, checkpoint_config
from demo.smollm2 import open_smollm2, read_text_config, read_tokenizer, read_weights
from service.decoder.model import Decoder
from service.families.family import fused_target
from service.families.flamingo import decoder_config, resampler_config
from service.vision.resampler import PerceiverResampler

END_ID = 2  # <|im_end|>
FIRST_GATE = 0.5  # gates opened from the start: from zero nothing was learnt
MAX_CACHED_SENTENCES = 40_000
CHUNK = 32  # sentences

KeyValue = tuple[Tensor, Tensor]


class DenseAttention:
    """The decoder's `Attention` for B sentences of L tokens, padded on the right, all after the same prefix.

    `image_kv`: per gated layer K and V [B, R, K, C], or None where no token sees a picture.
    """

    def __init__(
        self, batch: int, length: int, prefix: dict[int, KeyValue] | None, image_kv: dict[int, KeyValue] | None
    ) -> None:
        self.batch, self.length, self.prefix, self.image_kv = batch, length, prefix, image_kv
        self.any_sees = image_kv is not None
        self.sees = torch.full((batch * length, 1), self.any_sees)
        self.stored: dict[int, KeyValue] = {}
        before = 0 if prefix is None else prefix[0][0].shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        self.mask = torch.cat((torch.ones(length, before, dtype=torch.bool), causal), dim=1)

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (self.batch, self.length)) for x in (q, k, v))  # (B, L, H or K, C)
        if self.prefix is None:
            self.stored[layer] = k.detach(), v.detach()
        else:
            k, v = (
                torch.cat((old.to(new.dtype).expand(self.batch, -1, -1, -1), new), dim=1)
                for old, new in zip(self.prefix[layer], (k, v), strict=True)
            )
        return self.attend(q, k, v, self.mask)

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        assert self.image_kv is not None
        k, v = self.image_kv[layer]
        return self.attend(q.unflatten(0, (self.batch, self.length)), k, v, None)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Written out: with its backward a quarter faster on CPUs than the fused one."""
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, dim=2).transpose(1, 2) for x in (k, v))  # (B, H, S, C)
        scores = q.transpose(1, 2).to(k.dtype) @ (k * k.shape[-1] ** -0.5).transpose(-1, -2)  # (B, H, L, S)
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e4)
        weights = scores.softmax(-1, dtype=torch.float32).to(k.dtype)
        return (weights @ v.to(k.dtype)).transpose(1, 2).flatten(2).flatten(0, 1)  # (B*L, H*C)


class Prefix(NamedTuple):
    """What stands before the picture: its length in tokens and its keys and values by layer."""

    length: int
    kv: dict[int, KeyValue]


class DemoModel(nn.Module):
    """`resampler` and `decoder.cross_layers` are trained; everything else is frozen."""

    def __init__(self, sizes: dict[str, Any] | None = None) -> None:
        super().__init__()
        file = open_smollm2()
        self.tokenizer: Tokenizer = read_tokenizer(file)
        sizes = sizes or {"vision_config": {"resampler": RESAMPLER}, "cross_attention_config": CROSS_ATTENTION}
        text = read_text_config(file)
        resampler, cross = resampler_config(sizes["vision_config"]["resampler"]), sizes["cross_attention_config"]
        additional_vocab_size = checkpoint_config(text)["additional_vocab_size"]
        self.resampler = PerceiverResampler(resampler)
        self.decoder = Decoder(decoder_config(text, additional_vocab_size, cross, resampler))
        load_language_model(self.decoder, read_weights(file), self.tokenizer.token_to_id(IMAGE_WORD))
        self.first_gated = min(CROSS_LAYERS)
        self.head = self.decoder.embed_tokens.weight.detach()[: text["vocab_size"]]
        self.sentences: dict[tuple[int, ...], Tensor] = {}
        initialise(self)
        self.prefix = self.make_prefix()

    def trained(self) -> dict[str, nn.Parameter]:
        named = {f"vision.resampler.{name}": weight for name, weight in self.resampler.named_parameters()}
        cross = self.decoder.cross_layers.named_parameters()
        return named | {f"decoder.cross_layers.{name}": weight for name, weight in cross}

    def freeze_in_bf16(self) -> None:
        """Keeps the frozen matrices in bf16, for training under autocast: no cast at every step."""
        for layer in self.decoder.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data = module.weight.data.bfloat16()
        self.head = self.head.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            self.prefix = self.make_prefix()

    def prompt_ids(self, question: str) -> tuple[int, ...]:
        """The tokens after the prefix, up to where the answer begins."""
        return tuple(self.tokenizer.encode(IMAGE_TOKEN + question + AFTER_QUESTION, add_special_tokens=False).ids)

    @torch.no_grad()
    def make_prefix(self) -> Prefix:
        ids = torch.tensor(self.tokenizer.encode(SYSTEM, add_special_tokens=False).ids)
        attention = DenseAttention(1, len(ids), None, None)
        self.decoder(ids, torch.arange(len(ids)), attention)
        return Prefix(len(ids), attention.stored)

    def hidden(self, sentences: Sequence[tuple[int, ...]], latents: Tensor) -> Tensor:
        """Sentences that begin with the picture's token, latents [B, R, E] -> hidden states [B, L, D], padded."""
        batch, length = len(sentences), padded_length(max(map(len, sentences)))
        image_kv = {
            layer: self.decoder.cross_layers[str(layer)].project_image(latents)
            for layer in self.decoder.config.cross_attention.layers
        }
        x = self.below_gates(sentences, length).flatten(0, 1)  # (B*L, D)
        attention = DenseAttention(batch, length, self.prefix.kv, image_kv)
        x = self.decoder.forward_layers(x, self.rope(batch, length), attention, self.first_gated)
        hidden: Tensor = self.decoder.norm(x).unflatten(0, (batch, length))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        rows = hidden.to(self.head.dtype)
        filled = torch.cat((rows, rows[:1].expand(-len(rows) % 128, -1)))  # one shape for oneDNN to compile, not many
        return F.linear(filled, self.head)[: len(rows)].float()

    @torch.no_grad()
    def below_gates(self, sentences: Sequence[tuple[int, ...]], length: int) -> Tensor:
        """What the layers below the first gated block make of the text alone: [B, L, D], cached per sentence."""
        if len(self.sentences) > MAX_CACHED_SENTENCES:
            self.sentences.clear()
        new = sorted({sentence for sentence in sentences if sentence not in self.sentences}, key=len)
        for start in range(0, len(new), CHUNK):
            chunk = new[start : start + CHUNK]
            longest = padded_length(max(map(len, chunk)))
            size = 1 << (len(chunk) - 1).bit_length()  # few shapes here too
            ids = torch.full((size, longest), END_ID)
            for row, sentence in enumerate(chunk):
                ids[row, : len(sentence)] = torch.tensor(sentence)
            x, rotations = self.decoder.embed_tokens(ids.flatten()), self.rope(size, longest)
            attention = DenseAttention(size, longest, self.prefix.kv, None)
            for layer in self.decoder.layers[: self.first_gated]:
                x = layer(x, rotations, attention)
            for sentence, states in zip(chunk, x.unflatten(0, (size, longest)), strict=False):
                self.sentences[sentence] = states[: len(sentence)].to(self.head.dtype, copy=True)
        below = torch.zeros(len(sentences), length, self.decoder.config.width)
        for row, sentence in enumerate(sentences):
            below[row, : len(sentence)] = self.sentences[sentence]
        return below

    def rope(self, batch: int, length: int) -> Tensor:
        positions = torch.arange(self.prefix.length, self.prefix.length + length).repeat(batch)
        return self.decoder.rotary.rotations(positions, torch.float32)


def padded_length(length: int) -> int:
    """Up to a multiple of 8: fewer shapes for which oneDNN has to compile its kernels."""
    return -(-length // 8) * 8


def load_language_model(decoder: Decoder, weights: dict[str, Tensor], image_word_id: int) -> None:
    weights["embed_tokens.weight"] = with_image_row(weights["embed_tokens.weight"], image_word_id)
    parts: dict[str, dict[int, Tensor]] = {}
    for name, weight in weights.items():
        target = fused_target(name)
        parts.setdefault(target.name, {})[target.part] = weight
    state = {name: torch.cat([pieces[part] for part in sorted(pieces)]) for name, pieces in parts.items()}
    missing, unexpected = decoder.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("cross_layers.") for name in missing)


def initialise(model: DemoModel) -> None:
    """Freezes what is published and draws what is to be trained."""
    model.decoder.requires_grad_(False)
    for name, weight in model.decoder.cross_layers.named_parameters():
        weight.requires_grad_(True)
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.02)
        elif name.endswith("_gate"):
            nn.init.constant_(weight, FIRST_GATE)
    assert model.resampler.positions is not None
    nn.init.normal_(model.resampler.positions, std=0.02)
    nn.init.normal_(model.resampler.latents, std=0.5)


def save_connector(model: DemoModel, path: Path) -> None:
    """The trained weights in fp16, and the sizes that a checkpoint's config.json needs, as metadata."""
    sizes = {
        "vision_config": {"encoder": ENCODER, "resampler": RESAMPLER},
        "cross_attention_config": CROSS_ATTENTION,
    }
    weights = {name: weight.detach().half().contiguous() for name, weight in model.trained().items()}
    save_file(weights, path, metadata={"config": json.dumps(sizes)})


def load_connector(model: DemoModel, path: Path) -> None:
    weights = load_file(path)
    with torch.no_grad():
        for name, parameter in model.trained().items():
            parameter.copy_(weights.pop(name))
    assert not weights
