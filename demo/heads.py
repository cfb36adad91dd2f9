"""Throw-away heads that teach the connector without the language model: seconds a step become tenths.

`SceneHead` reads the concepts, their number and the background's colour from the latents. `PresenceHead` runs the first
gated block alone, on what the layers below it make of "Is there a fox?", and reads whether a fox is there.
"""

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.concepts import demo_concepts
from demo.model import DemoModel, DenseAttention
from demo.questions import AFTER_QUESTION, PRESENCE, absent, with_article
from demo.recipe import IMAGE_TOKEN
from demo.scenes import COLOURS

SceneLabel = tuple[list[str], str]  # concepts, background colour

OTHERS_WEIGHT = 0.3  # of counts and colours beside concepts


class SceneHead(nn.Module):
    """What a scene shows, how many drawings and on which colour, read from the mean of its latents [B, R, E]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.concepts = nn.Linear(width, len(demo_concepts()))
        self.count = nn.Linear(width, 4)
        self.colour = nn.Linear(width, len(COLOURS))

    def loss(self, latents: Tensor, scenes: Sequence[SceneLabel]) -> Tensor:
        pooled = latents.mean(dim=1)  # (B, E)
        wanted = torch.zeros(len(scenes), len(demo_concepts()))
        for row, (concepts, _) in enumerate(scenes):
            for concept in concepts:
                wanted[row, demo_concepts().index(concept)] += 1 / len(concepts)
        counts = torch.tensor([len(concepts) for concepts, _ in scenes])
        colours = torch.tensor([list(COLOURS).index(colour) for _, colour in scenes])
        named = -(wanted * F.log_softmax(self.concepts(pooled), dim=-1)).sum(-1).mean()
        others = F.cross_entropy(self.count(pooled), counts) + F.cross_entropy(self.colour(pooled), colours)
        loss: Tensor = named + OTHERS_WEIGHT * others
        return loss


class PresenceHead(nn.Module):
    """Reads "it is there" from what the first gated block adds to two tokens of the question.

    They are the concept's last, where text and picture can be compared, and the prompt's last, where the answer begins.
    """

    def __init__(self, model: DemoModel) -> None:
        super().__init__()
        self.layer = model.first_gated
        self.read = nn.Parameter(torch.randn(2, model.decoder.config.width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(2))
        self.states = question_states(model, demo_concepts())  # (concepts, wordings, 2, D)

    def logits(self, model: DemoModel, latents: Tensor, asked: Tensor, wordings: Tensor) -> Tensor:
        """latents [B, R, E]; asked and wordings int64 [B, n] -> [B, n, 2], one for each of the two tokens."""
        block = model.decoder.cross_layers[str(self.layer)]
        x = self.states[asked, wordings].flatten(0, 2)  # (B*n*2, D)
        image_kv = {self.layer: block.project_image(latents)}  # type: ignore[operator]
        added = block(x, DenseAttention(len(asked), 2 * asked.shape[1], None, image_kv)) - x
        return (added.view(*asked.shape, 2, -1).float() * self.read).sum(-1) + self.bias

    def loss(
        self, model: DemoModel, latents: Tensor, scenes: Sequence[SceneLabel], rng: random.Random, pairs: int = 4
    ) -> tuple[Tensor, Tensor]:
        """The mean over as many questions about what is there as about what is not, and the share right [2]."""
        rows = [row for row, (concepts, _) in enumerate(scenes) if concepts]
        asked = [
            [concept for _ in range(pairs) for concept in (rng.choice(scenes[row][0]), absent(scenes[row][0], rng))]
            for row in rows
        ]
        numbers = torch.tensor([[demo_concepts().index(concept) for concept in row] for row in asked])
        wordings = torch.tensor([[rng.randrange(len(PRESENCE)) for _ in row] for row in asked])
        there = torch.tensor([1.0, 0.0]).repeat(pairs)[None, :, None].expand(len(rows), -1, 2)
        logits = self.logits(model, latents[rows], numbers, wordings)
        right = ((logits > 0) == (there > 0.5)).float().mean(dim=(0, 1))
        return F.binary_cross_entropy_with_logits(logits, there), right


def question_states(model: DemoModel, concepts: Sequence[str]) -> Tensor:
    """Before the first gated block, of the concept's last token and the prompt's: [concepts, wordings, 2, D]."""
    sentences, places = [], []
    for concept in map(with_article, concepts):
        for wording in PRESENCE:
            text = IMAGE_TOKEN + wording.format(a=concept) + AFTER_QUESTION
            encoded = model.tokenizer.encode(text, add_special_tokens=False)
            end = text.index(concept) + len(concept)
            places.append(next(place for place, (_, stop) in enumerate(encoded.offsets) if stop >= end))
            sentences.append(tuple(encoded.ids))
    states = model.below_gates(sentences, max(map(len, sentences)))  # (concepts*wordings, L, D)
    rows, last = torch.arange(len(sentences)), torch.tensor([len(sentence) - 1 for sentence in sentences])
    chosen = torch.stack((states[rows, torch.tensor(places)], states[rows, last]), dim=1)
    return chosen.unflatten(0, (len(concepts), len(PRESENCE)))
