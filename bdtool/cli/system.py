"""Commands about this installation: doctor and demo."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from bdtool.cli.command import Command
from bdtool.cli.options import NEW_DIRECTORY, json_option
from bdtool.cli.output import emit


@click.command("doctor", cls=Command)
@json_option
def doctor_cmd(json_file: str | None) -> None:
    """Show versions, providers, driver and GPU: what works here, and the command that adds what does not.

    \b
    Example:
      bdtool doctor
    """
    from bdtool.doctor.examination import examine, render

    findings = examine()
    emit({"findings": [asdict(finding) for finding in findings]}, json_file, lambda: click.echo(render(findings)))
    if any(finding.status == "problem" for finding in findings):
        raise click.exceptions.Exit(1)


@click.command("demo", cls=Command)
@click.option(
    "-o",
    "--output",
    type=NEW_DIRECTORY,
    default=Path("demo-output"),
    show_default=True,
    help="Directory for the model, the bundle and the images; what an earlier demo left there is replaced.",
)
def demo_cmd(output: Path) -> None:
    """Run the whole pipeline on the shipped BlockDrop network, ending with a comparison table and a report.

    Exports, builds and verifies r32-cifar10, then classifies, profiles and reports on pictures drawn for the purpose.

    \b
    Example:
      bdtool demo
    """
    from bdtool.demo import run_demo

    run_demo(output)
