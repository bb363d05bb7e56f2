"""Commands about MODEL files: import, models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdtool.cli.command import Command
from bdtool.cli.options import (
    CHECKPOINT,
    NEW_MODEL,
    PathInText,
    colour_options,
    json_option,
    resize_to_option,
    size_option,
)
from bdtool.cli.output import emit, mega, print_table
from bdtool.words import counted, percent

if TYPE_CHECKING:
    from bdtool.models.model_spec import ModelSpec

_CIFAR10 = "cifar10"
_OPTIONS = {"resize": "--resize-to"}  # where they are not called after what they give


@click.command("import", cls=Command)
@click.argument("checkpoint", type=CHECKPOINT)
@click.option(
    "--arch",
    metavar="NAME",
    help="Architecture, for instance resnet32; see `bdtool models`. Default: the one that the tensors fit.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["auto", "akamaster", "torchvision", "transformers", "blockdrop"]),
    default="auto",
    show_default=True,
    help="Whose key names the checkpoint uses.",
)
@click.option(
    "--entry",
    metavar="NAME",
    help="Where in the file the network is, as model_ema, or state_dict.model. Default: found by usual names.",
)
@click.option("--classes", type=click.IntRange(min=1), help="Refuse a checkpoint with another number of classes.")
@colour_options(default="what the format's authors use")
@resize_to_option(
    default="as torchvision measured its weights, where the file is one of these, else 256 for ImageNet's networks"
)
@click.option(
    "--interpolation",
    type=click.Choice(["bilinear", "bicubic"]),
    help="How pictures are scaled. Default: bilinear, as torchvision's weights need it.",
)
@size_option
@click.option(
    "--shortcut",
    type=click.Choice(["option-a", "average-pool", "projection"]),
    help="Shortcut at a stage change. CIFAR checkpoints do not say which; default: what the format's authors use.",
)
@click.option(
    "--labels",
    type=PathInText("labels", lambda labels: None if labels == _CIFAR10 else Path(labels)),
    metavar="cifar10|FILE",
    help="Class names: a text file with one a line. Default: CIFAR-10's or ImageNet's where they fit.",
)
@click.option("-o", "--output", "model", type=NEW_MODEL, required=True, metavar="MODEL", help="The file to write.")
def import_cmd(
    checkpoint: Path,
    arch: str | None,
    format_: str,
    entry: str | None,
    classes: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    resize_to: int | None,
    interpolation: str | None,
    size: int | None,
    shortcut: str | None,
    labels: str | None,
    model: Path,
) -> None:
    """Turn a public checkpoint into a MODEL file, without running code from it.

    CHECKPOINT is a file, or a directory as timm and transformers write it, which also says labels and input.

    \b
    Example:
      bdtool import resnet32-d509ac18.th -o model.safetensors
      bdtool import resnet50.a1_in1k/ -o model.safetensors
    """
    from bdtool.models.checkpoints import import_checkpoint
    from bdtool.models.store import save_model

    imported = import_checkpoint(
        checkpoint,
        arch=arch,
        format=format_,
        entry=entry,
        classes=classes,
        mean=mean,  # type: ignore[arg-type]  # click checked that there are three
        std=std,  # type: ignore[arg-type]
        resize=resize_to,
        interpolation=interpolation,  # type: ignore[arg-type]  # one of the choices
        size=size,
        shortcut=shortcut,  # type: ignore[arg-type]  # one of the choices
        labels=_read_labels(labels),
    )
    save_model(imported, model)
    spec = imported.spec
    policy = "with a policy network" if spec.has_policy else "no policy network"
    click.echo(f"{model}: {spec.arch}, {spec.n_classes} classes, {imported.n_blocks} blocks, {policy}")
    colours = f"mean {_numbers(spec.preprocessing.mean)}, std {_numbers(spec.preprocessing.std)}"
    scaled = f"{spec.preprocessing.resize} {spec.preprocessing.interpolation}" if spec.preprocessing.resize else "-"
    click.echo(f"shortcut {spec.shortcut}, {colours}, resize {scaled}")
    if weights := spec.provenance.get("weights"):
        click.echo(f"by its digest it is torchvision's {weights}")
    if input_file := spec.provenance.get("input"):
        click.echo(f"what is not given is taken from {input_file}")
    given = {"shortcut": shortcut, "mean": mean, "std": std, "resize": resize_to, "interpolation": interpolation}
    if assumed := [name for name in _untold(spec) if given[name] is None]:
        worst = ", a shortcut nearly all of it" if "shortcut" in assumed else ""
        click.echo(
            f"the file does not say {', '.join(assumed)}: taken as in format {spec.provenance['format']}. Wrong ones "
            f"cost accuracy{worst}: measure it with `bdtool evaluate MODEL --data DATA`, or give "
            + ", ".join(_OPTIONS.get(name, f"--{name}") for name in assumed)
        )


def _untold(spec: ModelSpec) -> list[str]:
    """Return what a checkpoint like that leaves to whoever reads it.

    ImageNet's networks all have the same colours, but where transformers' image processors were left as they are.
    """
    from bdtool.models.architectures import architecture

    if spec.provenance.keys() & {"weights", "input"}:
        return []
    if architecture(spec.arch).family != "cifar":
        colours = ["mean", "std"] if spec.provenance["format"] == "transformers" else []
        return [*colours, "resize", "interpolation"]
    return ["mean", "std"] if spec.shortcut == "projection" else ["shortcut", "mean", "std"]  # a projection has weights


@click.command("models", cls=Command)
@json_option
def models_cmd(json_file: str | None) -> None:
    """List the shipped models and the known architectures.

    \b
    Example:
      bdtool models
    """
    from bdtool.models.architectures import architecture, known_architectures
    from bdtool.models.shipped import shipped_models

    shipped = [_shipped_facts(name, path) for name, path in shipped_models().items()]
    rows: list[dict[str, Any]] = []
    for name in known_architectures():
        arch = architecture(name)
        rows.append(
            {
                "name": name,
                "family": arch.family,
                "block": arch.block,
                "stages": list(arch.stages),
                "K": sum(arch.stages),
                "input": f"{arch.image_size} x {arch.image_size}",
            }
        )

    def text() -> None:
        _print_shipped(shipped)
        columns = list(rows[0])
        cells = [[_cell(row[column]) for column in columns] for row in rows]
        print_table(columns, cells, title="Known architectures")
        click.echo("CIFAR ResNets of any depth 6n + 2 are known, too; but resnet50 and resnet152 are ImageNet's.")

    emit({"shipped": shipped, "architectures": rows}, json_file, text)


def _shipped_facts(name: str, path: Path) -> dict[str, Any]:
    """Return what the header of a shipped MODEL says: what it is, what it was trained on, and its measured figures."""
    from bdtool.models.store import read_spec

    spec = read_spec(path)
    keep = {"created_by", "figures", "val"}
    provenance = {key: value for key, value in spec.provenance.items() if key in keep}
    return {"name": name, "arch": spec.arch, "classes": spec.n_classes, "policy": spec.has_policy, **provenance}


def _print_shipped(shipped: list[dict[str, Any]]) -> None:
    rows = []
    for facts in shipped:
        figures = facts["figures"]
        blocks = f"{figures['blocks_mean']:.2f} ± {figures['blocks_std']:.2f}"
        accuracy = percent(figures["accuracy"], 2)
        images = f"{counted(figures['n_images'], 'image')} of {facts['val']}"
        rows.append([facts["name"], facts["arch"], accuracy, blocks, mega(figures["flops_mean"]), images])
    columns = ["name", "arch", "accuracy", "blocks", "FLOPs", "measured on"]
    click.echo("Shipped models: use the name wherever a command takes a MODEL")
    print_table(columns, rows)


def _read_labels(labels: str | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    if labels == _CIFAR10:
        from bdtool.models.checkpoint_formats import CIFAR10_LABELS

        return CIFAR10_LABELS
    try:
        text = Path(labels).read_text(encoding="utf-8-sig")  # an editor may have put a mark before the first label
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as exc:
        raise click.BadParameter(
            f"{labels}: cannot be read ({exc}); expected a text file in UTF-8", param_hint="--labels"
        ) from exc


def _cell(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
