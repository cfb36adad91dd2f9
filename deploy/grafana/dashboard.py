"""python -m deploy.grafana.dashboard: writes dashboards/crossgate.json from `panels`, with Grafana's own SDK.

The JSON is committed, so that nobody needs the SDK to deploy; a test keeps the two the same.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panels import ROWS, Kind, Panel

OUTPUT = Path(__file__).parent / "dashboards" / "crossgate.json"
HEIGHTS = {Kind.STAT: 4, Kind.LINES: 8, Kind.STACKED: 8}
COLUMNS = 24
PROMETHEUS = models.DataSourceRef(type_val="prometheus", uid="${datasource}")


def main() -> int:
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(render(), encoding="utf-8")
    print(OUTPUT)
    return 0


def render() -> str:
    board = (
        dashboard.Dashboard("Crossgate")
        .uid("crossgate")
        .description("A picture goes in, an answer streams out: what clients feel, and why.")
        .tags(["crossgate"])
        .time("now-30m", "now")
        .refresh("10s")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    ids = itertools.count(1)
    y = 0
    for row in ROWS:
        board.with_row(dashboard.Row(row.title).id(next(ids)).grid_pos(models.GridPos(h=1, w=COLUMNS, x=0, y=y)))
        y += 1
        x = height = 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y = 0, y + height
            height = HEIGHTS[panel.kind]
            place = models.GridPos(h=height, w=panel.width, x=x, y=y)
            board.with_panel(build(panel).id(next(ids)).grid_pos(place))
            x += panel.width
        y += height
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def build(panel: Panel) -> stat.Panel | timeseries.Panel:
    built = _stat(panel) if panel.kind is Kind.STAT else _lines(panel)
    built.title(panel.title).unit(panel.unit).datasource(PROMETHEUS)
    if panel.description:
        built.description(panel.description)
    for ref_id, query in zip("ABCDEF", panel.queries, strict=False):
        target = prometheus.Dataquery().expr(query.expr).ref_id(ref_id).datasource(PROMETHEUS).range()
        if query.legend:
            target.legend_format(query.legend)
        built.with_target(target)
    return built


def _stat(panel: Panel) -> stat.Panel:
    steps = [models.Threshold(None, "green"), *(models.Threshold(value, colour) for value, colour in panel.limits)]
    return (
        stat.Panel()
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(common_models.BigValueGraphMode.AREA)
        .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    )


def _lines(panel: Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True).calcs(["lastNotNull", "max"])
    legend.display_mode(common_models.LegendDisplayMode.TABLE).placement(common_models.LegendPlacement.BOTTOM)
    tooltip = common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI)
    built = timeseries.Panel().min(0).line_width(2).fill_opacity(8).legend(legend).tooltip(tooltip)
    built.show_points(common_models.VisibilityMode.NEVER)
    if panel.top is not None:
        built.max(panel.top)
    if panel.kind is Kind.STACKED:
        built.fill_opacity(30).stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
    return built


if __name__ == "__main__":
    sys.exit(main())
