"""Every figure in process is measured to its end, on a checkpoint so small that its value means nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from loadtest.bench import figures
from loadtest.bench.figures import Figure, Measure

IN_PROCESS = (
    figures.decode_beside_transformers,
    figures.short_beside_long,
    figures.sampling_share,
    figures.streams_beside_a_prompt,
)


def name(measure: Measure) -> str:
    return measure.__name__


@pytest.mark.parametrize("measure", IN_PROCESS, ids=name)
def test_a_figure_in_process_has_a_value(checkpoint: Path, measure: Measure) -> None:
    for figure in measure(checkpoint, "float32", 1):
        assert math.isfinite(figure.value) and figure.parts
        assert figure.what in figure.row()[0]


def test_a_rate_is_held_against_a_bound_from_below() -> None:
    assert Figure("tokens/s", "", 800.0, 2500.0, at_most=False).row()[2] == "800.00 (≥ 2500: **not met**)"
    assert Figure("ms", "", 0.5, 1.0).row()[2] == "0.50 (≤ 1: met)"
