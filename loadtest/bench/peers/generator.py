"""`transformers` at its best: `generate` over a batch padded on the left, K/V cache on, `torch.inference_mode`.

Text alone never runs the encoder, and pictures are encoded once a batch. What it cannot do: skip a picture that was
asked about before, or let a new question into a batch that runs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import IdeficsForVisionText2Text

from loadtest.pictures import jpeg
from service.families import load_family

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
PAD = 0


@dataclass(frozen=True)
class Question:
    """`pictures` uint8 [T, 3, H, W]."""

    input_ids: Sequence[int]
    pictures: NDArray[np.uint8]
    max_tokens: int


class Generator:
    def __init__(self, folder: Path, dtype: str) -> None:
        self.model = IdeficsForVisionText2Text.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        family = load_family(folder)
        self.image_token_id, self.preprocess = family.image_token_id, family.preprocess
        self.latents_shape = family.vision.latents_shape  # (R, E)
        self._size = family.vision.encoder.image_size

    def question(self, body: dict[str, Any]) -> Question:
        """From a body of /v1/generate with token ids; its pictures are decoded here, once."""
        files = (base64.b64decode(url.partition(",")[2]) for url in body["images"])
        return Question(body["prompt"], self._pixels(files), body["max_tokens"])

    def question_about(self, input_ids: Sequence[int], pictures: Sequence[int], max_tokens: int) -> Question:
        """About pictures by number (`loadtest.pictures`)."""
        return Question(input_ids, self._pixels(jpeg(number) for number in pictures), max_tokens)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], **options: Any) -> list[list[int]]:
        """Greedy tokens of each, computed together until the longest is done. `options`: further ones of `generate`."""
        longest = max(len(question.input_ids) for question in questions)
        num_pictures = max(len(question.pictures) for question in questions)
        ids = torch.full((len(questions), longest), PAD)
        attended = torch.zeros(len(questions), longest, dtype=torch.long)
        seen = torch.zeros(len(questions), longest, max(num_pictures, 1), dtype=torch.long)
        for row, question in enumerate(questions):
            begin = longest - len(question.input_ids)
            ids[row, begin:] = torch.tensor(question.input_ids)
            attended[row, begin:] = 1
            ordinal = (ids[row] == self.image_token_id).cumsum(0) - 1  # each sees the latest picture before it
            positions = (ordinal >= 0).nonzero()[:, 0]
            seen[row, positions, ordinal[positions]] = 1
        output = self.model.generate(
            input_ids=ids,
            attention_mask=attended,
            image_attention_mask=seen,
            max_new_tokens=max(question.max_tokens for question in questions),
            do_sample=False,
            use_cache=True,
            pad_token_id=PAD,
            **self._vision(questions, num_pictures),
            **options,
        )
        answers = output[:, longest:].tolist()
        return [answer[: question.max_tokens] for answer, question in zip(answers, questions, strict=True)]

    def _vision(self, questions: Sequence[Question], num_pictures: int) -> dict[str, Tensor]:
        """Pixels [B, T, 3, H, W]; where nobody has a picture, latents that nobody sees: nothing is encoded."""
        if num_pictures == 0:
            return {"image_hidden_states": torch.zeros(len(questions), 1, *self.latents_shape, dtype=self.model.dtype)}
        pixels = torch.zeros(len(questions), num_pictures, 3, self._size, self._size)
        for row, question in enumerate(questions):
            if len(question.pictures):
                pixels[row, : len(question.pictures)] = (torch.from_numpy(question.pictures).float() / 255 - MEAN) / STD
        return {"pixel_values": pixels}

    def _pixels(self, files: Any) -> NDArray[np.uint8]:
        pictures = [self.preprocess(Image.open(io.BytesIO(file))) for file in files]
        return np.stack(pictures) if pictures else np.zeros((0, 3, self._size, self._size), np.uint8)
