"""The command line. A command parses, calls one function and prints."""

from __future__ import annotations

import codecs
import errno
import io
import logging
import os
import sys
from typing import Any

import click

from bdtool.cli import build, bundles, calibrate, compare, inference, inspect, models, report, system, train
from bdtool.cli.output import warn
from bdtool.errors import BdtoolError
from bdtool.runtime.read_only import one_warning

logger = logging.getLogger(__name__)
_PRINTABLE = "bdtool.printable"  # how stdout encodes
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SPARED = ("torch", "torchvision", "onnxscript")  # where bundles are only run, they may be left out


class _WrongUsage(click.ClickException):
    """Exit status 2, without the usage lines that click puts before its own errors."""

    exit_code = 2


class _Group(click.Group):
    """Turns expected errors into one line on stderr, so that commands hold no try blocks."""

    def invoke(self, context: click.Context) -> Any:
        try:
            with one_warning(warn):
                return super().invoke(context)
        except BdtoolError as exc:
            raise _failure(exc) from exc
        except ModuleNotFoundError as exc:
            if exc.name not in _SPARED:
                raise
            logger.info("where it happened:", exc_info=True)
            raise click.ClickException(
                f"this needs {exc.name}, which is not installed; add it with: pip install {exc.name}"
            ) from exc
        except OSError as exc:  # a full disk, a directory without permission: the user's to mend, not a bug
            if exc.errno == errno.EPIPE:
                raise  # click ends quietly when `head` has seen enough
            logger.info("where it happened:", exc_info=True)
            raise click.ClickException(_problem(exc)) from exc


class _Lines(logging.Formatter):
    """Log lines that begin as the commands' own warnings do, with "warning:", not "WARNING:"."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def _show_version(context: click.Context) -> None:
    from bdtool.version import version

    click.echo(f"bdtool {version()}")
    context.exit()


def _problem(error: OSError) -> str:
    if not error.filename and _is_without_directory():
        return "the current directory was deleted, perhaps made anew; change to one that is there (cd)"
    place = f"{error.filename}: " if error.filename else ""
    advice = "; make room and run the same command again" if error.errno in _FULL else ""
    return f"{place}{error.strerror or error}{advice}"


def _is_without_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return True
    return False


def _printable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Let names of files that are no UTF-8 go out as they are, and escape what else stdout's encoding lacks: a label in
    another script, or half a character in a manifest."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError as exc:
        return codecs.lookup_error("backslashreplace")(exc)


def _failure(error: BdtoolError) -> click.ClickException:
    return (_WrongUsage if error.exit_code == 2 else click.ClickException)(str(error))


codecs.register_error(_PRINTABLE, _printable)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=lambda context, option, asked: _show_version(context) if asked else None,
    help="Show the version and exit.",
)
@click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is being done.")
def main(verbose: bool) -> None:
    """Deploy BlockDrop networks: one policy engine plus one engine per residual block, run only where kept.

    \b
    Example:
      bdtool import resnet32.th --arch resnet32 -o model.safetensors
      bdtool export model.safetensors -o bundle
      bdtool build bundle
      bdtool run bundle photo.png
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_PRINTABLE)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logging.basicConfig(handlers=[handler], level=logging.INFO if verbose else logging.WARNING)


for command in (
    models.import_cmd,
    train.train_cmd,
    bundles.export_cmd,
    build.build_cmd,
    bundles.verify_cmd,
    bundles.pack_cmd,
    calibrate.calibrate_cmd,
    build.fuse_cmd,
    inference.run_cmd,
    inference.evaluate_cmd,
    inference.profile_cmd,
    compare.compare_cmd,
    report.report_cmd,
    inspect.inspect_cmd,
    models.models_cmd,
    system.doctor_cmd,
    system.demo_cmd,
):
    main.add_command(command)
