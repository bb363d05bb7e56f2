"""From public checkpoints to models: `bdtool import`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdtool.errors import CheckpointError, UsageError
from bdtool.models.architectures import Architecture, ShortcutKind, architecture, known_architectures
from bdtool.models.checkpoint_directories import completed, read_directory, weights_file
from bdtool.models.checkpoint_entries import POLICY_ENTRIES, entries_below, entries_with_networks, flat_entries
from bdtool.models.checkpoint_files import read_checkpoint
from bdtool.models.checkpoint_formats import (
    BLOCKDROP,
    FORMATS,
    CheckpointFormat,
    Colour,
    GivenInput,
    default_labels,
    default_preprocessing,
    detect_format,
    find_format,
    published_resize,
    published_weights,
)
from bdtool.models.difference import StateDifference, compare_states
from bdtool.models.layout import network_from_spec
from bdtool.models.model import BlockDropModel
from bdtool.models.model_spec import ModelSpec
from bdtool.models.state import meta_model, model_from_state, non_finite_names, shapes_of
from bdtool.models.store import read_spec
from bdtool.specs import Interpolation
from bdtool.words import listing
from export.files import sha256_of_file

_NOTHING_GIVEN = GivenInput()


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The tensors of a checkpoint under the file's own names, and how to read these."""

    path: Path
    fmt: CheckpointFormat
    tensors: dict[str, Tensor]
    policy_prefix: str | None  # "agent." or "net."; None without a policy network
    shortcut: ShortcutKind | None  # what the user asked for
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def n_classes(self) -> int | None:
        head = self.tensors.get(f"{self.fmt.head}.weight")
        return len(head) if head is not None and head.dim() == 2 else None

    def within(self, directory: Path, input_file: str | None) -> _Source:
        """Return it with the directory named, and the file in there that says what the input is, if one does."""
        named = {"source": f"{directory.resolve().name}/{self.path.name}"}
        told = {} if input_file is None else {"input": input_file}
        return replace(self, provenance=self.provenance | named | told)


def import_checkpoint(
    path: Path,
    *,
    arch: str | None = None,
    format: str = "auto",
    entry: str | None = None,
    classes: int | None = None,
    mean: Colour | None = None,
    std: Colour | None = None,
    resize: int | None = None,
    size: int | None = None,
    interpolation: Interpolation | None = None,
    shortcut: ShortcutKind | None = None,
    labels: tuple[str, ...] | None = None,
) -> BlockDropModel:
    """Return the model that a public checkpoint holds, in eval mode. Nothing in the file is executed.

    Args:
        path: a file by `torch.save` (any age) or `.safetensors`. The tensors may lie in an entry `state_dict`, or in
            the only one of `model_state_dict`, `model` and `net`, and their keys may all begin with "module.",
            "_orig_mod.", "model.", "net." or "timm_model.". Or a directory as timm and transformers write it, which
            also says what of labels, mean, std, size, resize and interpolation is None.
        arch: name of the ResNet, as in `known_architectures`; None is the one that the tensors fit.
        format: "akamaster", "torchvision", "transformers" or "blockdrop"; "auto" tells them apart by their keys.
        entry: where the file has the network, if in none of these or in several: "model_ema", or "state_dict.model"
            for the keys of `state_dict` that begin with "model.".
        classes: how many classes the head must have; None takes what it has.
        mean: per channel RGB, of pixels scaled to 0..1; None is the format's own.
        std: as `mean`.
        resize: pixels that the shorter side of a picture is scaled to before its middle is taken; None is what
            torchvision's weights were measured with, where the file is one of these, else 256 for ImageNet's networks,
            either in proportion to a `size` other than 224.
        size: pixels of the network's input, square; None is 32 for CIFAR's networks and 224 for ImageNet's.
        interpolation: how pictures are scaled: "bilinear", as torchvision's weights need it (None), or "bicubic".
        shortcut: None is the format's own. A CIFAR file does not tell option-a from average-pool: both lack weights.
        labels: one name per class; None is CIFAR-10's or ImageNet's where the number of classes fits.

    Raises:
        UsageError: unknown architecture or format, or labels, mean, std or size that do not fit.
        CheckpointError: the file is unreadable or unsafe, or its tensors are not those of `arch`.
    """
    wanted = None if arch is None else architecture(arch)
    directory = path if path.is_dir() else None
    source = _read_source(path if directory is None else weights_file(path), format, entry=entry, shortcut=shortcut)
    path = source.path
    wanted = wanted or _architecture_of(source)
    given = GivenInput(mean=mean, std=std, resize=resize, size=size, interpolation=interpolation)
    if directory is not None:
        hub = read_directory(directory, wanted, given=given)
        given, labels = completed(given, hub.told), hub.labels if labels is None else labels
        source = source.within(directory, hub.input_file)
    if source.n_classes is not None and classes not in (None, source.n_classes):
        raise CheckpointError(
            f"{path}: its head has {source.n_classes} classes, not the {classes} asked for by --classes"
        )
    spec = _spec(source, wanted, classes=classes, given=given, labels=labels)
    network_from_spec(spec)  # refuse a size that it cannot take
    names = _names_by_key(source, spec)
    _check_tensors(source, spec, names)
    return model_from_state(spec, {names[key]: tensor for key, tensor in source.tensors.items()})


