"""Commands that make something to run of a bundle: build, fuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdtool.cli.command import Command
from bdtool.cli.options import (
    BUNDLE,
    NEW_FILE,
    POLICY,
    FiniteRange,
    backend_option,
    data_option,
    device_option,
    json_option,
    policy_option,
    precision_option,
    resize_option,
)
from bdtool.cli.output import emit, progress, tell_when_stopped
from bdtool.cli.tensorrt import details_lines, tensorrt_options, tensorrt_options_from
from bdtool.errors import BundleError
from bdtool.runtime.read_only import is_read_only
from bdtool.words import percent
from engines.base import DEFAULT_DEVICE

if TYPE_CHECKING:
    import numpy as np

    from bdtool.specs import NetworkSpec
    from engines.base import Backend
    from engines.engine_record import EngineRecord
    from engines.portable import IntegerForm
    from engines.store import EngineStore, PartStatus
    from export.bundle import Bundle

_WITH_INTEGERS = ("int8", "mixed")
_FORMS = {
    "cpu": "for ONNX Runtime's CPU provider, on x86 with VNNI or on ARM; TensorRT takes what --for tensorrt writes",
    "cpu-without-vnni": "for ONNX Runtime's CPU provider, on x86 without VNNI",
    "tensorrt": "for TensorRT; ONNX Runtime's CPU provider is slow with it, and fast with what --for cpu writes",
}


@click.command("build", cls=Command)
@click.argument("bundle", type=BUNDLE)
@backend_option
@device_option(help_text="What the engines are for.")
@precision_option(help_text="Which parts to build.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Keep engines whose content still fits.")
@click.option("--paths", type=click.IntRange(min=1), metavar="N", help="Also note the N most frequent keep masks.")
@click.option(
    "--coverage",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="C",
    help="Also note the fewest keep masks that cover this share of the images, for instance 0.95.",
)
@data_option(default="For --paths and --coverage, which count on the training images of a named data set.")
@policy_option
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="With --paths or --coverage: count on N images, drawn with seed 0. Default: all.",
)
@resize_option
@tensorrt_options
@json_option
def build_cmd(
    bundle: Path,
    backend: str,
    device: str,
    precision: str,
    resume: bool,
    paths: int | None,
    coverage: float | None,
    data: str | None,
    policy: str | None,
    limit: int | None,
    resize: bool,
    json_file: str | None,
    **tensorrt: Any,
) -> None:
    """Build engines from a BUNDLE's parts; what was built from the same content is not built again.

    Each engine is compared with its ONNX part, where it can run here. A part that fails does not stop the others; the
    exit status is then 1.

    TensorRT-RTX builds without a GPU, for the architectures of --sm. TensorRT builds on the GPU of --device. FP16
    engines of both come from the bundle's FP32 parts, unless it has calibrated ones; the policy network and the logits
    stay FP32.

    With --paths or --coverage the keep masks that the policy chooses on the images of --data are counted, and the
    frequent ones noted beside the engines: strategy `path` then has an engine for each from the start.

    \b
    Example:
      bdtool build bundle
      bdtool build bundle --coverage 0.95 --data cifar10:data
      bdtool build bundle --backend tensorrt-rtx --sm 86,89,120 --precision fp16
    """
    from engines.registry import identify_backend, open_backend
    from engines.store import EngineStore
    from export.bundle import Bundle

    options = _MaskOptions(paths=paths, coverage=coverage, data=data, policy=policy, limit=limit, resize=resize)
    opened = Bundle.open(bundle)
    if options.wanted:
        _refuse_read_only(opened.path)
    trt = tensorrt_options_from(backend, tensorrt, precision=precision, bundle_batch=opened.manifest.max_batch)
    identity = identify_backend(backend, device, tensorrt=trt)
    store = EngineStore(opened, identity, precision=precision)
    statuses = _build_parts(store, lambda: open_backend(backend, device, tensorrt=trt), resume=resume)
    failed = [status for status in statuses if status.status == "failed"]
    masks = _note_masks(opened, store, device, options) if options.wanted and not failed else None
    result = _build_json(store.directory.name, statuses) | ({} if masks is None else {"paths": masks})
    emit(result, json_file, lambda: _print_build(store, statuses, masks))
    for status in failed:
        click.echo(f"Error: {status.message}", err=True)
    if failed:
        raise click.exceptions.Exit(1)


@click.command("fuse", cls=Command)
@click.argument("bundle", type=BUNDLE)
@click.option("-o", "--output", "model", type=NEW_FILE, required=True, metavar="FILE.onnx", help="The file to write.")
@click.option(
    "--threshold",
    type=FiniteRange(min=0, max=1),
    help="Keep the blocks whose probability is at least this. Default: the bundle's threshold.",
)
@click.option(
    "--policy",
    type=POLICY,
    metavar="POLICY",
    help="The blocks of this mask alone, the same for all images: a static model, without If. K bits, first:K, "
    "distribute:K, all, none, or FILE.npy with one row.",
)
@precision_option(help_text="Which parts to fuse.")
@click.option(
    "--for",
    "form",
    type=click.Choice(list(_FORMS)),
    help="With --precision int8 or mixed: the form of integers that ONNX Runtime's CPU provider is fast with, on "
    "processors with VNNI (x86) or ARM's (cpu), or on older x86; or that TensorRT takes.  [default: cpu]",
)
def fuse_cmd(
    bundle: Path, model: Path, threshold: float | None, policy: str | None, precision: str, form: IntegerForm | None
) -> None:
    """Write a BUNDLE as one ONNX file, policy included, with an If for each block.

    For deployments that can hold only one file. It takes one preprocessed image, float32 [1, 3, H, W], and gives the
    logits and which blocks ran; its optional input `force` (uint8 [K]: 0 policy, 1 keep, 2 drop) overrides the policy.
    Its ONNX metadata hold `preprocessing`, `labels` and `threshold`, as JSON. It is compared with the parts of the
    bundle before it is written.

    With --policy it is the path of one mask, a plain static ResNet of fewer blocks: images float32 [N, 3, H, W] to
    logits, for TensorRT and whatever else takes no If. `policy` is then in the metadata in place of `threshold`.

    \b
    Example:
      bdtool fuse bundle -o model.onnx
      bdtool fuse bundle -o model.onnx --threshold 0.7
      bdtool fuse bundle -o model.onnx --policy 100010001011110
      bdtool fuse bundle -o model.onnx --policy 100010001011110 --precision int8 --for tensorrt
    """
    from bdtool.fusing import write_fused, write_path
    from bdtool.runtime.thresholds import bundle_at
    from export.bundle import Bundle
    from export.part_source import PartSource

    if form and precision not in _WITH_INTEGERS:
        raise click.UsageError(f"--for is about integers, and precision {precision} has none. Leave it out")
    form = form or "cpu"
    source = PartSource(bundle_at(threshold, Bundle.open(bundle)), precision, converts_fp16=True)
    if policy is None:
        error = write_fused(source, model, form=form)
    elif threshold is not None:
        raise click.UsageError("--threshold is of the policy network, which --policy leaves out. Give one of them")
    else:
        error = write_path(source, model, _one_mask(source.network, policy), form=form)
    click.echo(
        f"{model}: {model.stat().st_size / 1e6:.1f} MB; worst difference from the parts: {error:.1e} of the range"
    )
    if precision in _WITH_INTEGERS:
        click.echo(_FORMS[form])


def _one_mask(network: NetworkSpec, policy: str) -> np.ndarray:
    from bdtool.runtime.policies import parse_policy_for
    from bdtool.runtime.thresholds import threshold_of

    asked = threshold_of(policy)
    request = parse_policy_for(network.with_threshold(asked) if network.has_policy else network, policy)
    if request.mask is None:
        instead = "leave --policy out" if asked is None else f"--threshold {asked} in place of --policy"
        raise click.BadParameter(
            f"{request.name} keeps other blocks of each image. Give K bits, or {instead}", param_hint="--policy"
        )
    return request.mask


def _build_parts(store: EngineStore, open_it: Callable[[], Backend], *, resume: bool) -> list[PartStatus]:
    n_parts = len(store.network.parts)
    n_engines = 0

    def finished() -> str:
        command = "the same command" if resume else "the same command without --no-resume"
        return f"finished: {n_engines} of {n_parts} engines; {command} goes on from there" if n_engines else ""

    with tell_when_stopped(finished), progress("building", n_parts) as advance:

        def on_part(status: PartStatus) -> None:
            nonlocal n_engines
            n_engines += status.status != "failed"
            advance(1, status.name)

        return store.build(open_it, resume=resume, on_part=on_part)


def _build_json(directory: str, statuses: list[PartStatus]) -> dict[str, Any]:
    def row(status: PartStatus) -> dict[str, Any]:
        entry: dict[str, Any] = {"status": status.status, "seconds": status.seconds, "cached": status.cached}
        if status.record is not None:
            entry |= {"layout": status.record.layout, "error": status.record.error, "sha256": status.record.sha256}
            entry |= {"details": status.record.details} if status.record.details else {}
        if status.message:
            entry["message"] = status.message
        return entry

    return {"engines": directory, "parts": {status.name: row(status) for status in statuses}}


@dataclass(frozen=True, kw_only=True)
class _MaskOptions:
    """What `build` was asked to note of keep masks; the names are those of its options."""

    paths: int | None
    coverage: float | None
    data: str | None
    policy: str | None
    limit: int | None
    resize: bool

    def __post_init__(self) -> None:
        if self.wanted and self.data is None:
            raise click.UsageError("--paths and --coverage count masks on images: give them with --data")
        if self.paths is not None and self.coverage is not None:
            raise click.UsageError("--paths and --coverage both say how many masks to note; give one of them")
        given = [name for name in ("data", "policy", "limit", "resize") if getattr(self, name)]
        if given and not self.wanted:
            raise click.UsageError(
                f"--{given[0]} is for counting masks: give --paths or --coverage, too, or leave it out"
            )

    @property
    def wanted(self) -> bool:
        return self.paths is not None or self.coverage is not None


def _refuse_read_only(bundle: Path) -> None:
    """Refuse to note masks where they have no place, before engines are built and all images counted."""
    if is_read_only(bundle):
        raise BundleError(
            f"{bundle} is read-only, and its keep masks would have no place. Make it writable, or build a copy with "
            "--paths or --coverage"
        )


def _note_masks(bundle: Bundle, store: EngineStore, device: str, options: _MaskOptions) -> dict[str, Any]:
    """Count masks on images, store the frequent ones beside the engines; return what was found."""
    from bdtool.data.sources import open_data
    from bdtool.frequent_masks import frequent_masks
    from bdtool.runtime.masks import choose_masks, write_masks
    from bdtool.runtime.place import Place
    from bdtool.runtime.policies import parse_policy_for
    from bdtool.runtime.thresholds import threshold_of
    from engines.trt_options import TENSORRT_RTX
    from export.manifest import EXPORTED

    bundle = bundle.with_threshold(threshold_of(options.policy))
    network = bundle.network
    images = open_data(options.data or "", network=network, resize=options.resize, split="train", labels="optional")
    source = images.drawn(options.limit)
    request = parse_policy_for(network, options.policy)
    place = Place(backend=store.identity.name, device=device, precision=store.precision)
    if store.identity.name == TENSORRT_RTX and device == DEFAULT_DEVICE:
        # its engines run on a GPU alone; those of the CPU decide alike
        precision = store.precision if store.precision in ("int8", "mixed") else EXPORTED
        place = Place(precision=precision)
        click.echo(f"counting masks with {place.backend} on the CPU, whose engines stay in the bundle", err=True)
    with (
        place.open(bundle) as runtime,
        progress("counting masks", source.n_images) as advance,
    ):
        counts = frequent_masks(runtime, source, request, on_batch=advance)
    chosen = choose_masks(counts, n_paths=options.paths, coverage=options.coverage)
    write_masks(store.directory, chosen, source=source.description, policy=request.name)
    return {
        "noted": len(chosen),
        "unique": len(counts),
        "coverage": sum(count.share for count in chosen),
        "policy": request.name,
        "input_source": source.description,
    }


def _agreement(records: list[EngineRecord]) -> str:
    errors = [(record.error, record.part) for record in records if record.error is not None]
    if not errors:
        return "not compared with ONNX: these engines cannot run here"
    error, part = max(errors)
    return f"worst difference from ONNX: {error:.1e} of the range in {part}"


def _print_build(store: EngineStore, statuses: list[PartStatus], masks: dict[str, Any] | None) -> None:
    counts = {kind: sum(s.status == kind for s in statuses) for kind in ("built", "cached", "failed")}
    seconds = sum(status.seconds for status in statuses)
    click.echo(f"engines/{store.directory.name}")
    click.echo(f"{counts['built']} built in {seconds:.1f} s, {counts['cached']} cached, {counts['failed']} failed")
    records = [status.record for status in statuses if status.record is not None]
    if records:
        click.echo(f"precision {records[0].precision}, activations {records[0].layout}; {_agreement(records)}")
        for line in details_lines(records):
            click.echo(line)
    if masks is not None:
        click.echo(
            f"{masks['noted']} of {masks['unique']} keep masks noted, policy {masks['policy']}: they cover "
            f"{percent(masks['coverage'])} of {masks['input_source']}"
        )
