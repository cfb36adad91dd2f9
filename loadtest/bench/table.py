"""Results as a table in Markdown and as a plot. Ratios are of medians, and stand beside their bounds."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.bench.bounds import least, verdict
from loadtest.bench.measure import Result
from loadtest.charts import grouped_bars, standalone
from tests.reliability.table import markdown

COLUMNS = {
    "engine": "engine in process",
    "service": "service over HTTP",
    "transformers": "`generate`, static batch",
    "fastapi": "FastAPI + lock",
    "litserve": "LitServe",
}
COLOURS = {
    "engine": "#9db7d5",
    "service": "#1f5fa8",
    "transformers": "#c9ccd1",
    "fastapi": "#a8adb5",
    "litserve": "#7d848e",
}
OVER = ("fastapi", "litserve", "engine")
NONE = "–"
Rates = dict[str, Result]  # by system


def results_table(results: Sequence[Result], *, judged: bool) -> str:
    """A row a scenario and dtype; where both dtypes were measured, one more with each system's faster one.

    `judged` False: bounds are left out, as for a run in short form.
    """
    header = ["tokens/s", "dtype", *COLUMNS.values(), *(f"service ÷ {COLUMNS[name]}" for name in OVER), "tokens agreed"]
    rows = []
    for scenario in dict.fromkeys(result.scenario for result in results):
        for dtype, rates in by_dtype([result for result in results if result.scenario == scenario]).items():
            cells = [f"{rates[name].rate:,.0f}" if name in rates else NONE for name in COLUMNS]
            ratios = [_ratio(rates, over, scenario, dtype, judged) for over in OVER]
            agreed = NONE if dtype == "best" else f"{100 * min(result.agreed for result in rates.values()):.4g} %"
            rows.append([scenario, dtype, *cells, *ratios, agreed])
    return markdown(header, rows)


def by_dtype(results: Sequence[Result]) -> dict[str, Rates]:
    """Of one scenario: dtype -> system -> result; "best" where there are two."""
    found: dict[str, Rates] = {}
    for result in results:
        found.setdefault(result.dtype, {})[result.system] = result
    if len(found) > 1:
        systems = {result.system for result in results}
        found["best"] = {
            name: max((r for r in results if r.system == name), key=lambda result: result.rate) for name in systems
        }
    return found


def _ratio(rates: Rates, over: str, scenario: str, dtype: str, judged: bool) -> str:
    if "service" not in rates or over not in rates:
        return NONE
    return verdict(rates["service"].rate / rates[over].rate, least(over, scenario, dtype) if judged else None)


def client_line(results: Sequence[Result]) -> str:
    shares = [share for result in results for share in result.client_cpu]
    return f"The client took at most {100 * max(shares):.2g} % of a core." if shares else ""


def chart(results: Sequence[Result], dtype: str) -> str:
    """An SVG file: bars of tokens/s, a group a scenario."""
    names = list(COLUMNS)
    groups = []
    for scenario in dict.fromkeys(result.scenario for result in results):
        rates = by_dtype([result for result in results if result.scenario == scenario]).get(dtype, {})
        groups.append((scenario, [rates[name].rate if name in rates else None for name in names]))
    titles = [COLUMNS[name].replace("`", "") for name in names]
    return standalone(grouped_bars(groups, titles, [COLOURS[name] for name in names], "tokens/s"))
