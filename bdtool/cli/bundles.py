"""Commands that make and check bundles: export, verify."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdtool.cli.command import Command
from bdtool.cli.options import (
    BUNDLE,
    MODEL,
    NEW_BUNDLE,
    data_option,
    json_option,
    place_options,
    precision_option,
    resize_option,
)
from bdtool.cli.output import emit, print_table, progress, tell_when_stopped, warn
from bdtool.words import counted
from export.manifest import DEFAULT_MAX_BATCH

if TYPE_CHECKING:
    from bdtool.runtime.place import Place
    from bdtool.verification.ladder import Verification
    from export.exporter import ExportedPart


@click.command("export", cls=Command)
@click.argument("model", type=MODEL)
@click.option("-o", "--output", "bundle", type=NEW_BUNDLE, required=True, metavar="BUNDLE", help="Directory to make.")
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_BATCH,
    show_default=True,
    help="Largest batch that engines are run with; the runtime slices larger ones.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace an existing bundle. Of one of the same MODEL engines and frequent masks are kept, parts that `bdtool "
    "calibrate` made are not.",
)
def export_cmd(model: Path, bundle: Path, max_batch: int, force: bool) -> None:
    """Export a MODEL to a BUNDLE of ONNX parts, each compared with PyTorch as it is written.

    An interrupted export leaves an earlier bundle whole; the same command takes up the finished parts.

    \b
    Example:
      bdtool export model.safetensors -o bundle
    """
    from bdtool.pipeline import export_model
    from bdtool.specs import NetworkSpec
    from export.exporter import calibrated_precisions

    calibrated = calibrated_precisions(bundle) if force else ()
    reused, n_done, n_parts = 0, 0, 1

    def finished() -> str:
        return f"finished: {n_done} of {n_parts} parts; the same command goes on from there" if n_done else ""

    with tell_when_stopped(finished), progress("exporting", 1) as advance:

        def on_start(network: NetworkSpec) -> None:
            nonlocal n_parts
            n_parts = len(network.parts) + 1  # and `full`

        def on_part(part: ExportedPart) -> None:
            nonlocal reused, n_done
            reused, n_done = reused + part.reused, n_done + 1
            advance(1 / n_parts, part.name)

        manifest = export_model(model, bundle, max_batch=max_batch, force=force, on_start=on_start, on_part=on_part)
    if calibrated:
        warn(
            f"the {' and '.join(calibrated)} parts of the earlier {bundle} are gone; `bdtool calibrate` makes new ones"
        )
    worst = max(manifest.files.items(), key=lambda item: item[1].error)
    taken_up = f" ({reused} taken up from an interrupted run)" if reused else ""
    click.echo(f"{bundle}: {len(manifest.files)} parts{taken_up}, {manifest.network.n_blocks} blocks")
    name, file = worst
    click.echo(f"worst difference from PyTorch: {file.error:.1e} of the range in {name}, allowed {file.tolerance:.0e}")


@click.command("pack", cls=Command)
@click.argument("bundle", type=BUNDLE)
@click.option("-o", "--output", "packed", type=NEW_BUNDLE, required=True, metavar="BUNDLE", help="Directory to make.")
@precision_option(help_text="Which parts to keep.")
@click.option(
    "--engines",
    metavar="BACKEND",
    help="Keep the engines that were built for this backend in place of the ONNX parts: nothing is built, but they run "
    "only on machines like that which they were built for.",
)
@click.option("--with-full", is_flag=True, help="Keep `full`, too: profile and strategy full need it.")
@click.option("--triton", is_flag=True, help="Make a model for the repository of NVIDIA's Triton Inference Server.")
@json_option
def pack_cmd(
    bundle: Path,
    packed: Path,
    precision: str,
    engines: str | None,
    with_full: bool,
    triton: bool,
    json_file: str | None,
) -> None:
    """Copy a BUNDLE for deployment, with only what running it needs.

    Weights, engines and `full` stay behind, and the parts of other precisions: about a fifth is left. Engines are built
    where it is opened, which `bdtool verify` compares with the ONNX parts. `bdtool profile` needs `--with-full`.

    \b
    Example:
      bdtool pack bundle -o packed
      bdtool pack bundle -o packed --precision int8 --engines onnxruntime
      bdtool pack bundle -o models/r32-cifar10 --triton
    """
    from bdtool.packing import pack
    from export.bundle import Bundle

    result = pack(
        Bundle.open(bundle), packed, precision=precision, engines=engines, with_full=with_full, for_triton=triton
    )
    kind = f"engines ({', '.join(result.engines)})" if engines else "ONNX"
    if result.precision != precision:
        kind += f", which backends that make {precision} themselves convert"
    emit(
        dataclasses.asdict(result),
        json_file,
        lambda: click.echo(
            f"{packed}: {result.n_parts} {result.precision} parts, {kind}; {result.size_bytes / 1e6:.1f} of "
            f"{result.whole_size_bytes / 1e6:.1f} MB"
        ),
    )


@click.command("verify", cls=Command)
@click.argument("bundle", type=BUNDLE)
@data_option(default="Default: synthetic pictures, labelled as such in the result.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Images to compare on, drawn with seed 0.",
)
@resize_option
@place_options()
@json_option
def verify_cmd(
    bundle: Path,
    data: str | None,
    limit: int,
    resize: bool,
    place: Place,
    json_file: str | None,
) -> None:
    """Climb a BUNDLE's parity ladder: digests, manifest, ONNX against PyTorch, engines, policy bits, logits, top-1.

    Where PyTorch is not installed, or a packed BUNDLE has no weights, its ONNX parts take the place of PyTorch.

    \b
    Example:
      bdtool verify bundle --data cifar10:data
      bdtool verify bundle --data cifar10:data --precision int8
    """
    from bdtool.data.sources import open_data
    from bdtool.verification.ladder import verify
    from export.bundle import Bundle

    opened = Bundle.open(bundle, check_digests=False)  # the first rung does
    place.store(opened)  # refuse a precision that is not to be had before the data is looked at
    source = open_data(data or "synthetic", network=opened.network, resize=resize, labels="optional")
    if not source.is_real:
        warn(f"the images are {source.description}; give real ones with --data")
    with progress("verifying", 7) as advance:
        result = verify(
            opened,
            source,
            place,
            limit=limit,
            on_rung=lambda rung: advance(1, rung.name),
        )
    emit(result.to_json(), json_file, lambda: _print_ladder(result))
    if not result.ok:
        raise click.exceptions.Exit(1)


def _print_ladder(result: Verification) -> None:
    if result.n_images:
        click.echo(f"{counted(result.n_images, 'image')} of {result.input_source}, compared with {result.oracle}")
    rows = []
    for rung in result.rungs:
        worst = "-" if rung.worst is None else f"{rung.worst:.2g}"
        state = "n/a" if rung.worst is None else ("ok" if rung.ok else "FAILED")
        rows.append([rung.name, state, worst, f"{rung.bound:.2g}", rung.unit, rung.detail])
    print_table(["rung", "", "worst", "bound", "", ""], rows, left=(0, 4, 5))
