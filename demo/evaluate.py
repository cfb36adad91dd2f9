"""Measures the connector on drawings that training never saw, beside the same model with a blank picture.

    python -m demo.evaluate [--connector demo/connector.safetensors]

Runs the training-time forward pass over cached features, in fp32; tests/demo/test_training_forward.py shows that it
chooses the same tokens as the served engine. The blank picture is the same background without its drawings.
"""

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from demo.assemble import CONNECTOR
from demo.concepts import TEST_VENDORS
from demo.features import SINGLES, FeatureSet, load_features
from demo.model import DemoModel, load_connector
from demo.questions import NAMING, Question, ask, is_right, listing
from demo.samples import SceneLabel

SEED = 5


class Result(NamedTuple):
    kind: str
    asked: int
    right: float  # share
    right_blank: float


class Asked(NamedTuple):
    row: int  # of the scene in its set
    question: Question


def questions_about(scenes: Sequence[SceneLabel], per_kind: int | None) -> list[Asked]:
    """Naming in its first wording, where no drawing stands twice; the other kinds for every scene, wordings by lot."""
    rng = random.Random(SEED)
    asked = []
    for row, (concepts, colour) in enumerate(scenes):
        if row < SINGLES or 1 < len(concepts) == len(set(concepts)):
            asked.append(Asked(row, Question("naming", NAMING[0], listing(concepts))))
        asked += [Asked(row, ask(kind, concepts, colour, rng)) for kind in ("presence", "counting", "colour")]
    return asked if per_kind is None else limited(asked, scenes, per_kind)


def limited(asked: list[Asked], scenes: Sequence[SceneLabel], per_kind: int) -> list[Asked]:
    """At most so many questions of each kind, spread evenly over the scenes."""
    kept = []
    for kind in sorted({kind_of(item, scenes) for item in asked}):
        own = [item for item in asked if kind_of(item, scenes) == kind]
        kept += [own[int(place)] for place in np.linspace(0, len(own) - 1, min(per_kind, len(own)))]
    return kept


def kind_of(item: Asked, scenes: Sequence[SceneLabel]) -> str:
    if item.question.kind != "naming":
        return item.question.kind
    return f"naming {len(scenes[item.row][0])}"


@torch.inference_mode()
def evaluate(model: DemoModel, data: FeatureSet, blank: FeatureSet, per_kind: int | None) -> list[Result]:
    asked = questions_about(data.scenes, per_kind)
    rows = sorted({item.row for item in asked})
    latents = resample(model, data, rows)
    blanks = resample(model, blank, range(len(blank.scenes)))
    blank_of = {colour: place for place, (_, colour) in enumerate(blank.scenes)}
    seen = torch.stack([latents[rows.index(item.row)] for item in asked])
    unseen = torch.stack([blanks[blank_of[data.scenes[item.row][1]]] for item in asked])
    texts = [item.question.text for item in asked]
    answers, blank_answers = model.answer(seen, texts), model.answer(unseen, texts)
    results = []
    for kind in sorted({kind_of(item, data.scenes) for item in asked}):
        own = [place for place, item in enumerate(asked) if kind_of(item, data.scenes) == kind]
        right = [is_right(asked[place].question, answers[place]) for place in own]
        right_blank = [is_right(asked[place].question, blank_answers[place]) for place in own]
        results.append(Result(kind, len(own), float(np.mean(right)), float(np.mean(right_blank))))
    for place, item in enumerate(asked):
        if kind_of(item, data.scenes) == "naming 1" and not is_right(item.question, answers[place]):
            print(f"  wrong: {item.question.answer} -> {answers[place]}")
    return results


def resample(model: DemoModel, data: FeatureSet, rows: Sequence[int]) -> Tensor:
    """Latents [rows, R, E]."""
    batches = [list(rows[start : start + 64]) for start in range(0, len(rows), 64)]
    return torch.cat([model.resampler(torch.from_numpy(data.features[batch]).float()) for batch in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the connector on Twemoji and OpenMoji.")
    parser.add_argument("--connector", type=Path, default=CONNECTOR)
    parser.add_argument("--per-kind", type=int, help="ask at most so many questions of a kind")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model = DemoModel()
    load_connector(model, arguments.connector)
    blank = load_features("blank")
    for vendor in TEST_VENDORS:
        started = time.monotonic()
        results = evaluate(model.eval(), load_features(vendor), blank, arguments.per_kind)
        print(f"\n{vendor} ({time.monotonic() - started:.0f} s)")
        print(f"{'question':<12}{'asked':>7}{'right':>9}{'blank':>9}")
        for kind, asked, right, right_blank in results:
            print(f"{kind:<12}{asked:>7}{right:>9.1%}{right_blank:>9.1%}")


if __name__ == "__main__":
    main()