def _read_source(path: Path, format: str, *, entry: str | None, shortcut: ShortcutKind | None) -> _Source:
    asked = None if format == "auto" else find_format(format)
    content = read_checkpoint(path)
    entries = flat_entries(content if entry is None else _content_of(path, content, entry))
    fmt = asked or detect_format(entries)
    if fmt is None and _is_model(path):
        place = shlex.quote(str(path))
        raise CheckpointError(f"{path} is a MODEL already. Go on with it: bdtool export {place} -o bundle")
    if fmt is None:
        advice = "rename its keys to one of these layouts"
        if entry is None and (found := entries_with_networks(content)):
            advice = f"name the network to import: {_choice(found)}"
        held = listing(sorted(entries)) or "nothing"
        raise CheckpointError(f"{path} looks like none of {', '.join(FORMATS)}: it holds {held}; {advice}")
    prefixes = [f"{name}." for name in POLICY_ENTRIES if any(key.startswith(f"{name}.") for key in entries)]
    policy_prefix = prefixes[0] if fmt is BLOCKDROP and prefixes else None
    if fmt is BLOCKDROP:
        _require_resnet(path, entries, has_policy=policy_prefix is not None)
        entries = {key: value for key, value in entries.items() if not _is_unused(key, policy_prefix)}
    if odd := [f"{key} ({_kind(value)})" for key, value in entries.items() if not _is_plain_tensor(value)]:
        raise CheckpointError(
            f"{path}: unexpected keys that hold no plain tensor of 16 to 64-bit floats: {listing(odd)}; remove them, "
            "or save the network's own weights"
        )
    provenance = {
        "source": path.name,
        "format": fmt.name,
        **({} if entry is None else {"entry": entry}),
        "sha256": sha256_of_file(path),
        "created_by": "bdtool import",
    }
    return _Source(
        path=path, fmt=fmt, tensors=entries, policy_prefix=policy_prefix, shortcut=shortcut, provenance=provenance
    )


def _content_of(path: Path, content: Mapping[str, Any], entry: str) -> dict[str, Any]:
    if below := entries_below(content, entry):
        return below
    advice = _choice(found) if (found := entries_with_networks(content)) else "leave --entry out"
    raise CheckpointError(f"{path}: nothing lies in --entry {entry}; it holds {listing(sorted(content))}; {advice}")


def _choice(entries: list[str]) -> str:
    return " or ".join(f"--entry {shlex.quote(entry)}" for entry in entries[:3])


def _require_resnet(path: Path, entries: Mapping[str, Any], *, has_policy: bool) -> None:
    if any(key.startswith("resnet.") for key in entries):
        return
    why = "it is a checkpoint of curriculum learning, which trains the policy alone" if has_policy else "none was found"
    raise CheckpointError(
        f"{path} holds no 'resnet' network ({why}); import the fine-tuned checkpoint, which holds 'resnet' and 'agent'"
    )


def _is_unused(key: str, policy_prefix: str | None) -> bool:
    """True for the authors' value head (a training baseline) and the classifier that old policy files still carry."""
    return policy_prefix is not None and key.startswith((f"{policy_prefix}vnet.", f"{policy_prefix}features.fc"))


