"""The command that compares two profiles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdtool.cli.command import Command
from bdtool.cli.options import EXISTING_FILE, FiniteRange, json_option
from bdtool.cli.output import emit, print_table, warn
from bdtool.words import counted, percent

if TYPE_CHECKING:
    from bdtool.profiling.compare import Change, Comparison

_DIGEST = re.compile("[0-9a-f]{64}")


@click.command("compare", cls=Command)
@click.argument("a", type=EXISTING_FILE, metavar="A.json")
@click.argument("b", type=EXISTING_FILE, metavar="B.json")
@click.option(
    "--max-slowdown",
    type=FiniteRange(min=0),
    default=0.05,
    show_default=True,
    help="How much slower, as a share, a median or a ratio to `full` may be in B before it is a regression.",
)
@json_option
def compare_cmd(a: Path, b: Path, max_slowdown: float, json_file: str | None) -> None:
    """Show two profiles side by side, and fail where B became slower than A.

    A regression is a median or a ratio to `full` that grew by more than the bound and beyond its spread over rounds;
    of two precisions only a median, as each has a `full` of its own. The exit status is then 1. Profiles of different
    machines, threads, batches or policies, or without a strategy in common, are not comparable: what differs is listed,
    there is no verdict, and the exit status is 1 as well. Weights, images and given keep bits are compared by their
    digests, not by their names. The exit status is 1, too, where one of them is of a run that `profile` found UNSTABLE:
    nothing was shown to be as fast as before. Measure that one again.

    \b
    Example:
      bdtool compare before.json after.json --max-slowdown 0.1
    """
    from bdtool.profiling.compare import compare_profiles, read_profile

    result = compare_profiles(read_profile(a), read_profile(b), max_slowdown=max_slowdown)
    if result.incomparable:
        names = ", ".join(result.incomparable)
        warn(f"NOT COMPARABLE: {a} and {b} differ in {names}; their figures answer different questions")
    for side, reasons in result.unstable.items():
        warn(
            f"UNSTABLE: the ratios of {a if side == 'a' else b} are not to be trusted ({'; '.join(reasons)}); profile "
            "again when nothing else runs"
        )
    for file, only in ((a, result.only_in_a), (b, result.only_in_b)):
        if only:
            warn(f"only {file} has {', '.join(only)}, which cannot be compared")
    data = {"files": {"a": str(a), "b": str(b)}, **result.to_json()}
    emit(data, json_file, lambda: _print_comparison(a, b, result))
    if not result.ok:
        raise click.exceptions.Exit(1)


def _print_comparison(a: Path, b: Path, result: Comparison) -> None:
    click.echo(f"A: {a}\nB: {b}")
    rows = [
        [name, figure, _number(change.a), _number(change.b), _relative(change), _verdict(result, name, figure)]
        for name, figures in result.strategies.items()
        for figure, change in figures.items()
    ]
    print_table(["strategy", "figure", "A", "B", "change", ""], rows, title="Figures")
    if result.differences:
        shown = [[name, _short(one), _short(other)] for name, (one, other) in result.differences.items()]
        print_table(["differs", "A", "B"], shown, title="What else is different")
    count = sum(map(len, result.regressions.values()))
    bound = f"more than {percent(result.max_slowdown)} slower and beyond the spread"
    if count:
        click.echo(f"\n{counted(count, 'regression')} ({bound})")
    elif result.incomparable:
        click.echo(f"\nno verdict: the profiles are not comparable ({', '.join(result.incomparable)})")
    elif result.unstable:
        names = " and ".join(str({"a": a, "b": b}[side]) for side in result.unstable)
        click.echo(f"\nno verdict: unstable run in {names}")
    else:
        click.echo(f"\nno regression ({bound})")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(value: object) -> str:
    """Return a digest by its beginning, other values whole."""
    text = str(value)
    return f"sha256 {text[:12]}..." if _DIGEST.fullmatch(text) else text


def _relative(change: Change) -> str:
    return "-" if change.relative is None else f"{100 * change.relative:+.1f} %"


def _verdict(result: Comparison, name: str, figure: str) -> str:
    return "REGRESSION" if figure in result.regressions[name] else ""
