"""MODEL files: one safetensors file with the weights, and in its header what they are.

Importing this file and reading a header load no torch. Loading never unpickles: a safetensors file is a JSON header and
plain bytes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from bdtool.errors import CheckpointError, UsageError
from bdtool.models.architectures import policy_downscale
from bdtool.models.difference import COUNTER, compare_states
from bdtool.models.layout import tensor_shapes
from bdtool.models.model_spec import ModelSpec
from bdtool.specs import dict_from_preprocessing, preprocessing_from_dict
from bdtool.words import listing
from export.files import advice_on, atomic_path, json_from_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from bdtool.models.model import BlockDropModel

# 2: policy networks with a hidden layer; 3: networks that scale images down; 4: ResNeXt, wide ResNets, bicubic scaling;
# 5: bases that were trained for one mask
FORMAT_VERSION = 5
_VERSION_OF = {"policy_hidden": 2, "downscale": 3, "policy_downscale": 3, "mask": 5}  # the first with each field
_METADATA_KEY = (
    "bdtool"  # one key only: safetensors does not keep the order of several, and equal input gives equal bytes
)


def save_model(model: BlockDropModel, path: Path) -> None:
    """Write `model` to `path` as one MODEL file, atomically; equal models give equal bytes.

    Raises:
        CheckpointError: a weight is NaN or infinite, or the file cannot be written.
    """
    from safetensors.torch import save_file

    from bdtool.models.state import non_finite_names

    tensors = {name: _stored(tensor) for name, tensor in model.state_dict().items()}
    if bad := non_finite_names(tensors):
        raise CheckpointError(f"{path.name} not written: NaN or infinite weights in {listing(bad)}; train again")
    metadata = {_METADATA_KEY: json.dumps(_header_from_spec(model.spec), sort_keys=True, allow_nan=False)}
    target = path.resolve()  # a symbolic link stays one
    if target.exists() and not target.is_file():
        raise CheckpointError(f"{path} is no regular file, and a MODEL needs one; choose another place")
    try:
        with atomic_path(target) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be written: {exc.strerror or exc}; {advice_on(exc)}") from exc
    except SafetensorError as exc:  # of a full disk
        raise CheckpointError(f"{path} cannot be written: {exc}; make room") from exc


def load_model(path: Path) -> BlockDropModel:
    """Return the model of a MODEL file, in eval mode, on the CPU.

    Raises:
        CheckpointError: the file is not a whole MODEL file, is newer than this bdtool, or its tensors do not fit.
    """
    from bdtool.models.state import model_from_state, non_finite_names

    spec = read_fitting_spec(path)
    tensors = _read_tensors(path)
    if bad := non_finite_names(tensors):
        raise CheckpointError(f"{path}: NaN or infinite weights in {listing(bad)}; import or train it again")
    return model_from_state(spec, tensors)


def read_fitting_spec(path: Path) -> ModelSpec:
    """Return what a MODEL file's header says, after comparing the tensors that it lists with those that this needs.

    Neither loads torch nor reads a weight, however large the file is.

    Raises:
        CheckpointError: as `read_spec`, or names, shapes or data types of the tensors do not fit.
    """
    spec = read_spec(path)
    listed = _read_listing(path)
    try:
        needed = tensor_shapes(spec)
    except UsageError as exc:
        raise CheckpointError(f"{path}: no {spec.arch} is as its header says: {exc}") from exc
    if difference := compare_states({name: shape for name, (shape, _) in listed.items()}, needed):
        raise CheckpointError(f"{path} does not fit the {spec.arch} in its header ({difference}); import it again")
    dtypes = {name: "I64" if name.endswith(COUNTER) else "F32" for name in listed}
    if wrong := [f"{name} {dtype}" for name, (_, dtype) in listed.items() if dtype != dtypes[name]]:
        raise CheckpointError(f"{path}: unexpected data types of {listing(wrong)}; import it again")
    return spec


def read_spec(path: Path) -> ModelSpec:
    """Return what a MODEL file's header says of the model; see `read_fitting_spec`.

    Raises:
        CheckpointError: the file is not a whole MODEL file, or is newer than this bdtool.
    """
    text = _read_metadata(path).get(_METADATA_KEY)
    if text is None:
        raise CheckpointError(f"{path} is a safetensors file, not a MODEL; {_how_to_import(path)}")
    try:
        header = json_from_bytes(text)
        version = int(header["format_version"])
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format_version {version}, this bdtool reads up to {FORMAT_VERSION}; upgrade bdtool"
            )
        json.dumps(header["provenance"], allow_nan=False)  # else what is trained from it cannot be saved, hours later
        return _spec_from_header(header)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UsageError) as exc:  # of 1e999
        raise CheckpointError(f"{path}: its header is damaged ({type(exc).__name__}: {exc}); import it again") from exc


def _header_from_spec(spec: ModelSpec) -> dict[str, Any]:
    optional = _optional(spec)
    return {
        "format_version": _format_version(spec, optional),
        "arch": spec.arch,
        "n_classes": spec.n_classes,
        "labels": spec.labels,
        "preprocessing": dict_from_preprocessing(spec.preprocessing),
        "shortcut": spec.shortcut,
        "has_policy": spec.has_policy,
        "stages": spec.architecture.stages,
        "provenance": dict(spec.provenance),
        **optional,
    }


def _format_version(spec: ModelSpec, optional: Collection[str]) -> int:
    """Return the first version that knows all of it, so that an older bdtool reads what it can."""
    versions = {_VERSION_OF[name] for name in optional}
    if not spec.arch.startswith("resnet") or spec.preprocessing.interpolation != "bilinear":  # "resnext...", too
        versions.add(4)
    return max(versions, default=1)


def _optional(spec: ModelSpec) -> dict[str, int | str]:
    """Return the fields that not every version of bdtool knows, where they are not what those take for granted."""
    usual = {
        "policy_hidden": 0,
        "downscale": 1,
        "policy_downscale": policy_downscale(spec.architecture.family),
        "mask": None,
    }
    return {name: getattr(spec, name) for name in _VERSION_OF if getattr(spec, name) != usual[name]}


def _spec_from_header(header: Mapping[str, Any]) -> ModelSpec:
    spec = ModelSpec(
        arch=header["arch"],
        n_classes=int(header["n_classes"]),
        labels=None if header["labels"] is None else tuple(str(label) for label in header["labels"]),
        preprocessing=preprocessing_from_dict(header["preprocessing"]),
        shortcut=header["shortcut"],
        has_policy=bool(header["has_policy"]),
        provenance=dict(header["provenance"]),
        **{name: int(header[name]) for name in _VERSION_OF if name in header and name != "mask"},
        mask=header.get("mask"),
    )
    if tuple(header["stages"]) != spec.architecture.stages:
        raise ValueError(f"stages {header['stages']} are not those of {spec.arch}, {list(spec.architecture.stages)}")
    return spec


def _stored(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


def _read_metadata(path: Path) -> Mapping[str, str]:
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as exc:
        raise _unreadable(path, exc) from exc


def _read_listing(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and data type, as safetensors names it, of every tensor in the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            return {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError) as exc:
        raise _unreadable(path, exc) from exc


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as exc:
        raise _unreadable(path, exc) from exc


def _how_to_import(path: Path) -> str:
    # not `model.safetensors`, which foreign ones are often called
    return f"make one of it: bdtool import {shlex.quote(str(path))} -o imported.safetensors"


def _unreadable(path: Path, exc: Exception) -> CheckpointError:
    if isinstance(exc, OSError):
        return CheckpointError(f"{path} cannot be read: {exc.strerror or exc}")
    if path.stat().st_size == 0:
        return CheckpointError(f"{path} is empty, expected a MODEL (.safetensors). Copy or import it again")
    if path.suffix == ".npz":
        return CheckpointError(f"{path} is a file of arrays, as --data takes them, expected a MODEL (.safetensors)")
    start = _first_bytes(path)
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):  # a zip archive, or an older one's pickle
        return CheckpointError(f"{path} is a file by torch.save, not a MODEL; {_how_to_import(path)}")
    if len(start) > 8 and start[8:] != b"{":  # where the header of a safetensors file begins
        return CheckpointError(
            f"{path} is no safetensors file, expected a MODEL, as `bdtool import` or `bdtool train` writes it"
        )
    return CheckpointError(
        f"{path} is no MODEL, or not a whole one: as a safetensors file it is damaged ({exc}). Copy or import it again"
    )


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)
