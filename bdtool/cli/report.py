"""The command that writes a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdtool.cli.command import Command, command_line
from bdtool.cli.options import (
    BUNDLE,
    NEW_FILE,
    FiniteRange,
    data_option,
    place_options,
    policy_option,
    resize_option,
)
from bdtool.cli.output import progress, progress_of_share, warn
from bdtool.words import counted

if TYPE_CHECKING:
    from bdtool.data.batches import ImageSource
    from bdtool.profiling.result import Profile
    from bdtool.report.request import ReportRequest
    from bdtool.runtime.place import Place
    from export.bundle import Bundle


@click.command("report", cls=Command)
@click.argument("bundle", type=BUNDLE)
@data_option()
@click.option("-o", "--output", type=NEW_FILE, required=True, metavar="FILE.html", help="The page to write.")
@policy_option
@click.option(
    "--limit", type=click.IntRange(min=1), default=2000, show_default=True, help="Only N images, drawn with seed 0."
)
@click.option(
    "--duration",
    type=FiniteRange(min=0, min_open=True),
    default=3,
    show_default=True,
    help="Seconds measured, at least, for each strategy.",
)
@resize_option
@place_options()
def report_cmd(
    bundle: Path,
    data: str,
    output: Path,
    policy: str | None,
    limit: int,
    duration: float,
    resize: bool,
    place: Place,
) -> None:
    """Measure a BUNDLE and write one self-contained page: latency, accuracy, and the policies with pictures.

    The page loads nothing from the network. Without labels in the data the sections that need them are left out. Needs
    the extra `report`; `bdtool doctor` says what adds it.

    \b
    Example:
      bdtool report bundle --data cifar10:data -o report.html
    """
    from bdtool.data.sources import open_data
    from bdtool.profiling.profile import profile
    from bdtool.profiling.workload import Settings
    from bdtool.report.gather import PERCENTILES
    from bdtool.report.page import require_extra
    from bdtool.report.request import ReportRequest
    from export.bundle import Bundle

    require_extra()
    opened = Bundle.open(bundle)
    # so that the profile sees no other images than the walk
    source = open_data(data, network=opened.network, resize=resize, labels="optional").drawn(limit)
    request = ReportRequest(
        made_by=command_line(),
        bundle=bundle,
        data=data,
        output=output,
        policy=policy,
        limit=limit,
        duration_s=duration,
        resize=resize,
        place=place,
    )
    with progress_of_share("profiling") as on_progress:
        profiled = profile(
            opened,
            source,
            policy=policy,
            strategies=["chain"],
            settings=Settings(duration_s=duration, percentiles=PERCENTILES),
            place=place,
            on_progress=on_progress,
        )
    for message in profiled.warnings:
        warn(message)
    click.echo(write_page(profiled, opened, source, request))


def write_page(profiled: Profile, bundle: Bundle, source: ImageSource, request: ReportRequest) -> str:
    """Gather what the page shows beside a profile's figures and write it; return a line that says so."""
    from bdtool.report.classified import n_steps
    from bdtool.report.gather import gather_report
    from bdtool.report.page import write_report

    is_learned = profiled.policy.partition(":")[0] == "learned"
    with progress("classifying", n_steps(source, is_learned=is_learned)) as advance:
        gathered = gather_report(profiled, bundle, source, request, on_images=advance)
    write_report(request.output, gathered)
    size = request.output.stat().st_size / 1e6
    return f"{request.output}: {size:.1f} MB, {counted(gathered.n_images, 'image')}, policy {gathered.policy}"
