"""The comparisons against a small server whose times are known."""

from __future__ import annotations

import pytest

from loadtest import ratios
from tests.loadtest.fake_server import Behaviour, fake_server


def test_every_comparison_prints_both_sides_and_their_ratio(capsys):
    behaviour = Behaviour(first_token_s=0.02, between_tokens_s=0.01)
    with fake_server(behaviour) as host:
        assert ratios.main(["--host", host, "--rounds", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 3 and all(row.endswith("×** |") for row in rows)
    asked_at_once = float(rows[2].rsplit("**", 2)[1].rstrip("×"))
    assert asked_at_once > 3, "16 answers in turn take longer than at once where nothing is shared"
    pictures = [body["messages"][0]["content"][0]["image_url"]["url"] for body in behaviour.bodies]
    assert len(set(pictures)) == 1 + 4 + 16 + 1 + 16


def test_the_ratio_is_of_medians():
    comparison = ratios.Comparison("x", "a", "b", before_ms=(100, 10, 30), after_ms=(1, 15, 500))
    assert comparison.ratio == pytest.approx(2.0)


@pytest.mark.parametrize("fault", ["error_chunk", "no_done", "overloaded", "cut"])
def test_a_failure_is_one_line_and_status_1(fault, capsys):
    with fake_server(Behaviour(fault=fault)) as host:
        assert ratios.main(["--host", host, "--rounds", "1"]) == 1
    assert capsys.readouterr().err.startswith("crossgate: the service failed: ")
