"""Questions about a scene and their answers, in many wordings, and the prompt that the service makes of a question."""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from demo.concepts import demo_concepts

# What SmolLM2's chat template makes of one user message that begins with a picture.
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
AFTER_QUESTION = "<|im_end|>\n<|im_start|>assistant\n"

NAMING = (
    "What is in the picture?", "What is this?", "What do you see?", "What does the picture show?",
    "What is shown here?", "Describe the picture.", "What's in this image?", "What is in the image?",
    "What do you see in the picture?", "What is drawn here?", "Name what you see.",
)  # fmt: skip
PRESENCE = (
    "Is there {a} in the picture?", "Do you see {a}?", "Is there {a}?", "Can you see {a} in the image?",
    "Does the picture show {a}?", "Is {a} in this picture?",
)  # fmt: skip
COUNTING = (
    "How many drawings are there?", "How many things are in the picture?", "How many drawings do you see?",
    "How many objects are there?", "Count the drawings.", "How many items are in the image?",
)  # fmt: skip
COLOUR = (
    "What color is the background?", "What is the background color?", "What colour is the background?",
    "Which color does the background have?", "What is the color of the background?",
)  # fmt: skip
NUMBERS = ("No drawing.", "One.", "Two.", "Three.")
NOTHING = "Nothing."

PLURAL = {
    "books", "cherries", "french fries", "fireworks", "glasses", "grapes", "houses", "jeans", "scissors", "sunglasses",
}  # fmt: skip
NO_ARTICLE = PLURAL | {"bacon", "bread", "fire", "tennis", "american football", "baseball", "basketball"}
THE = {"sun", "full moon"}


class Question(NamedTuple):
    kind: str  # "naming" | "presence" | "counting" | "colour"
    text: str
    answer: str


def ask(kind: str, concepts: Sequence[str], colour: str, rng: random.Random) -> Question:
    """A question of this kind about a scene, in a wording drawn by lot, and its answer."""
    if kind == "naming":
        return Question(kind, rng.choice(NAMING), listing(concepts) if concepts else NOTHING)
    if kind == "counting":
        return Question(kind, rng.choice(COUNTING), NUMBERS[len(concepts)])
    if kind == "colour":
        return Question(kind, rng.choice(COLOUR), colour.capitalize() + ".")
    if concepts and rng.random() < 0.5:
        concept, answer = rng.choice(concepts), "Yes."
    else:
        concept, answer = absent(concepts, rng), "No."
    return Question(kind, rng.choice(PRESENCE).format(a=with_article(concept)), answer)


def absent(concepts: Sequence[str], rng: random.Random) -> str:
    while (concept := rng.choice(demo_concepts())) in concepts:
        pass
    return concept


def with_article(concept: str) -> str:
    if concept in NO_ARTICLE:
        return concept
    if concept in THE:
        return f"the {concept}"
    return f"an {concept}" if concept[0] in "aeiou" else f"a {concept}"


def listing(concepts: Sequence[str]) -> str:
    """A fox. | A fox and an owl. | A fox, an owl and grapes."""
    named = [with_article(concept) for concept in concepts]
    text = named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]
    return text[0].upper() + text[1:] + "."


def essence(answer: str) -> str:
    """What two answers are compared by: lower case, no full stop, no leading article."""
    return re.sub("^(an|a|the) ", "", answer.strip().rstrip(".").lower())


def is_right(question: Question, answer: str) -> bool:
    """No synonyms are accepted: the name must be the concept's. Several drawings may be named in any order."""
    if question.kind == "naming":
        wanted, given = (re.split(", | and ", essence(text)) for text in (question.answer, answer))
        return sorted(map(essence, wanted)) == sorted(map(essence, given))
    return essence(answer) == essence(question.answer)