def _is_plain_tensor(value: Any) -> bool:
    """True for dense floating-point tensors with data, and for the integer step counter of BatchNorm.

    Not for floats of 8 bits: what they are to be multiplied with lies elsewhere.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return False
    return (value.is_floating_point() and value.element_size() > 1) or value.dim() == 0


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _spec(
    source: _Source,
    arch: Architecture,
    *,
    classes: int | None = None,
    given: GivenInput = _NOTHING_GIVEN,
    labels: tuple[str, ...] | None = None,
) -> ModelSpec:
    n_classes = source.n_classes or classes or (10 if arch.family == "cifar" else 1000)
    published = published_weights(arch, source.provenance["sha256"])
    if published is not None and given.resize is None:
        given = replace(given, resize=published_resize(published, size=given.size))
    try:
        preprocessing = default_preprocessing(source.fmt, arch, n_classes=n_classes, given=given)
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    return ModelSpec(
        arch=arch.name,
        n_classes=n_classes,
        labels=labels if labels is not None else default_labels(arch, n_classes=n_classes),
        preprocessing=preprocessing,
        shortcut=source.shortcut or source.fmt.shortcut(arch),
        has_policy=source.policy_prefix is not None,
        provenance={**source.provenance, **({} if published is None else {"weights": str(published)})},
    )


def _is_model(path: Path) -> bool:
    try:
        read_spec(path)
    except CheckpointError:
        return False
    return True


def _names_by_key(source: _Source, spec: ModelSpec) -> dict[str, str]:
    """Return our tensor names by the keys that the file should have."""
    prefix = source.policy_prefix or ""
    return {
        source.fmt.key(name, spec.architecture, policy_prefix=prefix): name for name in meta_model(spec).state_dict()
    }


def _difference(source: _Source, spec: ModelSpec) -> StateDifference:
    needed = shapes_of(meta_model(spec).state_dict())
    names = _names_by_key(source, spec)
    return compare_states(shapes_of(source.tensors), {key: needed[name] for key, name in names.items()})


def _check_tensors(source: _Source, spec: ModelSpec, names: Mapping[str, str]) -> None:
    """Refuse tensors that are not exactly those of `spec`, all differences named by the file's own keys."""
    fmt, arch = source.fmt, spec.architecture
    if arch.family not in fmt.families:
        raise CheckpointError(
            f"{source.path}: format {fmt.name} holds {' and '.join(fmt.families)} ResNets, and --arch {arch.name} is "
            f"none of these{_hint(source, arch)}"
        )
    if difference := _difference(source, spec):
        raise CheckpointError(f"{source.path} does not fit --arch {arch.name} ({difference}){_hint(source, arch)}")
    if bad := non_finite_names(source.tensors):
        raise CheckpointError(f"{source.path}: NaN or infinite weights in {listing(bad)}; use another checkpoint")
    variances = [key for key in source.tensors if names[key].endswith("running_var")]
    if bad := [key for key in variances if bool((source.tensors[key] < 0).any())]:
        raise CheckpointError(
            f"{source.path}: negative variances in {listing(bad)}, expected 0 or more; use another checkpoint"
        )
    assert source.tensors.keys() <= names.keys()


def _hint(source: _Source, tried: Architecture) -> str:
    """Return "; it looks like --arch NAME" where the tensors fit another depth, else advice without a name."""
    fitting = _fitting(source)
    if fitting is not None and fitting != tried:
        return f"; it looks like --arch {fitting.name}"
    return "; check --arch, --format and the shortcut kind"


def _architecture_of(source: _Source) -> Architecture:
    fitting = _fitting(source)
    if fitting is None:
        raise CheckpointError(
            f"{source.path} (format {source.fmt.name}) fits no architecture that bdtool knows. Name the nearest with "
            "--arch to see what differs, or another --format or --shortcut"
        )
    return fitting


def _fitting(source: _Source) -> Architecture | None:
    """Return the architecture whose tensors are those of the file."""
    for name in (*known_architectures(), *_cifar_depth(source)):
        arch = architecture(name)
        if arch.family in source.fmt.families and not _difference(source, _spec(source, arch)):
            return arch
    return None


def _cifar_depth(source: _Source) -> list[str]:
    """Return the CIFAR ResNet with as many blocks per stage as the file's first stage, if there is one."""
    first_stage = re.escape(source.fmt.base_prefix + source.fmt.block.format(layer=1, stage=0, i=""))
    first = re.compile(first_stage + r"(\d+)\.")
    found = {match[1] for key in source.tensors if (match := first.match(key))}
    return [f"resnet{6 * len(found) + 2}"] if 0 < len(found) < 1000 else []
