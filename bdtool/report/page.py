"""`ReportData` in, one HTML page out: no network, no other file."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from bdtool import words
from bdtool.errors import UsageError
from bdtool.report.data import ReportData
from export.files import write_output
from export.packages import install_command

if TYPE_CHECKING:
    import jinja2


def write_report(path: Path, data: ReportData) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        UsageError: the extra `report` is not installed.
    """
    write_output(path, render(data).encode(errors="replace"))  # "?" for what is no UTF-8 in names of files


def require_extra() -> None:
    """Raise UsageError where the extra `report` is not installed: better now than after minutes of measuring."""
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ModuleNotFoundError as exc:
        raise UsageError(
            f"the report needs {exc.name}, which is not installed; add it with: {install_command('report')}"
        ) from exc


def render(data: ReportData) -> str:
    """Return the page. Every text in it is escaped; a Content-Security-Policy forbids any request.

    Raises:
        UsageError: the extra `report` is not installed.
    """
    require_extra()
    from plotly.offline import get_plotlyjs

    from bdtool.report import charts

    drawn = [charts.latency_distribution(data), charts.latency_against_blocks(data)]
    drawn += [charts.block_usage(data), charts.part_costs(data)]
    if data.classes:
        drawn += [charts.accuracy_against_flops(data), charts.class_usage(data)]
    environment = _template_environment()
    return environment.get_template("page.html").render(
        data=data,
        charts={chart.name: chart for chart in drawn},
        words=words,
        style=_asset("page.css"),
        script=_asset("page.js"),
        plotly=get_plotlyjs(),
    )


@cache
def _template_environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("bdtool.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return resources.files("bdtool.report").joinpath("templates", name).read_text(encoding="utf-8")
