"""A wrong token is found, a right one is not blamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loadtest.bench.judge import TIE, Judge, judge_tokens
from loadtest.bench.peers.engine import InProcess
from loadtest.bench.peers.generator import Generator
from loadtest.bench.scenario import Scenario

LOGITS = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 2.0 - TIE / 2], [0.0, 1.0, 5.0]])
RAGGED = Scenario("ragged", 5, 2, num_tokens=(4, 24))
TEXT = Scenario("text", 3, num_tokens=(4, 12))


def test_the_best_token_and_one_that_ties_with_it_agree() -> None:
    for tokens in ([1, 0, 2], [1, 2, 2]):
        verdict = judge_tokens(LOGITS, tokens, 3)
        assert (verdict.num_agree, verdict.num_tokens, verdict.first_wrong) == (3, 3, None)


def test_a_wrong_token_is_named() -> None:
    verdict = judge_tokens(LOGITS, [1, 0, 1], 3)
    assert verdict.num_agree == 2
    assert verdict.first_wrong == "token 2 is 1, the reference's 2 is better by 4.0000"


def test_an_answer_that_is_too_short_or_too_long_agrees_in_nothing() -> None:
    for tokens in ([1, 0], [1, 0, 2, 2]):
        assert judge_tokens(LOGITS, tokens, 3).num_agree == 0


@pytest.mark.parametrize("scenario", [RAGGED, TEXT], ids=lambda scenario: scenario.name)
def test_engine_and_padded_batches_give_the_references_tokens(checkpoint: Path, scenario: Scenario) -> None:
    judge, generator, engine = Judge(checkpoint), Generator(checkpoint, "float32"), InProcess(checkpoint, "float32")
    requests = scenario.requests(generator.image_token_id, 0)
    questions = [generator.question_about(r.input_ids, r.pictures, r.max_tokens) for r in requests]
    for tokens in (generator.answer(questions), engine.answer(requests)[1]):
        for request, answer in zip(requests, tokens, strict=True):
            assert judge.judge(request, tuple(answer)).first_wrong is None
            assert len(set(answer)) > 1, "a run of one repeated token would prove little"


def test_an_answer_about_another_picture_is_wrong(checkpoint: Path) -> None:
    judge, engine = Judge(checkpoint), InProcess(checkpoint, "float32")
    one, other = (RAGGED.requests(engine.family.image_token_id, turn)[0] for turn in (0, 1))
    tokens = engine.answer([one])[1][0]
    mixed_up = type(one)(one.input_ids, other.pictures, one.max_tokens)
    assert judge.judge(one, tuple(tokens)).first_wrong is None
    assert judge.judge(mixed_up, tuple(tokens)).first_wrong is not None


def test_pictures_that_are_resident_are_not_encoded_again(checkpoint: Path) -> None:
    engine = InProcess(checkpoint, "float32")
    requests = RAGGED.requests(engine.family.image_token_id, 0)
    first = engine.answer(requests)[1]
    hits = engine.engine.stats().image_hits
    assert engine.answer(requests)[1] == first
    assert engine.engine.stats().image_hits == hits + 10
