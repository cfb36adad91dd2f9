"""Plots as SVG text: a few lines on a grid, stacked and grouped bars. No library, no script, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 22, 10, 36
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    name: str
    colour: str
    points: Sequence[Point]


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, *, log_x: bool = False, y_max: float = 0.0) -> str:
    """`y_max` 0: from the data. With `log_x` every x must be above 0."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if not xs:
        return '<p class="none">no data</p>'
    x_ticks = log_ticks(min(xs), max(xs)) if log_x else ticks(0.0, max(xs))
    y_ticks = ticks(0.0, y_max or max(ys))
    scale = math.log if log_x else float
    x_low, x_high, y_high = scale(x_ticks[0]), scale(x_ticks[-1]), y_ticks[-1]

    def place(x: float, y: float) -> Point:
        across = (scale(x) - x_low) / (x_high - x_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / y_high * (HEIGHT - TOP - BOTTOM)

    parts = [_open(f"{y_label} over {x_label}")]
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x, y = place(tick, 0)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 14:.1f}" text-anchor="middle">{number(tick)}</text>')
    for line in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
        parts.append(f'<polyline stroke="{line.colour}" points="{path}"><title>{escape(line.name)}</title></polyline>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text></svg>'
    )
    return "".join(parts)


def stacked_bars(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], colours: Sequence[str]) -> str:
    """One horizontal bar a row, its parts in the order of `names`."""
    total = max((sum(parts) for _, parts in rows), default=0.0)
    if total <= 0:
        return '<p class="none">no data</p>'
    label_width, bar_height, gap = 120, 22, 10
    height = len(rows) * (bar_height + gap) + 24
    parts = [_open("where the time went", height)]
    for index, (label, values) in enumerate(rows):
        x, y = float(label_width), index * (bar_height + gap) + 4
        text_y = y + bar_height - 7
        parts.append(f'<text class="tick" x="{label_width - 8}" y="{text_y}" text-anchor="end">{escape(label)}</text>')
        for name, colour, value in zip(names, colours, values, strict=True):
            width = value / total * (WIDTH - label_width - 70)
            title = f"<title>{escape(name)}: {number(value)} ms</title>"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{bar_height}" fill="{colour}">{title}</rect>'
            )
            x += width
        parts.append(f'<text class="tick" x="{x + 6:.1f}" y="{text_y}">{number(sum(values))} ms</text>')
    x = float(label_width)
    for name, colour in zip(names, colours, strict=True):
        parts.append(f'<rect x="{x}" y="{height - 13}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text class="tick" x="{x + 14}" y="{height - 4}">{escape(name)}</text>')
        x += 14 + 7 * len(name) + 14
    return "".join([*parts, "</svg>"])


def grouped_bars(
    groups: Sequence[tuple[str, Sequence[float | None]]], names: Sequence[str], colours: Sequence[str], unit: str
) -> str:
    """Horizontal bars, a group a label, its bars in the order of `names`; None: no bar."""
    longest = max((value for _, values in groups for value in values if value is not None), default=0.0)
    if longest <= 0:
        return '<p class="none">no data</p>'
    label_width, bar_height, gap = 150, 9, 8
    parts, y = [], 4
    for label, values in groups:
        bars = [(name, colour, value) for name, colour, value in zip(names, colours, values, strict=True) if value]
        middle = y + len(bars) * bar_height / 2 + 3.5
        parts.append(f'<text class="tick" x="{label_width - 8}" y="{middle}" text-anchor="end">{escape(label)}</text>')
        for name, colour, value in bars:
            width = value / longest * (WIDTH - label_width - 50)
            title = f"<title>{escape(name)}: {number(value)} {escape(unit)}</title>"
            size = f'width="{width:.1f}" height="{bar_height - 1}"'
            parts.append(f'<rect x="{label_width}" y="{y}" {size} fill="{colour}">{title}</rect>')
            parts.append(f'<text class="tick" x="{label_width + width + 4:.1f}" y="{y + 8}">{round(value):,}</text>')
            y += bar_height
        y += gap
    for name, colour in zip(names, colours, strict=True):
        parts.append(f'<rect x="{label_width}" y="{y}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text class="tick" x="{label_width + 14}" y="{y + 9}">{escape(name)}</text>')
        y += 14
    return "".join([_open(f"{unit} of each", y), *parts, "</svg>"])


def standalone(svg: str) -> str:
    """The same plot as a file of its own: what a page's style sheet would say is inside, on a white ground."""
    css = "text{font-family:system-ui,DejaVu Sans,sans-serif;font-size:9.5px;fill:#56606c}"
    css += ".grid{stroke:#e6e9ed}polyline{fill:none;stroke-width:2}"
    head, _, rest = svg.partition(">")
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{css}</style>{ground}{rest}\n'


def cumulative(values: Sequence[float], max_points: int = 200) -> list[Point]:
    """(value, % of all that are at most it), thinned out."""
    ordered = sorted(values)
    step = max(1, len(ordered) // max_points)
    indices = sorted({*range(0, len(ordered), step), len(ordered) - 1}) if ordered else []
    return [(ordered[index], 100 * (index + 1) / len(ordered)) for index in indices]


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from `low` to at least `high`."""
    if high <= low:
        high = low + 1
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [low + step * index for index in range(math.ceil((high - low) / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, … around the range; powers of ten only where it is wide."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first <= 3 else (1,)
    found = [10.0**power * factor for power in range(first, last + 1) for factor in factors]
    below = max((tick for tick in found if tick <= low), default=found[0])
    above = min((tick for tick in found if tick >= high and tick > below), default=below * 10)
    return [tick for tick in found if below <= tick < above] + [above]


def number(value: float) -> str:
    """A number as a person writes it: 1234 -> 1,234; 12.3; 0.045."""
    if value == 0 or abs(value) >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2g}"


def _open(label: str, height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
