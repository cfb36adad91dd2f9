"""What is asked is the same for every system, and new where it has to be."""

from __future__ import annotations

import pytest

from loadtest.bench.bounds import BOUNDS
from loadtest.bench.measure import WARM_UP
from loadtest.bench.scenario import SCENARIOS, SHORT, VOCABULARY, Request, Scenario
from loadtest.bench.systems import NAMES

IMAGE = 9000


def pictures(scenario: Scenario, *turns: int) -> list[int]:
    return [p for turn in turns for request in scenario.requests(IMAGE, turn) for p in request.pictures]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_prompt_has_its_users_words_and_a_mark_for_each_picture(scenario: Scenario) -> None:
    requests = scenario.requests(IMAGE, 0)
    assert requests == scenario.requests(IMAGE, 0)
    assert len(requests) == len({request.input_ids for request in requests}) == scenario.users
    for request in requests:
        assert request.input_ids.count(IMAGE) == len(request.pictures) == scenario.pictures
        assert all(token in VOCABULARY for token in request.input_ids[1:] if token != IMAGE)
        assert scenario.num_tokens[0] <= request.max_tokens <= scenario.num_tokens[1]
        assert Request.from_json(request.to_json()) == request


def test_pictures_are_new_in_every_round_unless_they_are_repeated() -> None:
    own, repeated = Scenario("own", 8, 4), Scenario("repeated", 8, 4, repeated=True)
    assert len(set(pictures(own, WARM_UP, 0, 1))) == 3 * 8 * 4
    assert len(set(pictures(repeated, WARM_UP, 0, 1))) == 4


def test_every_round_is_the_same_work() -> None:
    ragged = Scenario("ragged", 16, num_tokens=(8, 128))
    lengths = [[request.max_tokens for request in ragged.requests(IMAGE, turn)] for turn in (0, 1)]
    assert lengths[0] == lengths[1] and len(set(lengths[0])) > 8
    assert {request.max_tokens for request in ragged.requests(IMAGE, 0, max_tokens=4)} == {4}


def test_bounds_and_the_short_form_name_scenarios_and_systems_that_are_there() -> None:
    names = {scenario.name for scenario in SCENARIOS}
    assert {*SHORT, *(bound.scenario for bound in BOUNDS if bound.scenario)} <= names
    assert {bound.over for bound in BOUNDS} <= set(NAMES)
    for bound in BOUNDS:
        scenarios = [s for s in SCENARIOS if bound.scenario in (None, s.name)]
        assert all(bound.over not in scenario.without for scenario in scenarios)
