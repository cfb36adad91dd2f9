"""Each scenario asks what its name says."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from loadtest.pictures import jpeg
from loadtest.scenarios import MANY, SCENARIOS, TURNS, Ask


def ask_many(name: str, count: int, seed: int | str = 0) -> list[Ask]:
    asks = SCENARIOS[name](random.Random(seed))
    return [next(asks), *(asks.send("an answer") for _ in range(count - 1))]


def pictures(asks: list[Ask]) -> list[int]:
    return [number for ask in asks for message in ask.messages for number in message.pictures]


def test_unique_pictures_never_repeat():
    assert len(set(pictures(ask_many("unique_pictures", 500)))) == 500


def test_hot_picture_is_one_for_everybody():
    assert {*pictures(ask_many("hot_picture", 20, seed=1)), *pictures(ask_many("hot_picture", 20, seed=2))} == {
        1_000_000
    }


def test_zipf_mix_asks_for_the_first_picture_as_often_as_its_law_says():
    counts = Counter(pictures(ask_many("zipf_mix", 20_000)))
    harmonic = sum(1 / rank for rank in range(1, 201))
    assert abs(counts[2_000_000] / 20_000 - 1 / harmonic) < 0.01
    assert counts[2_000_000] > counts[2_000_001] > counts[2_000_010] > counts[2_000_150]


def test_chat_carries_its_history_and_begins_anew():
    asks = ask_many("multi_turn_chat", 2 * TURNS)
    assert [len(ask.messages) for ask in asks] == [1, 3, 5, 7] * 2
    assert asks[1].messages[1].text == "an answer"
    assert len(set(pictures(asks[:TURNS]))) == 1
    assert len(set(pictures(asks))) == 2
    assert all(ask.chat_only for ask in asks)


def test_text_only_has_no_picture_and_many_pictures_has_many():
    assert pictures(ask_many("text_only", 10)) == []
    assert len(pictures(ask_many("many_pictures", 10))) == 10 * MANY


def test_scenarios_share_no_picture():
    seen = {name: set(pictures(ask_many(name, 200, seed=name))) for name in SCENARIOS if not name.endswith("_answers")}
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other


def test_same_seed_asks_the_same():
    for name in SCENARIOS:
        assert ask_many(name, 10) == ask_many(name, 10)


def test_pictures_are_jpeg_and_differ_by_number():
    drawn = {jpeg(number) for number in range(300)}
    assert len(drawn) == 300
    assert all(picture.startswith(b"\xff\xd8") for picture in drawn)
    assert jpeg(7) == jpeg(7)
