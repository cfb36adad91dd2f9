"""The committed dashboard is the generated one, and a person can use it."""

from __future__ import annotations

import itertools
import json
import re

from deploy.grafana.dashboard import OUTPUT, render
from deploy.grafana.panels import ROWS
from deploy.grafana.queries import panel_queries

COMMITTED = json.loads(OUTPUT.read_text(encoding="utf-8"))
PANELS = [panel for panel in COMMITTED["panels"] if panel["type"] != "row"]


def test_committed_json_is_what_the_script_writes():
    assert OUTPUT.read_text(encoding="utf-8") == render(), "run: python -m deploy.grafana.dashboard"


def test_every_panel_is_there_with_its_queries():
    assert [panel["title"] for panel in PANELS] == [panel.title for row in ROWS for panel in row.panels]
    for panel in PANELS:
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_ids_are_unique_and_nothing_overlaps():
    assert len({panel["id"] for panel in COMMITTED["panels"]}) == len(COMMITTED["panels"])

    def cells(panel):
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        columns = range(place["x"], place["x"] + place["w"])
        return set(itertools.product(columns, range(place["y"], place["y"] + place["h"])))

    for one, other in itertools.combinations(COMMITTED["panels"], 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])


def test_panels_with_several_queries_or_series_have_legends():
    for panel in PANELS:
        if panel["type"] == "timeseries":
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def test_only_gpu_panels_need_a_gpu():
    gpu_titles = {panel.title for row in ROWS if row.gpu for panel in row.panels}
    assert {query.panel for query in panel_queries() if query.needs_gpu} == gpu_titles
    assert len(gpu_titles) == 4


def test_counters_are_only_used_as_rates():
    for query in panel_queries():
        for counter in re.findall(r"\w+_total\b", query.expr):
            assert re.search(rf"rate\({counter}[^)]*\[\$__rate_interval\]\)", query.expr), query
