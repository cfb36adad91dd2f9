"""python -m deploy.grafana.queries URL: asks a Prometheus every query of the dashboard; status 1 if one has no data.

`--gpu` asks those of dcgm-exporter too. Needs nothing but the standard library and the committed JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DASHBOARD = Path(__file__).parent / "dashboards" / "crossgate.json"
GPU_PREFIX = "DCGM_"


@dataclass(frozen=True)
class PanelQuery:
    panel: str
    legend: str
    expr: str

    @property
    def needs_gpu(self) -> bool:
        return GPU_PREFIX in self.expr


def panel_queries(dashboard: Path = DASHBOARD) -> Iterator[PanelQuery]:
    for panel in json.loads(dashboard.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            yield PanelQuery(panel["title"], target.get("legendFormat", ""), target["expr"])


def ask(url: str, query: PanelQuery, rate_interval: str) -> list[float]:
    """The values now, one a series; NaN is no data. Raises OSError if Prometheus refuses the query."""
    expr = query.expr.replace("$__rate_interval", rate_interval)
    address = f"{url.rstrip('/')}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
    with urllib.request.urlopen(address, timeout=10) as response:
        series = json.load(response)["data"]["result"]
    values = [float(one["value"][1]) for one in series]
    return [value for value in values if not math.isnan(value)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.grafana.queries", description=__doc__)
    parser.add_argument("url", help="of Prometheus, such as http://127.0.0.1:9090")
    parser.add_argument("--rate-interval", default="1m", help="what stands for $__rate_interval")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args(arguments)
    num_asked = num_empty = 0
    for query in panel_queries():
        if query.needs_gpu and not options.gpu:
            continue
        values = ask(options.url, query, options.rate_interval)
        num_asked += 1
        num_empty += not values
        told = ", ".join(f"{value:.6g}" for value in values[:4]) or "NO DATA"
        print(f"{query.panel + (f' · {query.legend}' if query.legend else ''):<58} {told}")
    print(f"{num_asked} queries, {num_empty} without data")
    return 1 if num_empty else 0


if __name__ == "__main__":
    sys.exit(main())
