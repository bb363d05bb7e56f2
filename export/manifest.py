"""The bundle's manifest: what `manifest.json` says, checked when it is read.

Top-level keys: format_version, arch, n_classes, labels, K, stages, threshold, max_batch, policy, preprocessing, parts,
weights, provenance, environment. Each part: name, kind, index, file, sha256, reads, writes, inputs, outputs, shapes,
dtypes, flops, precision, error (worst difference from PyTorch at export) and tolerance.

A calibrated bundle also has `precisions`: by the precision asked for ("int8"), the `activation` dtype that passes
between its parts, a file with its precision, digest, error and tolerance for each part, and `calibration`: how it was
made and what its gates measured. `parts` above always describes fp32.

A packed bundle also has `left_out`: the files, of those that it lists, that `bdtool pack` did not copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from bdtool.errors import BundleError
from bdtool.specs import NetworkSpec, PartSpec, TensorSpec, dict_from_preprocessing, preprocessing_from_dict
from export.files import json_from_bytes, write_json
from export.half_spec import HALF_DTYPES
from export.wiring import check_wiring

# 2: pictures that are scaled bicubically, packed bundles; 3: networks that were trained for one mask
FORMAT_VERSION = 3
EXPORTED = "fp32"  # the precision of the parts that `bdtool export` writes
CALIBRATED = ("int8", "fp16", "bf16", "mixed")  # those that `bdtool calibrate` adds
_ACTIVATIONS = {"int8": "int8", "mixed": "float32", **HALF_DTYPES}  # dtype of `x` between the parts of each
DEFAULT_MAX_BATCH = 64
MANIFEST_NAME = "manifest.json"
_LEARNED = "learned"  # what `policy` says where a policy network decides; else the mask, or null
WEIGHTS_NAME = "weights.safetensors"  # the MODEL that the bundle was exported from
_COPY = "copy the bundle again, or export the model again to another place"
_DTYPES = ("float32", "float16", "bfloat16", "int8", "uint8")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a part or precision: file names are made of it


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """Where a part's ONNX model lies in the bundle, its digest, and how close to PyTorch it was at export."""

    file: str  # relative to the bundle, with forward slashes
    sha256: str
    precision: str
    error: float  # worst |onnx - torch| over the tensor's range, see export.check
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The same network in another precision, side by side with the exported one.

    `files` holds every part; its `precision` is the one obtained, which may differ from the one asked for: a policy
    network stays fp32 in an int8 variant, and points to the exported file.
    """

    activation: str  # dtype of the activation `x` between parts: "int8", "float16", "float32" ...
    files: Mapping[str, PartFile]  # by part name
    calibration: Mapping[str, Any]  # images, policy, method, gates


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything `manifest.json` holds."""

    network: NetworkSpec
    files: Mapping[str, PartFile]  # by part name
    weights_file: str
    weights_sha256: str
    max_batch: int
    provenance: Mapping[str, Any]
    environment: Mapping[str, str]
    variants: Mapping[str, Variant] = field(default_factory=dict)  # by the precision asked for, without fp32
    left_out: frozenset[str] = frozenset()  # files that are listed, but not there

    @property
    def listed(self) -> dict[str, tuple[str, str]]:
        """What each file is and its digest, by its path in the bundle; one that several parts share is told once."""
        rows = {file.file: (f"part {name!r}", file.sha256) for name, file in self.files.items()}
        for precision, variant in self.variants.items():
            for name, file in variant.files.items():
                rows.setdefault(file.file, (f"{precision} part {name!r}", file.sha256))
        return {**rows, self.weights_file: ("the weights", self.weights_sha256)}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically."""
    network = manifest.network
    write_json(
        directory / MANIFEST_NAME,
        {
            "format_version": _format_version(manifest),
            "arch": network.arch,
            "n_classes": network.n_classes,
            "labels": None if network.labels is None else list(network.labels),
            "K": network.n_blocks,
            "stages": list(network.stages),
            "threshold": network.threshold,
            "max_batch": manifest.max_batch,
            "policy": _LEARNED if network.has_policy else network.mask,
            "preprocessing": dict_from_preprocessing(network.preprocessing),
            "parts": [_dict_from_part(part, manifest.files[part.name]) for part in network.parts],
            "weights": {"file": manifest.weights_file, "sha256": manifest.weights_sha256},
            "provenance": dict(manifest.provenance),
            "environment": dict(manifest.environment),
            **_dict_from_variants(manifest.variants),
            **({"left_out": sorted(manifest.left_out)} if manifest.left_out else {}),
        },
    )


def _format_version(manifest: Manifest) -> int:
    """Return the first version that knows all of it, so that an older bdtool reads what it can."""
    if manifest.network.mask is not None:
        return 3
    return 2 if manifest.left_out or manifest.network.preprocessing.interpolation == "bicubic" else 1


def why_no_manifest(directory: Path) -> str | None:
    """Say why a directory's `manifest.json` is none of ours, so that what lies there may be anything.

    None: it is one, be it damaged in parts or of a newer format.
    """
    path = directory / MANIFEST_NAME
    try:
        data = _parsed(path)
    except OSError as exc:
        return f"it has no {MANIFEST_NAME}" if not path.exists() else f"its {MANIFEST_NAME}: {exc.strerror or exc}"
    except ValueError as exc:
        return f"its {MANIFEST_NAME} {exc}"
    missing = {"format_version", "parts"} - set(data)
    if missing:
        return f"its {MANIFEST_NAME} has no {' and no '.join(sorted(missing))}, expected in one of ours"
    if not isinstance(data["parts"], list):
        return f"its {MANIFEST_NAME} has parts that are no list"
    version = data["format_version"]
    if not _is_version(version):
        return f"its {MANIFEST_NAME} has format_version {version!r}, expected a number from 1 on"
    return None


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        BundleError: no bundle there, damaged JSON, a newer format, a missing or impossible field, or a path that
            leaves the bundle.
    """
    path = directory / MANIFEST_NAME
    try:
        data = _parsed(path)
    except FileNotFoundError as exc:
        if not directory.exists():
            raise BundleError(
                f"{directory}: no such directory. `bdtool export MODEL -o BUNDLE` makes a bundle"
            ) from exc
        raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST_NAME}. Make one: bdtool export") from exc
    except NotADirectoryError as exc:
        raise BundleError(f"{directory} is a file, not a bundle. Make one of a MODEL: bdtool export") from exc
    except OSError as exc:
        raise BundleError(f"{path} cannot be read ({exc.strerror or exc}); {_COPY}") from exc
    except ValueError as exc:
        raise BundleError(f"{path} {exc}; {_COPY}") from exc
    _check_version(path, data.get("format_version"))
    try:
        return _manifest_from_dict(data)
    except BundleError as exc:
        raise BundleError(f"{path}: {exc}") from exc
    except KeyError as exc:
        raise BundleError(f"{path}: no field {exc}; the file was changed or cut short, export the model again") from exc
    except (TypeError, ValueError, AttributeError, OverflowError) as exc:  # the last of 1e999
        raise BundleError(f"{path}: {exc}; the file was changed, export the model again") from exc


