"""The tour itself: each step is a command that a user can run alone, shown before its output."""

from __future__ import annotations

import io
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from bdtool.cli.output import print_table, warn
from bdtool.demo.pictures import drawn_pictures
from bdtool.errors import UsageError
from bdtool.models.checkpoint_formats import CIFAR10_LABELS
from bdtool.words import percent
from export.files import remove_leftovers, write_output

MODEL = "r32-cifar10"
POLICIES = ("learned", "all")
_MARK = ".bdtool-demo"
_N_DRAWN = 200
_N_PICTURES = 4
_PICTURES = tuple(f"{name}.png" for name in CIFAR10_LABELS)
_MADE = ("bundle", "train.npz", "test.npz", "report.html", *_PICTURES)  # in its directory


def run_demo(output: Path) -> None:
    """Export, build, verify, classify, evaluate, profile and report on the shipped model, in directory `output`.

    Raises:
        UsageError: `output` exists and was not made by the demo, or the extra `report` is not installed.
    """
    from bdtool.report.page import require_extra

    start = time.perf_counter()
    require_extra()
    _prepare(output)
    bundle, train, test = output / "bundle", output / "train.npz", output / "test.npz"
    pictures = _draw_pictures(output, train, test)
    _bdtool("models")
    _bdtool("export", MODEL, "-o", bundle)
    _bdtool("build", bundle, "--coverage", 0.95, "--data", train)
    _bdtool("verify", bundle, "--data", test)
    _bdtool("run", bundle, *pictures)
    _bdtool("evaluate", bundle, "--data", test)
    _bdtool("profile", bundle, "--data", test, "--strategy", "chain,path,fused")
    _compare(bundle, test)
    _bdtool("report", bundle, "--data", test, "--duration", 1, "-o", output / "report.html")
    click.echo(
        f"\nDone in {time.perf_counter() - start:.0f} s. Everything is in {output}; run any command above again."
    )


def _prepare(output: Path) -> None:
    if output.exists() and any(output.iterdir()) and not (output / _MARK).exists():
        raise UsageError(f"{output} exists and was not made by the demo; choose another directory with -o")
    output.mkdir(parents=True, exist_ok=True)
    (output / _MARK).touch()
    remove_leftovers(output, _MADE)
    for entry in (output / name for name in _MADE):  # nothing else: whoever ran its commands again may have files there
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _draw_pictures(output: Path, train: Path, test: Path) -> list[Path]:
    """Write drawn pictures as two .npz, and the first of each class of the second as a file of its own."""
    for seed, path in ((1, train), (0, test)):
        images, labels = drawn_pictures(_N_DRAWN, seed=seed)
        file = io.BytesIO()
        np.savez(file, x=images, y=labels)
        write_output(path, file.getvalue())
    pictures = []
    for image, label in zip(images[:_N_PICTURES], labels, strict=False):
        pictures.append(output / _PICTURES[label])
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        write_output(pictures[-1], file.getvalue())
    click.echo(f"{train}, {test}: {_N_DRAWN} pictures each, drawn for this demo (vehicles; no photographs)")
    return pictures


def _bdtool(command: str, *arguments: object) -> None:
    """Show a command and run it in this process."""
    from bdtool.cli import main

    words = [command, *map(str, arguments)]
    click.echo(f"\n$ bdtool {shlex.join(words)}")
    status = main.main(words, prog_name="bdtool", standalone_mode=False)
    if isinstance(status, int) and status:  # what a command exits with, click returns here
        raise click.exceptions.Exit(status)


def _compare(bundle: Path, test: Path) -> None:
    """Print accuracy and latency of each policy beside the full network."""
    from bdtool.inspection import tuned_for
    from export.bundle import Bundle

    rows = [_figures(bundle, test, policy) for policy in POLICIES]
    rows.sort(key=lambda row: -float(row["blocks"]))
    full = rows[0]["full_ms"]
    table = [
        ["full (one engine)", percent(rows[0]["accuracy"]), f"{rows[0]['blocks']:.0f}", "1.000", f"{full:.3f}", "1.000"]
    ]
    for row in rows:
        table.append(
            [
                f"chain, {row['policy']}",
                percent(row["accuracy"]),
                f"{row['blocks']:.0f}",
                f"{row['flops']:.3f}",
                f"{row['median_ms']:.3f}",
                f"{row['ratio']:.3f}",
            ]
        )
    columns = ["", "accuracy", "blocks", "FLOPs", "median ms", "time to full"]
    print_table(
        columns,
        table,
        title=f"Comparison on {test.name}; FLOPs and time (of means) relative to the full network of the same run",
    )
    if unstable := [f"{row['policy']} ({reason})" for row in rows for reason in row["unstable"]]:
        warn(f"UNSTABLE, times are not to be trusted: {', '.join(unstable)}. Measure again when nothing else runs")
    if policy := tuned_for(Bundle.open(bundle).manifest.provenance):
        click.echo(
            f"The base was fine-tuned for policy {policy}: every block at once is a baseline for time, not accuracy."
        )


def _figures(bundle: Path, test: Path, policy: str) -> dict[str, Any]:
    from bdtool.data.sources import open_data
    from bdtool.evaluation import evaluate
    from bdtool.profiling.profile import profile
    from bdtool.profiling.workload import Settings
    from bdtool.runtime.place import Place
    from export.bundle import Bundle

    opened, place = Bundle.open(bundle), Place()
    data = open_data(str(test), network=opened.network)
    with place.open(opened) as runtime:
        accuracy = evaluate(runtime, data, policy=policy).accuracy
    measured = profile(
        opened,
        data,
        policy=policy,
        strategies=["chain"],
        settings=Settings(duration_s=0.5),
        place=place,
    ).to_json()
    strategies, chain = measured["strategies"], measured["strategies"]["chain"]
    return {
        "policy": policy,
        "accuracy": accuracy,
        "blocks": chain["blocks_mean"],
        "flops": chain["flops_ratio_to_full"],
        "median_ms": chain["latency_ms"]["median"],
        "full_ms": strategies["full"]["latency_ms"]["median"],
        "ratio": chain["ratio_to_full"],
        "unstable": measured["unstable"],
    }
