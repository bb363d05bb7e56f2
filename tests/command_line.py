"""What the program would make of a command line, without running it."""

from collections.abc import Iterable

import click

from bdtool.cli import main


def command_of(words: Iterable[str]) -> tuple[click.Command, click.Context, list[str]]:
    """Return the command that `words` name, the context of the groups above it, and its own words."""
    rest = list(words)
    command: click.Command = main
    # Below `main`, as in the program: click keeps the first help option that a command makes, and only `main` says -h.
    context = click.Context(main, info_name="bdtool", **main.context_settings)
    while isinstance(command, click.Group):
        name, *rest = rest
        command = command.commands[name]
        if isinstance(command, click.Group):
            context = click.Context(command, parent=context, info_name=name)
    return command, context, rest


def parse(words: Iterable[str]) -> click.Context:
    """Let click read a command as the program would; its parameters are the result's `params`.

    Raises `click.UsageError` as the program would.
    """
    command, context, rest = command_of(words)
    return command.make_context(command.name, rest, parent=context)
