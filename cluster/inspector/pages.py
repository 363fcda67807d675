"""Renders the pages. Every text passes `escaped`; only charts, style and script are ours."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib import resources

from jinja2 import Environment
from markupsafe import Markup

from cluster.inspector.charts import Chart, Mark, Series, number, outermost
from cluster.inspector.detail import Detail
from cluster.inspector.queries import Query
from cluster.reports.html_page import page_environment
from cluster.run.display import duration, facts

REFRESH_S = 5
MOST_STEPS = 200  # stop states in a chart
_SHOWN = 400  # characters of a rationale, where it stands among others


def _asset(name: str) -> Markup:
    return Markup((resources.files("cluster.inspector") / "templates" / name).read_text("utf-8"))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE, _SCRIPT = _asset("style.css"), _asset("page.js")
# Nothing but this very style and this very script, and nothing from anywhere else.
POLICY = (
    f"default-src 'none'; style-src {_hash(_STYLE)}; script-src {_hash(_SCRIPT)}; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def environment_of(run: str) -> Environment:
    """The templates, with all that every page of this run needs."""
    environment = page_environment("cluster.inspector")
    environment.filters.update(nats=nats, ago=ago, number=number, charts=prefix_charts)
    environment.tests["missing"] = lambda value: value is None
    environment.globals.update(
        run=run,
        facts=facts,
        style=_STYLE,
        script=_SCRIPT,
        refresh=REFRESH_S,
        shown=_SHOWN,
        most_steps=MOST_STEPS,
        query_of=Query,
    )
    return environment


def prefix_charts(detail: Detail) -> Mapping[str, Markup]:
    """The four quantities of a trajectory's prefixes, by their caption."""
    prefixes = [prefix for prefix, _ in detail.steps]
    minus_log_z = None if math.isnan(detail.log_z) else -detail.log_z
    phi = "potential φ, nats; dashed: −log Z"
    columns: Sequence[tuple[str, list[float | None], Mark, float | None]] = (
        ("log R, nats", [p.log_reward for p in prefixes], "dots", None),
        ("log q(stop), nats", [p.log_q_stop for p in prefixes], "dots", None),
        (phi, [p.potential for p in prefixes], "dots", minus_log_z),
        ("SubTB residual, nats", [p.residual for p in prefixes], "bars", None),
    )
    charts = {}
    for caption, values, kind, level in columns:
        pairs = zip(prefixes, values, strict=True)
        known = [(prefix.length, y) for prefix, y in pairs if y is not None]
        points = list(outermost(known, at_most=MOST_STEPS))
        if points:
            notes = [f"after {t} tokens: {number(y)}" for t, y in points]
            charts[caption] = Chart(
                title=f"{caption}, by tokens of the rationale",
                series=[Series(points, kind, notes)],
                level=level,
                bands=detail.tool_spans,
                counted=detail.row.num_tokens,
            ).svg()
    return charts


def nats(value: float | None) -> str:
    """A log-probability or log-reward; empty where there is none."""
    if value is None or math.isnan(value):
        return "" if value is None else "unknown"
    return f"{value:.3f}".replace("-", "−")


def ago(unix_s: float, now: float) -> str:
    return f"{duration(max(0.0, now - unix_s))} ago"