def _parsed(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file; a ValueError goes on from the file's name."""
    if path.is_fifo():
        raise ValueError("is a named pipe, which would be waited for")
    content = path.read_bytes()
    if not content.strip():
        raise ValueError("is empty")
    try:
        data = json_from_bytes(content)
    except ValueError as exc:
        raise ValueError(f"is not JSON, or cut short ({exc})") from exc
    if not isinstance(data, dict):
        raise ValueError(f"holds a JSON {type(data).__name__}, expected an object")
    return data


def _is_version(version: object) -> TypeGuard[int]:
    return isinstance(version, int) and not isinstance(version, bool) and version >= 1


def _check_version(path: Path, version: object) -> None:
    if not _is_version(version):
        raise BundleError(f"{path}: format_version is {version!r}, expected a number from 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version {version} is newer than this bdtool reads ({FORMAT_VERSION}); upgrade bdtool"
        )


def _manifest_from_dict(data: Mapping[str, Any]) -> Manifest:
    parts = tuple(_part_from_dict(part) for part in data["parts"])
    threshold = float(data["threshold"])
    if not 0 <= threshold <= 1:
        raise BundleError(f"threshold is {threshold}, expected a probability, 0 to 1; export the model again")
    network = NetworkSpec(
        arch=data["arch"],
        n_classes=int(data["n_classes"]),
        labels=None if data["labels"] is None else tuple(map(str, data["labels"])),
        preprocessing=preprocessing_from_dict(data["preprocessing"]),
        stages=tuple(map(int, data["stages"])),
        threshold=threshold,
        parts=parts,
        mask=None if data["policy"] == _LEARNED else data["policy"],
    )
    _check_parts(network, data)
    check_wiring(network)
    return Manifest(
        network=network,
        files={part["name"]: _file_from_dict(part) for part in data["parts"]},
        weights_file=_inside(data["weights"]["file"]),
        weights_sha256=_digest(data["weights"]["sha256"]),
        max_batch=int(data["max_batch"]),
        provenance=dict(data["provenance"]),
        environment=dict(data["environment"]),
        variants={
            _name(name): _variant_from_dict(name, one, network) for name, one in data.get("precisions", {}).items()
        },
        left_out=_left_out_from(data.get("left_out", [])),
    )


def _left_out_from(files: object) -> frozenset[str]:
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise BundleError(f"left_out is {files!r}, expected a list of files; pack the whole bundle again")
    return frozenset(map(_inside, files))


def _dict_from_variants(variants: Mapping[str, Variant]) -> dict[str, Any]:
    """Return the key `precisions`, or nothing for a bundle that was only exported: its manifest stays as it was."""
    if not variants:
        return {}
    rows = {
        name: {
            "activation": variant.activation,
            "parts": {part: asdict(file) for part, file in variant.files.items()},
            "calibration": dict(variant.calibration),
        }
        for name, variant in variants.items()
    }
    return {"precisions": rows}


def _variant_from_dict(name: str, data: Mapping[str, Any], network: NetworkSpec) -> Variant:
    files = {_name(part): _file_from_dict(file) for part, file in data["parts"].items()}
    missing = [part.name for part in network.parts if part.name not in files]
    if missing:
        raise BundleError(f"precision {name!r} lists no {', '.join(missing)}; run `bdtool calibrate` again")
    activation, expected = data["activation"], _ACTIVATIONS.get(name)
    if expected not in (None, activation):  # buffers are made for it, and engines of the parts take no other
        raise BundleError(
            f"precision {name!r} has activation {activation!r}, expected {expected!r}; run `bdtool calibrate` again"
        )
    return Variant(activation=str(activation), files=files, calibration=dict(data["calibration"]))


def _check_parts(network: NetworkSpec, data: Mapping[str, Any]) -> None:
    missing = [kind for kind in ("stem", "head", "full") if network.find(kind) is None]
    if data["policy"] == _LEARNED and not network.has_policy:
        missing.append("policy")
    if missing:
        raise BundleError(f"no {' and no '.join(missing)} part is listed; export the model again")
    if data["policy"] is None and network.has_policy:
        raise BundleError(f"policy is null but a policy part is listed, expected {_LEARNED!r}; export the model again")
    if data["K"] != network.n_blocks:
        raise BundleError(f"K is {data['K']} but the stages {list(network.stages)} have {network.n_blocks} blocks")
    for block in network.blocks:
        if block.inputs[0].shape != block.outputs[0].shape and network.find("shortcut", block.index) is None:
            raise BundleError(
                f"part {block.name!r} changes the shape but no shortcut is listed; export the model again"
            )
    for part in network.parts:
        if part.index is not None and part.kind not in ("block", "shortcut"):  # nobody would find it by its kind alone
            raise BundleError(
                f"part {part.name!r} has index {part.index!r}, expected null: only blocks and shortcuts have a number; "
                "export the model again"
            )
    if int(data["max_batch"]) < 1:
        raise BundleError(f"max_batch is {data['max_batch']}, expected at least 1; export the model again")
    if len({part.name for part in network.parts}) != len(network.parts):
        raise BundleError("two parts have the same name; export the model again")


def _dict_from_part(part: PartSpec, file: PartFile) -> dict[str, Any]:
    tensors = (*part.inputs, *part.outputs)
    return {
        "name": part.name,
        "kind": part.kind,
        "index": part.index,
        "file": file.file,
        "sha256": file.sha256,
        "reads": list(part.reads),
        "writes": list(part.writes),
        "inputs": [tensor.name for tensor in part.inputs],
        "outputs": [tensor.name for tensor in part.outputs],
        "shapes": {tensor.name: list(tensor.shape) for tensor in tensors},
        "dtypes": {tensor.name: tensor.dtype for tensor in tensors},
        "flops": part.flops,
        "precision": file.precision,
        "error": file.error,
        "tolerance": file.tolerance,
    }


def _part_from_dict(data: Mapping[str, Any]) -> PartSpec:
    def tensors(names: list[str]) -> tuple[TensorSpec, ...]:
        shapes, dtypes = data["shapes"], data["dtypes"]
        return tuple(TensorSpec(name=n, shape=_shape(n, shapes[n]), dtype=_dtype(n, dtypes[n])) for n in names)

    if int(data["flops"]) < 0:
        raise BundleError(f"part {data['name']!r} has {data['flops']} FLOPs; export the model again")
    return PartSpec(
        name=_name(data["name"]),
        kind=data["kind"],
        index=data["index"],
        reads=tuple(data["reads"]),
        writes=tuple(data["writes"]),
        inputs=tensors(data["inputs"]),
        outputs=tensors(data["outputs"]),
        flops=int(data["flops"]),
    )


def _file_from_dict(data: Mapping[str, Any]) -> PartFile:
    return PartFile(
        file=_inside(data["file"]),
        sha256=_digest(data["sha256"]),
        precision=str(data["precision"]),
        error=float(data["error"]),
        tolerance=float(data["tolerance"]),
    )


def _inside(file: str) -> str:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file or not path.parts or not file.isprintable():
        raise BundleError(f"the path {file!r} leaves the bundle; do not use this bundle, export the model again")
    return file


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise BundleError(
            f"{name!r} is no name of a part or precision: file names are made of it; do not use this bundle, export "
            "the model again"
        )
    return name


def _shape(tensor: str, axes: Sequence[int | str]) -> tuple[int | str, ...]:
    batch, *others = axes
    if not isinstance(batch, str) or not all(type(axis) is int and axis > 0 for axis in others):
        raise BundleError(f"tensor {tensor!r} has shape {list(axes)}, which is impossible; export the model again")
    return tuple(axes)


def _dtype(tensor: str, dtype: str) -> str:
    if dtype not in _DTYPES:
        raise BundleError(f"tensor {tensor!r} has dtype {dtype!r}, not one of {', '.join(_DTYPES)}; export it again")
    return dtype


def _digest(text: str) -> str:
    if not _SHA256.fullmatch(text):
        raise BundleError(f"{text!r} is not a SHA-256 digest; export the model again")
    return text
