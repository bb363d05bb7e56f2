"""Results on stdout, as text or JSON; progress on stderr, silent where that is not a terminal."""

from __future__ import annotations

import errno
import json
import math
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click


def emit(result: Any, json_file: str | None, text: Callable[[], None]) -> None:
    """Print a result: `text()` prints it for people; with `--json -` stdout holds the JSON alone.

    A JSON file is written whole or not at all; the text is then printed as well. Numbers that are not finite become
    null, since JSON has none.
    """
    result = _with_nulls(result)
    if json_file == "-":
        with _naming_stdout():
            click.echo(json.dumps(result, indent=2, allow_nan=False))
        return
    with _naming_stdout():
        text()  # first: what a full disk keeps from the file is then still on the terminal
    if json_file is not None:
        from export.files import bytes_from_json, write_output

        try:
            write_output(Path(json_file), bytes_from_json(result))
        except OSError as exc:
            raise click.ClickException(f"{json_file}: cannot be written ({exc.strerror or exc})") from exc


@contextmanager
def _naming_stdout() -> Iterator[None]:
    """Name stdout in errors of writing to it, which say no file: of a full disk that it was sent to, for instance."""
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.EPIPE:
            raise  # click ends quietly when `head` has seen enough
        raise click.ClickException(f"stdout cannot be written to ({exc.strerror or exc}); send it elsewhere") from exc


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, left: Container[int] = (0,)
) -> None:
    """Print rows below their column names, as wide as they need: the columns `left` to the left, numbers right."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    if title:
        click.echo(f"\n{title}")
    for row in (columns, *rows):
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def warn(message: str) -> None:
    click.echo(f"warning: {message}", err=True)


@contextmanager
def progress(description: str, total: float | None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr; the yielded function takes what was done since the last call (default 1)."""
    if sys.stderr is None or not sys.stderr.isatty():  # a daemon may have closed it
        yield lambda advance=1, name="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance_bar(advance: float = 1, name: str = "") -> None:
            bar.update(task, advance=advance, description=f"{description} {name}".rstrip())

        yield advance_bar


@contextmanager
def progress_of_share(description: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr; the yielded function takes the share of the whole done by now, and a text."""
    done = 0.0
    with progress(description, 1) as advance:

        def on_share(share: float, text: str = "") -> None:
            nonlocal done
            advance(share - done, text)
            done = share

        yield on_share


@contextmanager
def tell_when_stopped(finished: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C say in one line what is finished, as `finished()` tells then; nothing where that is empty."""
    try:
        yield
    except KeyboardInterrupt as exc:
        click.echo(err=True)  # the terminal shows ^C
        if line := finished():
            click.echo(line, err=True)
        raise click.Abort from exc


def mega(flops: float) -> str:
    """FLOPs with a unit a reader can compare: MFLOPs below 1e9, GFLOPs above."""
    return f"{flops / 1e9:.3f} G" if flops >= 1e9 else f"{flops / 1e6:.2f} M"
