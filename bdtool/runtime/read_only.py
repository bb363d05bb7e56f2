"""What a read-only bundle cannot keep: it serves as long as it is needed, and is named in a warning."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path

logger = logging.getLogger(__name__)


class _Command:
    """What one command could not keep, by bundle, and where its engines are meanwhile."""

    def __init__(self, stack: ExitStack) -> None:
        self.not_kept: dict[Path, list[str]] = {}
        self.engines: dict[Path, Path] = {}
        self.stack = stack


_COMMAND: ContextVar[_Command | None] = ContextVar("command", default=None)


def is_read_only(bundle: Path) -> bool:
    """Whether nothing can be added to the bundle, or to the engines in it."""
    return not all(os.access(place, os.W_OK) for place in (bundle, bundle / "engines") if place.exists())


@contextmanager
def one_warning(warn: Callable[[str], None]) -> Iterator[None]:
    """Within, engines for a read-only bundle are built once, and one warning at the end names all that is not kept.

    Outside of it each opening builds its own, and each thing has a warning of its own in the log.
    """
    with ExitStack() as stack:
        command = _Command(stack)
        token = _COMMAND.set(command)
        try:
            yield
        finally:
            _COMMAND.reset(token)
            for bundle, things in command.not_kept.items():
                warn(_warning(bundle, things))


def temporary_engines(bundle: Path, stack: ExitStack) -> Path:
    """Return a directory for engines that a read-only bundle lacks: until the command ends, or else `stack`."""
    command = _COMMAND.get()
    if command is None:
        return _temporary_directory(stack)
    if bundle not in command.engines:
        command.engines[bundle] = _temporary_directory(command.stack)
    return command.engines[bundle]


def tell_not_kept(bundle: Path, what: str) -> None:
    """Say that `what` was not kept in a read-only bundle: at the end of the command, else now, in the log."""
    command = _COMMAND.get()
    if command is None:
        logger.warning("%s", _warning(bundle, [what]))
    elif what not in (things := command.not_kept.setdefault(bundle, [])):
        things.append(what)


def _temporary_directory(stack: ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bdtool-engines-")))


def _warning(bundle: Path, things: list[str]) -> str:
    return (
        f"{bundle} is read-only and does not keep {' and '.join(things)}: for this run only. Make it writable, or copy "
        "it, to keep them"
    )
