"""Measures a connector on drawings of vendors that training never saw, as it is served: pictures in, greedy tokens out.

    python -m demo.evaluate                    # the committed connector, in fp32 through both stages' own code
    python -m demo.evaluate --dtype bfloat16   # what processors with bfloat16 serve it in
    python -m demo.evaluate --per-kind 40      # a quicker look

Every question is asked again about a blank picture, a plain background of the scene's colour: what guessing is worth.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from demo.assemble import CONNECTOR, assemble
from demo.concepts import TEST_VENDORS, demo_concepts
from demo.features import drawing_of, pick
from demo.questions import AFTER_QUESTION, NAMING, SYSTEM, Question, ask, is_right, listing
from demo.recipe import IMAGE_TOKEN
from demo.scenes import Scene, compose, plain_scene
from service.contract import SamplingParams, ValidRequest
from service.decoder.engine import Engine
from service.decoder.settings import DecoderSettings
from service.errors import CrossgateError
from service.families import load_family
from service.vision.stage import VisionStage

NUM_SCENES = 700
NUM_SINGLES = 340  # of them: every concept alone, twice
PICTURES_AT_ONCE = 32
SETTINGS = DecoderSettings(max_running=48, max_waiting=100_000, max_step_tokens=512, kv_blocks=512, image_pages=256)
ANSWER = SamplingParams(max_tokens=24)
SEED = 5


class Asked(NamedTuple):
    scene: Scene
    question: Question

    @property
    def kind(self) -> str:
        kind = self.question.kind
        return f"{kind} {len(self.scene.concepts)}" if kind == "naming" else kind

    def blank(self) -> Asked:
        """The same question about nothing."""
        colour = self.scene.colour
        return Asked(plain_scene(colour, np.random.default_rng((SEED, *colour.encode()))), self.question)


class Result(NamedTuple):
    kind: str
    asked: int
    right: float  # share
    right_blank: float


class Served:
    """Both stages of the service in this process, on an assembled checkpoint."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        self.family = load_family(checkpoint)
        self.tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self.engine = Engine.from_family(self.family, replace(SETTINGS, dtype=dtype))
        self.vision = VisionStage(self.family, "cpu", dtype)

    def answers(self, asked: Sequence[Asked]) -> list[str]:
        """Greedy answers. A question that was asked already about the same pixels is not asked again."""
        keys = [hashlib.sha256(item.scene.pixels.tobytes()).hexdigest() for item in asked]
        pictures = {key: item.scene for key, item in zip(keys, asked, strict=True)}
        latents = self.encode(pictures)
        wanted = {(key, item.question.text): number for number, (key, item) in enumerate(zip(keys, asked, strict=True))}
        texts: dict[int, list[int]] = {number: [] for number in wanted.values()}
        for (key, question), number in wanted.items():
            ids = self.tokenizer.encode(SYSTEM + IMAGE_TOKEN + question + AFTER_QUESTION, add_special_tokens=False).ids
            request = ValidRequest(tuple(ids), (key,), (ids.index(self.family.image_token_id),), ANSWER)
            self.engine.add(number, request, latents[key][None], [0])
        while self.engine.has_work:
            for number, event in self.engine.step():
                if isinstance(event, CrossgateError):
                    raise event
                texts[number] += event.token_ids
        numbers = (wanted[key, item.question.text] for key, item in zip(keys, asked, strict=True))
        return [self.tokenizer.decode(texts[number]) for number in numbers]

    def encode(self, pictures: dict[str, Scene]) -> dict[str, torch.Tensor]:
        """Latents [R, E] by key."""
        keys, latents = list(pictures), {}
        for start in range(0, len(keys), PICTURES_AT_ONCE):
            batch = keys[start : start + PICTURES_AT_ONCE]
            pixels = [self.family.preprocess(Image.fromarray(pictures[key].pixels)) for key in batch]
            latents |= dict(
                zip(batch, self.vision.encode(torch.from_numpy(np.stack(pixels))).flatten(0, 1), strict=True)
            )
        return latents


def evaluation_scene(vendor: str, index: int) -> Scene:
    """Every concept alone, twice; then one to three drawings by lot. Nothing is augmented."""
    rng = np.random.default_rng((7, 1 + TEST_VENDORS.index(vendor), index))
    if index < NUM_SINGLES:
        concept = demo_concepts()[index % len(demo_concepts())]
        return compose([drawing_of(concept, (vendor,), rng)], [concept], rng, augmented=False)
    return compose(*pick(rng, (vendor,)), rng, augmented=False)


def questions_about(scenes: Sequence[Scene], per_kind: int | None) -> list[Asked]:
    """Naming in its first wording, where no drawing stands twice; the other kinds for every scene, wordings by lot."""
    rng = random.Random(SEED)
    asked: list[Asked] = []
    for row, scene in enumerate(scenes):
        if row < NUM_SINGLES or 1 < len(scene.concepts) == len(set(scene.concepts)):
            asked.append(Asked(scene, Question("naming", NAMING[0], listing(scene.concepts))))
        asked += [
            Asked(scene, ask(kind, scene.concepts, scene.colour, rng)) for kind in ("presence", "counting", "colour")
        ]
    return asked if per_kind is None else limited(asked, per_kind)


def limited(asked: Sequence[Asked], per_kind: int) -> list[Asked]:
    """At most so many questions of each kind, spread evenly over the scenes."""
    kept = []
    for kind in sorted({item.kind for item in asked}):
        own = [item for item in asked if item.kind == kind]
        kept += [own[int(place)] for place in np.linspace(0, len(own) - 1, min(per_kind, len(own)))]
    return kept


def evaluate(served: Served, vendor: str, per_kind: int | None) -> list[Result]:
    asked = questions_about([evaluation_scene(vendor, index) for index in range(NUM_SCENES)], per_kind)
    answers, blank_answers = served.answers(asked), served.answers([item.blank() for item in asked])
    rows = list(zip(asked, answers, blank_answers, strict=True))
    for item, answer, _ in rows:
        if item.kind == "naming 1" and not is_right(item.question, answer):
            print(f"  wrong: {item.question.answer} -> {answer}")
    results = []
    for kind in sorted({item.kind for item in asked}):
        own = [row for row in rows if row[0].kind == kind]
        right = [is_right(item.question, answer) for item, answer, _ in own]
        right_blank = [is_right(item.question, answer) for item, _, answer in own]
        results.append(Result(kind, len(own), float(np.mean(right)), float(np.mean(right_blank))))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the connector on Twemoji and OpenMoji.")
    parser.add_argument("--connector", type=Path, default=CONNECTOR)
    parser.add_argument("--per-kind", type=int, help="ask at most so many questions of a kind")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        served = Served(assemble(Path(folder) / "checkpoint", arguments.connector), arguments.dtype)
    for vendor in TEST_VENDORS:
        started = time.monotonic()
        results = evaluate(served, vendor, arguments.per_kind)
        print(f"\n{vendor} ({time.monotonic() - started:.0f} s)")
        print(f"{'question':<12}{'asked':>7}{'right':>9}{'blank':>9}")
        for kind, asked, right, right_blank in results:
            print(f"{kind:<12}{asked:>7}{right:>9.1%}{right_blank:>9.1%}")


if __name__ == "__main__":
    main()
