"""What `bdtool train` shows of a run: progress, a line for each epoch, event files, and the result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdtool.cli.output import ProgressLog, progress_of_share, say_dated
from bdtool.words import counted, percent
from export.packages import install_command

if TYPE_CHECKING:
    from bdtool.training.stages import Trained
    from bdtool.training.trainer import Epoch, Report


_QUIET_S = 300


@contextmanager
def show(*, enabled: bool, rewarded: bool) -> Iterator[tuple[Callable[[Report], None], Callable[[float, str], None]]]:
    """Show a progress bar for steps, with accuracy, mean blocks, reward and the time left, or for named parts.

    `rewarded` says whether there is a policy network that the reward is of.

    The beginning of each part is a line as well, which a log keeps, as each epoch is one. Where there is no terminal
    there is one every 5 minutes, too: epochs can take hours.
    """
    if not enabled:
        yield lambda report: None, lambda share, text: None
        return
    with progress_of_share("training", ProgressLog(quiet_s=_QUIET_S)) as on_progress:

        def on_step(report: Report) -> None:
            figures = [f"accuracy {percent(report.accuracy)}", f"blocks {report.blocks_mean:.2f}"]
            figures += [f"reward {report.reward:.3f}"] if rewarded else []
            on_progress(report.step / report.n_steps, ", ".join(filter(None, [*figures, report.note])))

        part = ""

        def on_part(share: float, name: str) -> None:
            nonlocal part
            if name != part:
                part = name
                say_dated(name)
            on_progress(share, name)

        yield on_step, on_part


@contextmanager
def logs(directory: Path | None, *, rewarded: bool) -> Iterator[Callable[[Epoch], None]]:
    """Print each epoch's figures, and write them as TensorBoard events where a directory is given."""
    if directory is None:
        yield lambda epoch: _print_epoch(epoch, rewarded=rewarded)
        return
    names = ["loss", "accuracy", "blocks_mean", *(["reward"] if rewarded else []), "seconds"]
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as exc:
        raise click.UsageError(f"--tensorboard needs the package tensorboard: {install_command('train')}") from exc
    if directory.exists() and not os.access(directory, os.W_OK):  # else an epoch passes before it shows
        raise click.UsageError(f"--tensorboard: {directory} cannot be written to. Choose another directory")
    writer: SummaryWriter | None = None
    with ExitStack() as opened:

        def log(epoch: Epoch) -> None:
            nonlocal writer
            _print_epoch(epoch, rewarded=rewarded)
            if writer is None:  # not before: what is refused leaves no event file without events
                writer = opened.enter_context(SummaryWriter(os.fspath(directory)))
            for name in names:
                writer.add_scalar(f"train/{name}", getattr(epoch, name), epoch.epoch)
            for name, value in epoch.validation.items():
                writer.add_scalar(f"val/{name}", value, epoch.epoch)
            writer.flush()

        yield log


def _print_epoch(epoch: Epoch, *, rewarded: bool) -> None:
    figures = [
        f"loss {epoch.loss:.4f}",
        f"accuracy {percent(epoch.accuracy, 2)}",
        f"blocks {epoch.blocks_mean:.2f}",
    ]
    if rewarded:
        figures.append(f"reward {epoch.reward:.3f}")
    if epoch.validation:
        figures.append(
            f"val accuracy {percent(epoch.validation['accuracy'], 2)} with {epoch.validation['blocks_mean']:.2f} blocks"
        )
    text = ", ".join(filter(None, [*figures, epoch.note]))
    say_dated(f"epoch {epoch.epoch} ({epoch.seconds:.0f} s): {text}")


def print_resumed(where: str) -> None:
    say_dated(f"going on from {where}")


def print_figures(output: Path, trained: Trained) -> None:
    epochs = trained.model.spec.provenance["options"]["epochs"]
    click.echo(f"{output}: {trained.model.spec.arch}, {epochs:g} epoch{'' if epochs == 1 else 's'}")
    if trained.figures:
        figures = trained.figures
        blocks = f"{figures['blocks_mean']:.2f} ± {figures['blocks_std']:.2f} blocks"
        n_images = counted(int(figures["n_images"]), "image")
        click.echo(f"accuracy {percent(figures['accuracy'], 2)} with {blocks} on {n_images}")
