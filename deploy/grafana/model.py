"""Grafana's dashboard model (schema version 39, Grafana 10 and newer), as far as it is used here:
panels that place themselves, and what is alike in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

#: Columns of Grafana's grid.
COLUMNS = 24

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and what its series are called.

    Args:
        band: fills the area down to the series before it, as between two bounds.
    """

    expr: str
    legend: str = ""
    band: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. Units are Grafana's: `s`, `bytes`, `percentunit`, `short`, `ops` (a second)."""

    title: str
    description: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: Literal["timeseries", "stat", "heatmap", "table"] = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    least: float | None = 0.0
    most: float | None = None
    #: A line across the panel; a stat turns red beyond it.
    limit: float | None = None
    #: Whether less than the limit is what is bad.
    limit_is_least: bool = False
    #: One panel for each value of this variable.
    repeat: str | None = None
    #: Labels that a table shows, in this order.
    columns: Sequence[str] = ()

    def json(self, number: int, x: int, y: int) -> Json:
        """Grafana's form, at column `x` of line `y`."""
        made: Json = {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "targets": [self._target(at, query) for at, query in enumerate(self.queries)],
            "fieldConfig": {"defaults": self._defaults(), "overrides": self._bands()},
            "options": _OPTIONS[self.kind](self.unit),
        }
        if self.repeat is not None:
            made |= {"repeat": self.repeat, "repeatDirection": "h", "maxPerRow": 3}
        if self.kind == "table":
            made["transformations"] = [_only(self.columns)]
        return made

    def _target(self, at: int, query: Query) -> Json:
        instant = self.kind == "table"
        formats = {"heatmap": "heatmap", "table": "table"}
        return {
            "refId": chr(ord("A") + at),
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": query.expr,
            "legendFormat": query.legend or "__auto",
            "format": formats.get(self.kind, "time_series"),
            "instant": instant,
            "range": not instant,
        }

    def _defaults(self) -> Json:
        steps: list[Json] = [{"color": "green", "value": None}]
        if self.limit is not None and self.limit_is_least:
            steps = [{"color": "red", "value": None}, {"color": "green", "value": self.limit}]
        elif self.limit is not None:
            steps.append({"color": "red", "value": self.limit})
        defaults: Json = {
            "unit": self.unit,
            "thresholds": {"mode": "absolute", "steps": steps},
            "color": {"mode": "thresholds" if self.kind == "stat" else "palette-classic"},
        }
        if self.least is not None:
            defaults["min"] = self.least
        if self.most is not None:
            defaults["max"] = self.most
        if self.kind == "timeseries":
            defaults["custom"] = {
                "lineWidth": 1,
                "fillOpacity": 30 if self.stacked else 5,
                "showPoints": "never",
                "spanNulls": False,
                "stacking": {"mode": "normal" if self.stacked else "none"},
                "thresholdsStyle": {"mode": "off" if self.limit is None else "dashed"},
            }
        return defaults

    def _bands(self) -> list[Json]:
        """A bound has no line of its own, and the area down to the one before is filled."""
        return [
            {
                "matcher": {"id": "byFrameRefID", "options": chr(ord("A") + at)},
                "properties": [
                    {"id": "custom.lineWidth", "value": 0},
                    {"id": "custom.fillBelowTo", "value": self.queries[at - 1].legend},
                    {"id": "custom.fillOpacity", "value": 15},
                ],
            }
            for at, query in enumerate(self.queries)
            if query.band
        ]


def _only(columns: Sequence[str]) -> Json:
    """Of a table: these columns, in this order."""
    return {
        "id": "filterFieldsByName",
        "options": {"include": {"names": list(columns)}},
    }


_LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True}
_OPTIONS = {
    "timeseries": lambda unit: {
        "legend": _LEGEND,
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": lambda unit: {
        "colorMode": "value",
        "graphMode": "area",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
    },
    "heatmap": lambda unit: {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5},
        "filterValues": {"le": 1e-9},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "yHistogram": True},
        "yAxis": {"unit": unit, "axisPlacement": "left"},
    },
    "table": lambda unit: {"showHeader": True, "cellHeight": "sm"},
}


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top of the dashboard: the values of a label, several at a time.

    Args:
        values: `label_values(...)`.
    """

    name: str
    values: str

    def json(self) -> Json:
        """Grafana's form. All is any value, so that it holds where there is no such label."""
        return {
            "type": "query",
            "name": self.name,
            "label": self.name.replace("_", " "),
            "datasource": DATASOURCE,
            "definition": self.values,
            "query": {"query": self.values, "refId": "variable"},
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "sort": 1,
            "current": {"text": "All", "value": "$__all"},
        }


@dataclass(frozen=True, slots=True)
class Annotation:
    """Marks in all panels, at each time at which `expr` has a value."""

    name: str
    expr: str
    title: str
    colour: str

    def json(self) -> Json:
        """Grafana's form; looks every 30 s."""
        return {
            "name": self.name,
            "datasource": DATASOURCE,
            "enable": True,
            "hide": False,
            "expr": self.expr,
            "step": "30s",
            "titleFormat": self.title,
            "iconColor": self.colour,
            "useValueForTime": False,
        }


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A dashboard."""

    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    variables: Sequence[Variable] = ()
    annotations: Sequence[Annotation] = ()
    tags: Sequence[str] = field(default=("streamrec",))

    def json(self) -> Json:
        """What is imported into Grafana, or provisioned as a file."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": list(self.tags),
            "schemaVersion": 39,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "timezone": "browser",
            "refresh": "30s",
            "time": {"from": "now-3h", "to": "now"},
            "links": [
                {
                    "type": "dashboards",
                    "title": "streamrec",
                    "tags": ["streamrec"],
                    "asDropdown": False,
                    "includeVars": True,
                    "keepTime": True,
                }
            ],
            "templating": {
                "list": [
                    {
                        "type": "datasource",
                        "name": "datasource",
                        "label": "data source",
                        "query": "prometheus",
                        "current": {},
                    },
                    *(variable.json() for variable in self.variables),
                ]
            },
            "annotations": {"list": [annotation.json() for annotation in self.annotations]},
            "panels": self._panels(),
        }

    def _panels(self) -> list[Json]:
        """Rows one below the other; in a row panels from left to right, as many as fit."""
        placed: list[Json] = []
        y = 0
        for row in self.rows:
            placed.append({
                "id": len(placed) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
                "panels": [],
            })  # fmt: skip
            y, x, tallest = y + 1, 0, 0
            for panel in row.panels:
                if x + panel.width > COLUMNS:
                    y, x, tallest = y + tallest, 0, 0
                placed.append(panel.json(len(placed) + 1, x, y))
                x, tallest = x + panel.width, max(tallest, panel.height)
            y += tallest
        return placed
