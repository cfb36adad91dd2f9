"""`transformers` as the reference: logits and greedy tokens of IDEFICS checkpoints, nothing of ours in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import IdeficsForVisionText2Text
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids_pt,
    incremental_to_binary_attention_mask,
)

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


class IdeficsReference:
    """fp32 on the CPU. Pictures are uint8 [T, 3, H, W], T >= 1 (a picture that no token sees stands in for none)."""

    def __init__(self, folder: Path, image_token_id: int) -> None:
        self.model = IdeficsForVisionText2Text.from_pretrained(folder, dtype=torch.float32).eval()
        self.image_token_id = image_token_id
        self.eos_token_id = self.model.config.eos_token_id

    def convert_tokens_to_ids(self, token: str) -> int:
        """What the processor's mask function asks of a tokenizer."""
        assert token == "<image>"
        return self.image_token_id

    @torch.inference_mode()
    def vision(self, pictures: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
        pixels = (torch.from_numpy(pictures).float() / 255 - MEAN) / STD
        features = self.model.model.vision_model(pixels).last_hidden_state  # (T, P, E)
        if self.model.config.use_resampler:
            return {"perceiver_embeddings": self.model.model.perceiver_resampler(features)[None]}
        return {"image_encoder_embeddings": features[None]}

    @torch.inference_mode()
    def logits(self, input_ids: list[int], vision: dict[str, torch.Tensor], generated: int = 0) -> torch.Tensor:
        """[L, V], the picture mask made by the processor's own function.

        The last `generated` tokens stand for no pictures, even if the model chose the image token: `generate` goes on
        with the mask of the last prompt token.
        """
        ids = torch.tensor([input_ids])
        num_pictures = next(iter(vision.values())).shape[1]
        marks = ids.clone()
        marks[:, len(input_ids) - generated :][marks[:, len(input_ids) - generated :] == self.image_token_id] = 3
        incremental, _ = image_attention_mask_for_packed_input_ids_pt(marks, self)
        mask = incremental_to_binary_attention_mask(incremental, "pt", num_classes=num_pictures)
        output = self.model(input_ids=ids, image_attention_mask=mask, use_cache=False, **vision)
        return output.logits[0]

    def greedy(self, input_ids: list[int], pictures: NDArray[np.uint8], num_tokens: int) -> list[int]:
        """Recomputes everything at every step: slow, and free of any cache's mistakes."""
        vision, tokens = self.vision(pictures), list(input_ids)
        for generated in range(num_tokens):
            tokens.append(int(self.logits(tokens, vision, generated)[-1].argmax()))
        return tokens[len(input_ids) :]
