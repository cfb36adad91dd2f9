"""python -m loadtest.report RUN [OTHER_RUN] [-o report.html]: one page, nothing to load, that compares two runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from loadtest.charts import Line, cumulative, line_chart, number, stacked_bars
from loadtest.figures import STAGES, Figures, by_scenario, duration_s, failures, figures, over_time, percentile
from loadtest.record import Run, load_run

COLOURS = ("#2f6db3", "#d97a1e")
STAGE_COLOURS = ("#b9c0c9", "#6a4c93", "#2f6db3", "#7fb069")
STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
LATENCIES = (("Time to first token", "ttft_ms"), ("Between tokens", "gaps_ms"), ("End to end", "e2e_ms"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of --record; one or two")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    options = parser.parse_args(arguments)
    if len(options.runs) > 2:
        parser.error("one run, or two to compare")
    try:
        runs = [load_run(folder) for folder in options.runs]
    except (OSError, ValueError) as error:
        print(f"loadtest.report: {error}", file=sys.stderr)
        return 2
    options.output.write_text(render(runs), encoding="utf-8")
    print(options.output)
    return 0


def render(runs: Sequence[Run]) -> str:
    totals = [figures(run.samples, duration_s(run)) for run in runs]
    title = " and ".join(run.name for run in runs)
    body = [
        f"<h1>Load test: {escape(title)}</h1>",
        _about(runs),
        "<h2>In short</h2>",
        _summary(runs, totals),
        '<h2>Latency, answers and stages</h2><div class="charts">',
        *_charts(runs, totals),
        "</div><h2>By scenario</h2>",
        _scenarios(runs),
        "<h2>Failures</h2>",
        _failures(runs),
        f"<footer>{GUIDE}</footer>",
    ]
    head = f'<meta charset="utf-8"><title>Load test: {escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _about(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.about))
    rows = []
    for name in names:
        values = [run.about.get(name) for run in runs]
        told = [
            ", ".join(value) if isinstance(value, list) else "" if value is None else str(value) for value in values
        ]
        if any(told):
            rows.append([name, *told])
    rows.append(["duration", *(f"{duration_s(run):.0f} s" for run in runs)])
    return _table(["", *_keys(runs)], rows, css="about")


def _summary(runs: Sequence[Run], totals: Sequence[Figures]) -> str:
    def row(name: str, values: Sequence[float | None], unit: str, *, less_is_better: bool | None) -> list[str]:
        cells = ["–" if value is None else f"{number(value)}{unit}" for value in values]
        return [name, *cells, *([_change(values, less_is_better)] if len(values) == 2 else [])]

    rows = [
        row("Requests", [float(total.num_requests) for total in totals], "", less_is_better=None),
        row("Failures", [float(total.num_failed) for total in totals], "", less_is_better=True),
        row("Clients that left", [float(total.num_left) for total in totals], "", less_is_better=None),
        row("Answers per second", [total.requests_per_s for total in totals], "", less_is_better=False),
        row("Tokens per second", [total.tokens_per_s for total in totals], "", less_is_better=False),
    ]
    hits = [None if total.picture_hits is None else 100 * total.picture_hits for total in totals]
    rows.append(row("Pictures already in the decoder", hits, " %", less_is_better=None))
    for name, field in LATENCIES:
        for percent in (50, 95, 99):
            values = [percentile(getattr(total, field), percent) for total in totals]
            rows.append(row(f"{name}, p{percent}", values, " ms", less_is_better=True))
    return _table(["", *_keys(runs), *(["change"] if len(runs) == 2 else [])], rows)


def _charts(runs: Sequence[Run], totals: Sequence[Figures]) -> list[str]:
    charts = []
    for name, field in LATENCIES:
        lines = [
            Line(run.name, colour, [(max(x, 0.1), y) for x, y in cumulative(getattr(total, field))])
            for run, colour, total in zip(runs, COLOURS, totals, strict=False)
        ]
        chart = line_chart(lines, "ms", "% of requests", log_x=True, y_max=100)
        charts.append(_figure(f"{name}: % that were no slower", chart))
    lines = [Line(run.name, colour, over_time(run)) for run, colour in zip(runs, COLOURS, strict=False)]
    charts.append(_figure("Answers per second, over the run", line_chart(lines, "s", "answers/s")))
    bars = [(run.name, total.stage_ms) for run, total in zip(runs, totals, strict=True)]
    charts.append(_figure("Mean time of a request by stage", stacked_bars(bars, STAGES, STAGE_COLOURS)))
    rows = [(name, found.stage_ms) for name, found in by_scenario(runs[-1]).items() if any(found.stage_ms)]
    charts.append(_figure(f"The same by scenario, {runs[-1].name}", stacked_bars(rows, STAGES, STAGE_COLOURS)))
    return charts


def _scenarios(runs: Sequence[Run]) -> str:
    found = [by_scenario(run) for run in runs]
    header = ["Scenario", "Run", "Requests", "Failed", "Hits", "TTFT p50", "p95", "Gap p50", "p95"]
    rows = []
    for scenario in sorted({name for one in found for name in one}):
        for key, one in zip(_keys(runs), found, strict=True):
            if scenario not in one:
                continue
            at = one[scenario]
            hits = "–" if at.picture_hits is None else f"{100 * at.picture_hits:.0f} %"
            cells = [escape(scenario), key, str(at.num_requests), str(at.num_failed), hits]
            cells += [_ms(percentile(values, p)) for values in (at.ttft_ms, at.gaps_ms, at.e2e_ms) for p in (50, 95)]
            rows.append(cells)
    note = "<p>Hits: pictures that the decoder held already. TTFT, gap between tokens, and end to end in ms.</p>"
    return _table([*header, "E2E p50", "p95"], rows, css="dense") + note


def _failures(runs: Sequence[Run]) -> str:
    rows = [
        [key, escape(scenario), escape(error), str(count)]
        for key, run in zip(_keys(runs), runs, strict=True)
        for (scenario, error), count in sorted(failures(run).items())
    ]
    return _table(["Run", "Scenario", "Error", "Count"], rows) if rows else '<p class="none">None.</p>'


def _keys(runs: Sequence[Run]) -> list[str]:
    return [
        f'<b class="key" style="background:{colour}"></b>{escape(run.name)}'
        for run, colour in zip(runs, COLOURS, strict=False)
    ]


def _change(values: Sequence[float | None], less_is_better: bool | None) -> str:
    before, after = values
    if before is None or after is None or before == after:
        return "="
    if not before:
        return "new"
    change = 100 * (after - before) / before
    css = "" if less_is_better is None or abs(change) < 5 else "good" if (change < 0) == less_is_better else "bad"
    return f'<span class="{css}">{change:+.0f} %</span>'


def _figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], css: str = "") -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _ms(value: float | None) -> str:
    return "–" if value is None else number(value)


GUIDE = """<h2>How to read this</h2>
<p>Time to first token and token gaps are of streamed answers only, as the client felt them. A gap is between two
pieces of text; a piece is a token or a few that became ready together. Tokens that share a step of the decoder share
its gap, so gaps grow with load before anything fails. Answers that failed stand under Failures and in no latency.</p>
<p>In a closed loop a slow server is asked less often, and so looks better than it is: compare closed runs by answers
per second, and latency in open loop, at the same rate. A change below 5 % has no colour: repeat the run before
you believe it.</p>"""


if __name__ == "__main__":
    sys.exit(main())
