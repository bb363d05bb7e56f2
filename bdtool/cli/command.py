"""A command that never writes over what it reads."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import click

from bdtool.cli.options import BundlePath, ModelPath, NewDirectory, NewFile, PathInText

_WORDS = "bdtool.words"  # of the command line, in click's `meta`


def command_line() -> str:
    """Return the command that runs as it was typed, without bdtool's own options, to be typed again."""
    words: tuple[str, ...] = click.get_current_context().meta[_WORDS]
    return shlex.join(["bdtool", *words])


class Command(click.Command):
    """Refuses, before anything is done, to write what is given to be read, under whatever name, or one place twice."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.meta[_WORDS] = (context.info_name, *args)  # parsing takes them out of the list
        return super().parse_args(context, args)

    def invoke(self, context: click.Context) -> Any:
        targets = [(param, path) for param in self.params for path in _targets(param, context)]
        for (first, place), (second, target) in combinations(targets, 2):
            if _is_same(place, target):
                names = f"{_name(first, context)} and {_name(second, context)}"
                _refuse(f"{target} is given twice: as {names}; choose another name for one of them", second, context)
        for param, target in targets:
            self._refuse_overwriting(context, param, target)
        return super().invoke(context)

    def _refuse_overwriting(self, context: click.Context, param: click.Parameter, target: Path) -> None:
        for other in self.params:
            for source in _sources(other, context):
                if problem := _problem(target, source, other, _name(other, context)):
                    _refuse(problem, param, context)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


def _targets(param: click.Parameter, context: click.Context) -> Iterator[Path]:
    """Yield what a parameter names to be written; not stdout nor a device, which keep nothing to lose."""
    value = context.params.get(param.name or "")
    if isinstance(param.type, NewFile | NewDirectory) and value is not None and str(value) != "-":
        path = Path(value)
        if not path.exists() or path.is_file() or path.is_dir():
            yield path


def _sources(param: click.Parameter, context: click.Context) -> Iterator[Path]:
    """Yield what a parameter names to be read, where it is there."""
    value = context.params.get(param.name or "")
    for one in value if isinstance(value, tuple) else (value,):
        path = None
        if isinstance(param.type, PathInText):
            path = param.type.path_of(one) if one is not None else None
        elif isinstance(param.type, click.Path) and not isinstance(param.type, NewFile | NewDirectory):
            path = one
        if path is not None and os.path.exists(path):
            yield Path(path)


def _problem(target: Path, source: Path, param: click.Parameter, name: str) -> str | None:
    """Say what a file or directory to write would do to what is read; None: nothing."""
    if not source.is_dir():
        same = target.is_file() and target.samefile(source)
        return f"{target} is also given as {name}, and would be overwritten; choose another name" if same else None
    if not _is_below(target, source):
        return None
    if isinstance(param.type, BundlePath | ModelPath):  # of those the directories are bundles
        return f"{target} lies in {source}, given as {name}, which holds its own files alone; choose another place"
    if target.is_file():
        return f"{target} lies in {source}, given as {name}, and would be overwritten; choose another name"
    return None


def _is_same(first: Path, second: Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)  # not Path.resolve, which raises on links in a circle


def _is_below(target: Path, directory: Path) -> bool:
    """Say whether a place lies in a directory: itself or, where it is a link, what that leads to."""
    places = (Path(os.path.realpath(target)), Path(os.path.realpath(target.parent), target.name))
    return any(place.is_relative_to(os.path.realpath(directory)) for place in places)


def _name(param: click.Parameter, context: click.Context) -> str:
    return param.opts[0] if isinstance(param, click.Option) else param.make_metavar(context)


def _refuse(problem: str, param: click.Parameter, context: click.Context) -> None:
    raise click.BadParameter(problem, ctx=context, param=param)
