"""The command that adds other precisions to a bundle: calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdtool.calibrating.request import CalibrationRequest
from bdtool.cli.command import Command
from bdtool.cli.options import (
    BUNDLE,
    DATA,
    FiniteRange,
    data_option,
    json_option,
    policy_option,
    refuse_idle,
    resize_option,
    threads_option,
    was_given,
)
from bdtool.cli.output import emit, print_table, progress_of_steps, tell_when_stopped, warn
from bdtool.words import counted, percent
from calibration.methods import METHODS
from export.half_spec import HALF_DTYPES
from export.manifest import CALIBRATED

if TYPE_CHECKING:
    from bdtool.calibrating.calibrate import Calibrated
    from bdtool.data.batches import ImageSource
    from bdtool.data.layouts import Split
    from bdtool.specs import NetworkSpec


@click.command("calibrate", cls=Command)
@click.argument("bundle", type=BUNDLE)
@data_option()
@click.option(
    "--precision",
    type=click.Choice(CALIBRATED),
    default=CalibrationRequest.precision,
    show_default=True,
    help="Precision of the parts to make; mixed chooses int8 or fp32 for each block.",
)
@policy_option
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=CalibrationRequest.limit,
    show_default=True,
    help="Calibration images to draw.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=CalibrationRequest.seed, show_default=True, help="Draws them."
)
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    default="train",
    show_default=True,
    help="Part of a cifar10:, cifar100: or imagenet: data set to calibrate on; gates take the test part.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=CalibrationRequest.method,
    show_default=True,
    help="How a range follows from the activations; mse takes the one of least mean square error.",
)
@click.option(
    "--percentile",
    type=FiniteRange(50, 100, min_open=True),
    default=CalibrationRequest.percentile,
    show_default=True,
    help="With --method percentile: share of the absolute values that does not saturate.",
)
@click.option(
    "--bias-correction/--no-bias-correction",
    default=CalibrationRequest.bias_correction,
    show_default=True,
    help="Let the biases of INT8 layers take back the shift of the mean that rounding leaves.",
)
@click.option(
    "--at-least",
    type=click.IntRange(min=1),
    default=CalibrationRequest.at_least,
    show_default=True,
    help="Images that each part must see; one that fewer keep is topped up with images that drop it.",
)
@click.option(
    "--include",
    type=click.Choice(["policy", "head"]),
    multiple=True,
    help="With --precision int8: quantize this part, too; may be repeated.",
)
@click.option(
    "--eval",
    "evaluation",
    type=DATA,
    metavar="DATA",
    help="Labelled images for the gates. Default: the test part of a named data set, else the images of --data. Those "
    "that int8 or mixed are calibrated on are left out, if 100 (mixed: 200) others remain.",
)
@click.option(
    "--eval-limit",
    type=click.IntRange(min=1),
    help="Only N images for the gates, drawn with seed 0; mixed is chosen on half of them. Default: all.",
)
@click.option(
    "--max-accuracy-drop",
    type=FiniteRange(min=0, max=100),
    default=CalibrationRequest.max_accuracy_drop,
    show_default=True,
    help="Percentage points of top-1 accuracy that may be lost; with more the bundle stays as it was.",
)
@threads_option
@resize_option
@json_option
def calibrate_cmd(
    bundle: Path,
    data: str,
    split: Split,
    evaluation: str | None,
    resize: bool,
    json_file: str | None,
    include: tuple[str, ...],
    **asked: Any,
) -> None:
    """Add INT8, FP16, BF16 or mixed parts to a BUNDLE, from real images along the paths that the policy takes.

    Each block's ranges come from the images that reach and keep it under --policy. The new parts are compared with
    the fp32 ones, and the network with them on the images of --eval; the bundle changes only if the gates are passed.
    An interrupted calibration is taken up by the same command.

    \b
    Example:
      bdtool calibrate bundle --data cifar10:data --policy distribute:12
      bdtool calibrate bundle --data train.npz --eval test.npz --precision mixed --max-accuracy-drop 0.2
    """
    from bdtool.calibrating.calibrate import calibrate
    from export.bundle import Bundle

    request = CalibrationRequest(include=frozenset(include), **asked)
    _refuse_idle(request, data)
    opened = Bundle.open(bundle)
    images, judged = _open(data, evaluation, opened.network, split=split, resize=resize)
    if not judged.has_labels and was_given("max_accuracy_drop"):
        raise click.UsageError(
            f"--max-accuracy-drop needs labels, and {judged.description} has none: give labelled images with --eval, "
            "or leave it out"
        )
    shares: dict[str, float] = {}  # of steps, begun or done

    def on_start(shares_images: bool) -> None:
        if not judged.has_labels:
            warn(f"no labels in {judged.description}: the accuracy is not measured; give labelled images with --eval")
        if shares_images:
            warn(
                f"the gates are measured on images that {request.precision} is calibrated on, as {judged.description} "
                "has too few others: on new ones it may lose more. Give others with --eval, or calibrate on fewer "
                "(--limit)"
            )

    with tell_when_stopped(lambda: _finished(shares)), progress_of_steps("calibrating") as show:

        def on_progress(step: str, share: float) -> None:
            shares[step] = share
            show(step, share)

        result = calibrate(opened, images, judged, request, on_start=on_start, on_progress=on_progress)
    emit(result.to_json(), json_file, lambda: _print(result))
    if not result.ok:
        click.echo(f"Error: {_failure(result)}; {bundle} is as it was", err=True)
        raise click.exceptions.Exit(1)


def _open(
    data: str, evaluation: str | None, network: NetworkSpec, *, split: Split, resize: bool
) -> tuple[ImageSource, ImageSource]:
    """Open the images to calibrate on and those for the gates, of which alone labels are asked where they are given."""
    from bdtool.data.sources import has_splits, open_data

    images = open_data(data, network=network, resize=resize, split=split, labels="optional")
    if evaluation is not None:
        return images, open_data(evaluation, network=network, resize=resize)
    return images, open_data(data, network=network, resize=resize) if has_splits(data) else images


def _finished(shares: dict[str, float]) -> str:
    """Say what the same command takes up of a calibration that was stopped; nothing where it begins anew."""
    if "collecting ranges" not in shares:
        return ""
    done = f"the ranges of {percent(shares['collecting ranges'], 0)} of the images"
    if n_known := sum(step.startswith("sensitivity") for step in shares):
        done += f" and the sensitivity of {counted(n_known, 'part')}"
    return f"finished: {done}; the same command goes on from there, or a few batches earlier"


def _failure(result: Calibrated) -> str:
    bad = {name: one for name, one in result.part_errors.items() if not one.ok}
    if bad:
        name = max(bad, key=lambda part: bad[part].share_of_bound)
        return (
            f"part {name!r} in {result.precision} is {bad[name].error:.2g} of its range away from fp32, "
            f"allowed is {bad[name].tolerance:g}. Try more images (--limit), or another --method"
        )
    remedy = "--precision mixed"
    if result.precision == "mixed":  # it kept the bound on the images that it was chosen on
        remedy = "more images to choose on (--eval, --eval-limit)"
    return (
        f"{result.precision} loses {result.gates.accuracy_drop:.2f} percentage points of accuracy, allowed is "
        f"{result.gates.max_accuracy_drop:g}. Try {remedy}, another --method, or more images (--limit)"
    )


def _refuse_idle(request: CalibrationRequest, data: str) -> None:
    """Refuse what somebody asked for and would not get."""
    from bdtool.data.sources import has_splits

    if was_given("percentile") and request.method != "percentile":
        raise click.UsageError("--percentile is for --method percentile: give that, too, or leave it out")
    if request.precision in HALF_DTYPES:
        reason = f"{request.precision} parts are typed from the fp32 ones and have no ranges; leave it out"
        refuse_idle(["method", "bias_correction"], reason)
    if not has_splits(data):
        refuse_idle(["split"], f"{data} has one part alone; leave it out")


def _print(result: Calibrated) -> None:
    gates = result.gates
    drawn = counted(result.n_images, "image")
    click.echo(f"{result.precision} from {drawn} of {result.input_source}, policy {gates.policy}")
    if result.ok and result.replaced is not None:
        click.echo(f"replaces the {result.precision} parts that were calibrated for policy {result.replaced}")
    if not result.has_one_path:  # else nothing is rare: a part runs for every image or for none
        for name, n_images in result.topped_up.items():
            click.echo(f"  {name}: too few images run it; {n_images} that do not were added for its ranges")
    worst = max(result.part_errors, key=lambda name: result.part_errors[name].share_of_bound, default=None)
    rows = []
    if worst is not None:
        one = result.part_errors[worst]
        rows.append(["parts", _state(one.ok), f"{one.error:.2g} of the range in {worst}", f"{one.tolerance:g}"])
    if gates.policy_flips is not None:
        rows.append(["policy bits", "", f"{percent(gates.policy_flips, 2)} flipped", "-"])
    if gates.logits_error is not None:
        rows.append(["logits", "", f"{percent(gates.logits_error, 2)} error, worst {gates.logits_worst:.2g}", "-"])
        rows.append(["predictions", "", f"{percent(gates.changed_classes or 0, 2)} changed", "-"])
    if gates.accuracy is not None and gates.accuracy_fp32 is not None:
        figures = f"{percent(gates.accuracy, 2)}, fp32 {percent(gates.accuracy_fp32, 2)}"
        rows.append(["accuracy", _state(gates.ok), figures, f"-{gates.max_accuracy_drop:g} points"])
    title = f"{counted(gates.n_images, 'image')} of {gates.input_source}"
    if result.evaluated_on_calibration_images:
        title += ", calibration images among them"
    if not gates.n_images:
        reason = "no engine on this CPU computes in bfloat16" if result.precision == "bf16" else "a part is wrong"
        title = f"logits and accuracy were not measured: {reason}"
    print_table(["gate", "", "measured", "allowed"], rows, title=title)
    chosen = result.extra.get("chosen")
    if chosen is not None:
        blocks = [name for name in result.obtained if name.startswith("block")]
        on = result.extra["chosen_on"]
        slow, n_left = len(result.extra["not_faster"]), len(blocks) - len(chosen)
        click.echo(
            f"\nint8 for {len(chosen)} of {len(blocks)} blocks, chosen on {counted(on['n_images'], 'other image')}; of "
            f"the rest {slow} are not measurably faster in it, {n_left - slow} were given back for accuracy"
            + (f". See {result.extra['table']} and its plot" if result.ok else "")
        )


def _state(ok: bool) -> str:
    return "ok" if ok else "FAILED"
