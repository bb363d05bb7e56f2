"""Results on stdout, as text or JSON; progress on stderr: a bar on a terminal, else a dated line now and then."""

from __future__ import annotations

import errno
import json
import math
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from bdtool.words import percent

_LOG = "bdtool.progress"  # in click's `meta`
_QUIET_S = 30.0  # seconds without a line: those before the first, and between two


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
        from export.files import advice_on, bytes_from_json, write_output

        try:
            write_output(Path(json_file), bytes_from_json(result))
        except OSError as exc:
            advice = f"{advice_on(exc)} and run the same command again"
            raise click.ClickException(f"{json_file}: cannot be written ({exc.strerror or exc}); {advice}") from exc


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


def say_dated(message: str) -> None:
    """Print a line on stderr that says when it was."""
    click.echo(f"{time.strftime('%H:%M:%S')} {message}", err=True)


class ProgressLog:
    """What a command says of its progress where stderr is no terminal: dated lines, for whoever reads the log.

    Nothing in the first 30 s, so that short commands stay silent; then a line at the latest 30 s after the one before,
    as far as news come in, and one for each step of work that begins.

    Args:
        quiet_s: instead of the 30 s.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, quiet_s: float = _QUIET_S) -> None:
        self._clock, self._quiet_s, self._due, self._speaks = clock, quiet_s, clock() + quiet_s, False
        self._steps: set[str] = set()

    def say(self, step: str, share: float, detail: str = "") -> None:
        """Say that `share` of a step is done, 0 to 1, where it is time to."""
        begins = step not in self._steps
        self._steps.add(step)
        now = self._clock()
        if now < self._due and not (begins and self._speaks):
            return
        self._due, self._speaks = now + self._quiet_s, True
        with suppress(OSError):  # nobody reads the log any more, which is no reason to end the work
            say_dated(f"{step} {detail}".rstrip() + f", {percent(share, 0)}")


def _log() -> ProgressLog:
    """Return the log of the command that runs: its steps share one."""
    context = click.get_current_context(silent=True)
    log: ProgressLog = ProgressLog() if context is None else context.meta.setdefault(_LOG, ProgressLog())
    return log


def is_on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # a daemon may have closed it


@contextmanager
def progress(description: str, total: float, log: ProgressLog | None = None) -> Iterator[Callable[..., None]]:
    """Show progress on stderr; the yielded function takes what was done since the last call (default 1), and its name.

    A bar on a terminal, else lines of `log`, or of the command's own.
    """
    if is_on_terminal():
        with _bar(description, total) as advance_bar:
            yield advance_bar
        return
    log, done = log or _log(), 0.0
    log.say(description, done)

    def advance(advance: float = 1, name: str = "") -> None:
        nonlocal done
        done += advance
        log.say(description, done / total, name)

    yield advance


@contextmanager
def _bar(description: str, total: float | None) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance_bar(advance: float = 1, name: str = "") -> None:
            bar.update(task, advance=advance, description=f"{description} {name}".rstrip())

        yield advance_bar


@contextmanager
def progress_of_share(description: str, log: ProgressLog | None = None) -> Iterator[Callable[..., None]]:
    """Show progress on stderr; the yielded function takes the share of the whole done by now, and a text."""
    done = 0.0
    with progress(description, 1, log) as advance:

        def on_share(share: float, text: str = "") -> None:
            nonlocal done
            advance(share - done, text)
            done = share

        yield on_share


@contextmanager
def progress_of_steps(description: str) -> Iterator[Callable[[str, float], None]]:
    """Show progress on stderr; the yielded function takes the name of a step, and the share of it done by now."""
    if is_on_terminal():
        with _bar(description, None) as advance:
            yield lambda step, share: advance(0, f"{step} {percent(share, 0)}")
        return
    yield _log().say


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
