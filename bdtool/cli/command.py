"""A command that never writes over what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from bdtool.cli.options import NewFile


class Command(click.Command):
    """Refuses, before anything is done, a file to write that is given as one to read, under whatever name."""

    def invoke(self, context: click.Context) -> Any:
        for param in self.params:
            target = context.params.get(param.name or "")
            if isinstance(param.type, NewFile) and target is not None and os.path.isfile(target):
                self._refuse_overwriting(context, param, Path(target))
        return super().invoke(context)

    def _refuse_overwriting(self, context: click.Context, param: click.Parameter, target: Path) -> None:
        for other in self.params:
            for given in _paths(context.params.get(other.name or "")):
                # os.path, since a policy of many bits is too long for a file's name
                if other is not param and os.path.exists(given) and target.samefile(given):
                    name = other.opts[0] if isinstance(other, click.Option) else other.make_metavar(context)
                    raise click.BadParameter(
                        f"{target} is also given as {name}, and would be overwritten; choose another name",
                        ctx=context,
                        param=param,
                    )


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


def _paths(value: Any) -> Iterator[Path]:
    """Yield the paths that a parameter's value may be: DATA and POLICY are texts, and images are several."""
    if isinstance(value, str | Path) and str(value):
        yield Path(value)
    elif isinstance(value, tuple):
        for one in value:
            yield from _paths(one)
