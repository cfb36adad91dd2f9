"""Questions about a scene and their answers, in many wordings, and the prompt the service makes of a question.

Evaluation parses what the model generates with `said`.
"""

import re
from typing import NamedTuple

import numpy as np

from demo.concepts import demo_concepts
from demo.scenes import COLOURS

# What SmolLM2's chat template makes of one user message that begins with a picture.
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
AFTER_QUESTION = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"

WHAT = (
    "What is in the picture?", "What is in this picture?", "What do you see?", "What is this?",
    "What is shown here?", "What does the picture show?", "What's in the image?", "What can you see in the picture?",
    "Describe the picture.", "Name what is drawn here.", "What is it?", "Tell me what you see.",
)  # fmt: skip
IS_THERE = (
    "Is there {a} in the picture?", "Is there {a}?", "Do you see {a}?", "Can you see {a} in this picture?",
    "Does the picture show {a}?", "Is there {a} in the image?", "Is {a} in the picture?", "Is {a} drawn here?",
)  # fmt: skip
HOW_MANY = (
    "How many drawings are there?", "How many drawings are in the picture?", "How many things are in the picture?",
    "How many objects do you see?", "How many things are there?", "Count the drawings.",
)  # fmt: skip
COLOUR = (
    "What color is the background?", "What is the background color?", "Which color is behind the drawings?",
    "What colour is the background?", "What is the color of the background?",
)  # fmt: skip
NUMBERS = {1: "One.", 2: "Two.", 3: "Three."}
PLURAL = {
    "books", "cherries", "french fries", "fireworks", "glasses", "grapes", "houses", "jeans", "scissors", "sunglasses",
}  # fmt: skip
NO_ARTICLE = PLURAL | {"bacon", "bread", "fire", "tennis"}
THE = {"sun", "full moon"}
# Answers "no" are harder for these; a share of the questions about absent things asks for a neighbour.
CONFUSABLE = (
    ("rat", "mouse", "rabbit", "koala"), ("locomotive", "train", "bus", "car", "tractor", "fire engine"),
    ("chicken", "rooster", "turkey", "duck", "eagle", "owl", "penguin"), ("ship", "sailboat"),
    ("red apple", "green apple", "peach", "pear", "cherries", "lemon", "melon"), ("glasses", "sunglasses"),
    ("telephone", "telephone receiver", "mobile phone"), ("goat", "ram", "deer", "cow", "camel", "horse"),
    ("cat", "tiger", "lion", "fox", "dog"), ("house", "houses", "factory", "castle"), ("tent", "circus tent"),
    ("pen", "pencil", "paintbrush"), ("closed book", "open book", "books", "newspaper"),
    ("baseball", "basketball", "soccer ball", "volleyball", "tennis", "american football"),
    ("guitar", "violin", "saxophone", "trumpet"), ("whale", "dolphin", "fish"), ("hammer", "wrench"),
    ("ant", "bug", "spider", "scorpion"), ("hamburger", "hot dog", "burrito", "bread"), ("rose", "hibiscus"),
    ("bear", "gorilla", "monkey", "koala"), ("sun", "full moon", "star"), ("bread", "croissant", "cookie"),
)  # fmt: skip


class Question(NamedTuple):
    kind: str  # "naming" | "presence" | "counting" | "colour" | "listing"
    text: str
    answer: str
    truth: str  # what the answer must hold: a concept, "yes" or "no", a number, a colour, "a, b"


def article(concept: str) -> str:
    """"a fox", "an owl", "grapes"."""
    if concept in NO_ARTICLE:
        return concept
    if concept in THE:
        return f"the {concept}"
    return f"an {concept}" if concept[0] in "aeiou" else f"a {concept}"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def listing(concepts: tuple[str, ...]) -> str:
    if len(concepts) == 1:
        return sentence(article(concepts[0]))
    named = [article(concept) for concept in concepts]
    return sentence(", ".join(named[:-1]) + " and " + named[-1])


def ask(kind: str, concepts: tuple[str, ...], colour: str, rng: np.random.Generator, plain: bool = False) -> Question:
    """A question of this kind about a scene. `plain`: in the first wording, for evaluation."""

    def worded(wordings: tuple[str, ...]) -> str:
        return wordings[0] if plain else str(rng.choice(wordings))

    if kind in ("naming", "listing"):
        ordered = tuple(sorted(concepts))
        return Question(kind, worded(WHAT), listing(ordered), ", ".join(ordered))
    if kind == "counting":
        return Question(kind, worded(HOW_MANY), NUMBERS[len(concepts)], str(len(concepts)))
    if kind == "colour":
        return Question(kind, worded(COLOUR), sentence(colour), colour)
    if rng.random() < 0.5:
        concept, truth = str(rng.choice(concepts)), "yes"
    else:
        concept, truth = absent(concepts, rng), "no"
    text = worded(IS_THERE).format(a=article(concept))
    return Question(kind, text, sentence(truth), truth)


def absent(concepts: tuple[str, ...], rng: np.random.Generator, confusing: float = 0.25) -> str:
    """A concept that is not in the scene; with probability `confusing` one that is easily taken for one that is."""
    near = [name for group in CONFUSABLE if set(group) & set(concepts) for name in group if name not in concepts]
    if near and rng.random() < confusing:
        return str(rng.choice(near))
    while True:
        concept = str(rng.choice(demo_concepts()))
        if concept not in concepts:
            return concept


def named(answer: str) -> set[str]:
    """The concepts that an answer names; the longest reading wins ("hot dog" is no dog)."""
    text, found = f" {re.sub('[^a-z0-9-]+', ' ', answer.lower())} ", set()
    for concept in sorted(demo_concepts(), key=len, reverse=True):
        if f" {concept} " in text:
            found.add(concept)
            text = text.replace(f" {concept} ", "  ")
    return found


def said(question: Question, answer: str) -> bool:
    """Whether a generated answer is right."""
    words = re.findall("[a-z]+", answer.lower())
    if question.kind in ("naming", "listing"):
        return named(answer) == set(question.truth.split(", "))
    if question.kind == "counting":
        return bool(words) and words[0] == NUMBERS[int(question.truth)].lower().strip(".")
    if question.kind == "presence":
        return bool(words) and words[0] == question.truth
    return [word for word in words if word in COLOURS] == [question.truth]
