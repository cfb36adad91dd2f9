"""Questions, answers and how answers are judged."""

from __future__ import annotations

import random

import numpy as np

from demo.concepts import demo_concepts
from demo.questions import NOTHING, Question, ask, is_right, listing, with_article
from demo.scenes import COLOURS, compose, place, plain_scene


def test_articles_and_lists_read_as_english() -> None:
    assert with_article("owl") == "an owl" and with_article("fox") == "a fox" and with_article("grapes") == "grapes"
    assert listing(["fox"]) == "A fox."
    assert listing(["sun", "owl"]) == "The sun and an owl."
    assert listing(["fox", "owl", "grapes"]) == "A fox, an owl and grapes."


def test_naming_is_right_only_with_exactly_the_drawn_names() -> None:
    one, two = Question("naming", "", "A hot dog."), Question("naming", "", "A fox and a key.")
    assert is_right(one, "A hot dog.") and is_right(one, "a hot dog")
    assert not is_right(one, "A dog.") and not is_right(one, "A hot dog and a fox.") and not is_right(one, NOTHING)
    assert is_right(two, "A key and a fox.") and not is_right(two, "A fox.")


def test_presence_asks_about_half_present_and_never_wrongly() -> None:
    rng, yes = random.Random(0), 0
    for _ in range(400):
        question = ask("presence", ["fox", "key"], "red", rng)
        shown = any(with_article(name) in question.text for name in ("fox", "key"))
        assert (question.answer == "Yes.") == shown
        yes += question.answer == "Yes."
    assert 150 < yes < 250
    assert ask("presence", [], "red", rng).answer == "No."


def test_every_concept_is_named_once() -> None:
    assert len(demo_concepts()) >= 170 == len(set(demo_concepts()))


def test_same_seed_gives_the_same_scene_and_boxes_hardly_overlap() -> None:
    drawing = np.zeros((64, 64, 4), np.uint8)
    drawing[16:48, 16:48] = (200, 30, 30, 255)
    scenes = [compose([drawing] * 3, ["a", "b", "c"], np.random.default_rng(3), augmented=True) for _ in range(2)]
    assert (scenes[0].pixels == scenes[1].pixels).all() and scenes[0].colour in COLOURS
    boxes = place([90, 90, 90], 224, np.random.default_rng(0))
    assert all(0 <= x <= 224 - size and 0 <= y <= 224 - size for x, y, size in boxes)


def test_a_plain_scene_has_one_colour() -> None:
    scene = plain_scene("blue", np.random.default_rng(0))
    assert scene.concepts == () and len(np.unique(scene.pixels.reshape(-1, 3), axis=0)) == 1
