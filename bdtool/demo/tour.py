"""The tour itself: each step is a command that a user can run alone, shown before its output."""

from __future__ import annotations

import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from bdtool.cli.output import percent, print_table, progress
from bdtool.demo.digits import EPOCHS, Digits, load_digits, train_digits
from bdtool.errors import UsageError
from bdtool.models.store import save_model
from export.files import atomic_path

POLICIES = ("all", "distribute:7", "distribute:5", "random:5", "first:5")
PROFILED = "distribute:5"
_MARK = ".bdtool-demo"
_N_PICTURES = 5


def run_demo(output: Path, *, seed: int) -> None:
    """Train, export, build, verify, classify, evaluate and profile in directory `output`.

    Raises:
        UsageError: `output` exists and was not made by the demo.
        DataError: scikit-learn is not installed.
    """
    start = time.perf_counter()
    digits = load_digits()
    _prepare(output)
    model, bundle, test = output / "digits.safetensors", output / "bundle", output / "test.npz"
    _train(digits, model, seed)
    pictures = _write_images(digits, output, test)
    _bdtool("export", model, "-o", bundle)
    _bdtool("build", bundle)
    _bdtool("verify", bundle, "--data", test)
    _bdtool("run", bundle, *pictures, "--policy", PROFILED)
    _bdtool("evaluate", bundle, "--data", test, "--policy", PROFILED)
    _bdtool("profile", bundle, "--data", test, "--policy", PROFILED)
    _compare(bundle, test)
    _bdtool("report", bundle, "--data", test, "--policy", "random:5", "--duration", 1, "-o", output / "report.html")
    click.echo(
        f"\nDone in {time.perf_counter() - start:.0f} s. Everything is in {output}; run any command above again."
    )


def _prepare(output: Path) -> None:
    if output.exists() and any(output.iterdir()) and not (output / _MARK).exists():
        raise UsageError(f"{output} exists and was not made by the demo; choose another directory with -o")
    output.mkdir(parents=True, exist_ok=True)
    (output / _MARK).touch()
    for entry in output.iterdir():  # not the directory itself, which may be a link or the working directory
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _MARK:
            entry.unlink()


def _train(digits: Digits, model: Path, seed: int) -> None:
    click.echo(f"Training a ResNet-20 on {len(digits.train_labels)} handwritten digits, blocks dropped at random ...")
    start = time.perf_counter()
    with progress("training", EPOCHS) as advance:
        trained = train_digits(
            digits, seed=seed, epochs=EPOCHS, on_epoch=lambda epoch, loss: advance(1, f"loss {loss:.3f}")
        )
    save_model(trained, model)
    click.echo(f"{model}: {EPOCHS} epochs in {time.perf_counter() - start:.0f} s")


def _write_images(digits: Digits, output: Path, test: Path) -> list[Path]:
    """Write the test images as .npz, and a few as pictures."""
    with atomic_path(test) as temporary, temporary.open("wb") as file:
        np.savez(file, x=digits.test_images, y=digits.test_labels)
    pictures = []
    for i in range(_N_PICTURES):
        pictures.append(output / f"digit-{digits.test_labels[i]}-{i}.png")
        Image.fromarray(digits.test_images[i]).save(pictures[-1])
    return pictures


def _bdtool(command: str, *arguments: object) -> None:
    """Show a command and run it in this process."""
    from bdtool.cli import main

    words = [command, *map(str, arguments)]
    click.echo(f"\n$ bdtool {shlex.join(words)}")
    main.main(words, prog_name="bdtool", standalone_mode=False)


def _compare(bundle: Path, test: Path) -> None:
    """Print accuracy and latency of each policy beside the full network."""
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
        columns, table, title=f"Comparison on {test.name}; FLOPs and time relative to the full network of the same run"
    )


def _figures(bundle: Path, test: Path, policy: str) -> dict[str, Any]:
    from bdtool.data.sources import open_data
    from bdtool.evaluation import evaluate
    from bdtool.profiling.measure import Settings
    from bdtool.profiling.profile import profile
    from bdtool.runtime.orchestrator import Orchestrator
    from export.bundle import Bundle

    opened = Bundle.open(bundle)
    data = open_data(str(test), network=opened.network)
    with Orchestrator.open(opened) as runtime:
        accuracy = evaluate(runtime, data, policy=policy).accuracy
    strategies = profile(
        opened,
        data,
        policy=policy,
        strategies=["chain"],
        settings=Settings(duration_s=0.5),
        backend="onnxruntime",
        device="cpu",
        threads=None,
    ).to_json()["strategies"]
    chain = strategies["chain"]
    return {
        "policy": policy,
        "accuracy": accuracy,
        "blocks": chain["blocks_mean"],
        "flops": chain["flops_ratio_to_full"],
        "median_ms": chain["latency_ms"]["median"],
        "full_ms": strategies["full"]["latency_ms"]["median"],
        "ratio": chain["ratio_to_full"],
    }
