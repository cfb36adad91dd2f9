"""The table's ratios, and what it says about bounds."""

from __future__ import annotations

import xml.dom.minidom
from pathlib import Path

import pytest

from loadtest.bench import measure
from loadtest.bench.__main__ import PAGE, in_order
from loadtest.bench.bounds import least, verdict
from loadtest.bench.measure import Result
from loadtest.bench.table import chart, client_line, results_table

ONE, EIGHT = "1 user, 1 picture", "8 users, 1 picture"


def result(system: str, *rates: float, scenario: str = EIGHT, dtype: str = "float32", agreed: float = 1.0) -> Result:
    return Result(scenario, system, dtype, list(rates), [1.0] * len(rates), [0.25], agreed)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()[2:]]


def test_ratios_are_of_medians_and_say_whether_their_bound_is_met() -> None:
    results = [
        result("service", 300, 1, 180),
        result("fastapi", 30),
        result("litserve", 150, 150),
        result("engine", 200),
    ]
    (row,) = rows(results_table(results, judged=True))
    assert row[2:7] == ["200", "180", "–", "30", "150"]
    assert row[7:] == ["6.00 (≥ 6: met)", "1.20 (≥ 1.4: **not met**)", "0.90 (≥ 0.8: met)", "100 %"]


def test_at_its_best_each_system_has_its_faster_dtype() -> None:
    results = [result("service", 100), result("fastapi", 20)]
    results += [result("service", 160, dtype="bfloat16", agreed=0.9), result("fastapi", 10, dtype="bfloat16")]
    single, half, best = rows(results_table(results, judged=True))
    assert single[7] == "5.00 (≥ 6: **not met**)"
    assert half[7] == "16.00" and half[-1] == "90 %", "half precision on both sides has no bound of its own"
    assert best[7] == "8.00 (≥ 8: met)" and best[3] == "160" and best[5] == "20"


def test_a_short_run_is_not_judged_and_what_was_not_measured_is_a_dash() -> None:
    (row,) = rows(results_table([result("service", 50), result("fastapi", 25)], judged=False))
    assert row[7:10] == ["2.00", "–", "–"]


def test_a_bound_from_above_is_met_below_it() -> None:
    assert verdict(0.2, 0.25, at_most=True) == "0.20 (≤ 0.25: met)"
    assert verdict(0.3, 0.25, at_most=True) == "0.30 (≤ 0.25: **not met**)"
    assert least("engine", "32 users, 1 picture", "best") == 0.8
    assert least("fastapi", "32 users, 1 picture", "float32") is None


def test_a_scenario_measured_again_replaces_what_was_recorded(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "results.json"
    measure.save([result("service", 1), result("fastapi", 2)], file)
    measure.save([result("service", 3, scenario=ONE)], file)
    measure.save([result("service", 4)], file)
    found = in_order(measure.load(file))
    assert [(r.scenario, r.system, r.rate) for r in found] == [(ONE, "service", 3), (EIGHT, "service", 4)]


def test_the_plot_is_an_image_of_its_own_with_a_bar_for_each_rate() -> None:
    svg = chart([result("service", 100), result("fastapi", 20), result("service", 9, scenario=ONE)], "float32")
    xml.dom.minidom.parseString(svg)
    assert svg.count("<title>") == 3 and 'xmlns="http://www.w3.org/2000/svg"' in svg


def test_the_client_is_told_by_its_worst() -> None:
    assert client_line([result("service", 1), result("engine", 1)]) == "The client took at most 25 % of a core."


@pytest.mark.parametrize("name", ["bench", "figures", "growth"])
def test_every_table_has_a_place_in_the_page(name: str) -> None:
    assert f"<!-- {name} -->" in PAGE.read_text()
