"""Hostile to the decoder: its sampling, its pools, and tensors that only the gateway should send."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from tests.e2e.running import picture
from tests.reliability.attack import Answers, Target, ask, at_once, decode, form, show

SLOW_S = 8.0


# Sampling


def temperatures_that_overflow(target: Target) -> Answers:
    values = (1e-38, 1e-45, 5e-324, 1e-300, 1e-7, 2.0)
    return sum((ask(target, temperature=value, seed=1) for value in values), Counter())


def top_p_and_top_k_at_their_ends(target: Target) -> Answers:
    fields = [{"top_p": 5e-324}, {"top_p": 1e-38}, {"top_k": 2**31}, {"top_k": 2**63}, {"top_k": 10**30}]
    return sum((ask(target, temperature=1.0, **each) for each in fields), Counter())


def numbers_beyond_64_bits(target: Target) -> Answers:
    fields: list[dict[str, Any]] = [{"seed": 2**64}, {"max_tokens": 10**25}, {"stop_token_ids": [2**31, -1, 10**20]}]
    return sum((ask(target, **each) for each in fields), Counter())


def a_million_stop_ids(target: Target) -> Answers:
    return at_once(4, lambda _: ask(target, stop_token_ids=list(range(1_000_000)), max_tokens=200))


def a_thousand_stop_fields_in_a_form(target: Target) -> Answers:
    return form(target, [('name="prompt"', b"Hi"), *[('name="stop_token_ids"', b"7")] * 50_000])


# What only the gateway should send


def latents_that_are_not_finite(target: Target) -> Answers:
    answers: Answers = Counter()
    for value in (np.inf, -np.inf, np.nan, 3e38):
        latents = np.ones((1, *target.latents_shape), np.float32)
        latents[0, 0, 0] = value
        answers += decode(target, latents=latents)
    return answers


def tensors_that_do_not_fit(target: Target) -> Answers:
    changes = [
        {"latents": np.ones((3, *target.latents_shape), np.float32)},
        {"latent_index": np.array([5], np.int32)},
        {"image_positions": np.array([99], np.int32)},
        {"image_positions": np.array([-1], np.int32)},
        {"image_keys": np.zeros((2, 32), np.uint8)},
        {"input_ids": np.array([2**31 - 1, -5], np.int32)},
        {"input_ids": np.full(100_000, 50, np.int32)},
        {"input_ids": np.zeros(0, np.int32)},
        {"sampling": np.frombuffer(b"{" * 5000, np.uint8)},
        {"sampling": np.frombuffer(b'{"stop_token_ids": 7, "max_tokens": "x"}', np.uint8)},
        {"sampling": np.frombuffer(b'{"temperature": NaN, "max_tokens": 4}', np.uint8)},
        {"sampling": np.frombuffer(b"\xff\xfe", np.uint8)},
    ]
    return sum((decode(target, **each) for each in changes), Counter())


# Its pools


def pictures_that_take_every_page(target: Target) -> Answers:
    def hog(number: int) -> Answers:
        return show(
            target, *(picture(5000 + 16 * number + each) for each in range(16)), max_tokens=100, ignore_eos=True
        )

    return at_once(4, hog)


def answers_that_take_every_block(target: Target) -> Answers:
    return at_once(6, lambda number: ask(target, prompt=[1, *[40 + number] * 1500], max_tokens=100, ignore_eos=True))


def many_encodes_at_once(target: Target) -> Answers:
    def flood(number: int) -> Answers:
        return show(target, *(picture(9000 + 16 * number + each) for each in range(16)), max_tokens=1)

    return at_once(24, flood)
