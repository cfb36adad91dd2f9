"""Training batches: cached features disturbed a little, questions drawn by lot, sentences padded with their targets."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from demo.features import FeatureSet
from demo.heads import SceneLabel
from demo.model import END_ID, DemoModel, padded_length
from demo.questions import ask

KIND_WEIGHTS = {"naming": 6.5, "presence": 2.2, "counting": 0.6, "colour": 0.7}
QUESTIONS_PER_SCENE = 2
BLANK_EVERY = 40  # one scene in so many shows nothing
DROPPED_POSITIONS = 0.04
CHANNEL_NOISE = 0.1
IGNORED = -100


class Batch(NamedTuple):
    scene_rows: list[int]  # [B], which scene each sentence is about
    sentences: list[tuple[int, ...]]  # from the picture's token to the answer's last but one
    targets: Tensor  # int64 [B, L], IGNORED outside the answer
    kinds: list[str]


def sample_scenes(
    train: FeatureSet, blank: FeatureSet, count: int, rng: np.random.Generator
) -> tuple[Tensor, list[SceneLabel]]:
    """Features fp32 [count, P, 1280]: mirrored half of the time, some positions dropped, channels scaled by noise."""
    rows = rng.integers(0, len(train.scenes), count)
    features = np.stack([train.features[row] for row in rows])
    scenes = [train.scenes[row] for row in rows]
    for place, row in enumerate(rng.integers(0, len(blank.scenes), max(1, count // BLANK_EVERY))):
        features[place], scenes[place] = blank.features[row], blank.scenes[row]
    x = torch.from_numpy(features).float()
    if rng.random() < 0.5:
        side = round(x.shape[1] ** 0.5)
        x = x.unflatten(1, (side, side)).flip(2).flatten(1, 2)
    kept = (torch.rand(count, x.shape[1], 1) > DROPPED_POSITIONS).float()
    return x * kept * (1 + CHANNEL_NOISE * torch.randn(count, 1, x.shape[2])), scenes


def make_batch(model: DemoModel, scenes: Sequence[SceneLabel], rng: random.Random) -> Batch:
    scene_rows, sentences, targets, kinds = [], [], [], []
    for row, (concepts, colour) in enumerate(scenes):
        for kind in rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()), k=QUESTIONS_PER_SCENE):
            if kind == "naming" and len(set(concepts)) < len(concepts):
                kind = "counting"  # "a fox and a fox" is no answer
            question = ask(kind, concepts, colour, rng)
            prompt = model.prompt_ids(question.text)
            answer = [*model.tokenizer.encode(question.answer, add_special_tokens=False).ids, END_ID]
            scene_rows.append(row)
            sentences.append((*prompt, *answer[:-1]))
            targets.append([IGNORED] * (len(prompt) - 1) + answer)
            kinds.append(kind)
    length = padded_length(max(map(len, targets)))
    padded = torch.full((len(targets), length), IGNORED)
    for row, target in enumerate(targets):
        padded[row, : len(target)] = torch.tensor(target)
    return Batch(scene_rows, sentences, padded, kinds)
