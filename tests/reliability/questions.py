"""What is asked under faults: pictures by prompts by routes, each with one answer that is right.

The model is greedy and tiny, with random weights, so an answer tells which picture it is about; `record` makes sure.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.e2e.running import data_url, picture
from tests.reliability.client import Answer, Client, Outcome

GENERATE, CHAT = "/v1/generate", "/v1/chat/completions"
PROMPTS = ("What is in the picture?", "Is there a red one?")


@dataclass(frozen=True)
class Question:
    """`about`: which pictures, `prompt`: what of them; two questions that differ in `about` alone have two answers."""

    prompt: str
    about: tuple[int, ...]
    path: str
    body: bytes


def make_questions(num_pictures: int) -> list[Question]:
    """Text alone, one picture, two; both routes; streamed and not."""
    questions = [generate(PROMPTS[0], (), stream=stream, max_tokens=40) for stream in (True, False)]
    for number in range(num_pictures):
        even = number % 2 == 0
        questions.append(generate(PROMPTS[0], (number,), stream=even, max_tokens=24))
        questions.append(generate(PROMPTS[1], (number,), stream=not even, max_tokens=24))
        questions.append(chat(PROMPTS[0], (number,), stream=even, max_tokens=32))
        if even:
            questions.append(generate(PROMPTS[1], (number, (number + 1) % num_pictures), stream=True, max_tokens=16))
    return questions


def generate(prompt: str | list[int], about: tuple[int, ...], **fields: Any) -> Question:
    """Greedy, to the length asked for, with token ids in the answer."""
    text = "<image>" * len(about) + prompt if isinstance(prompt, str) else prompt
    images = [data_url(picture(number)) for number in about]
    body = {"prompt": text, "images": images, "return_token_ids": True, "ignore_eos": True, **fields}
    return Question(f"{GENERATE} {str(prompt)[:40]} {fields}", about, GENERATE, json.dumps(body).encode())


def chat(prompt: str, about: tuple[int, ...], **fields: Any) -> Question:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(picture(number))}} for number in about
    ]
    content = [*parts, {"type": "text", "text": prompt}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "ignore_eos": True, **fields}
    return Question(f"{CHAT} {prompt} {fields}", about, CHAT, json.dumps(body).encode())


async def record(client: Client, questions: Sequence[Question]) -> dict[Question, Answer]:
    """The answers in quiet, one question after another; raises AssertionError if two pictures share one."""
    answers: dict[Question, Answer] = {}
    for question in questions:
        reply = await client.ask(question.path, question.body)
        assert reply.outcome is Outcome.FINISHED, f"{question.prompt}: {reply.outcome} {reply.detail}"
        answers[question] = reply.answer
    tell_apart(answers)
    return answers


def tell_apart(answers: Mapping[Question, Answer]) -> None:
    """Raises AssertionError unless every picture has an answer of its own to every prompt."""
    groups: dict[str, dict[Answer, Question]] = defaultdict(dict)
    for question, answer in answers.items():
        assert answer, f"no answer to {question.prompt}"
        other = groups[question.prompt].setdefault(answer, question)
        assert other.about == question.about, f"{question.about} and {other.about} have one answer: {question.prompt}"
