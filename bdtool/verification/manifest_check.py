"""What a bundle's manifest says of its network, beside what the MODEL in the bundle says: they must be one network.

The manifest has no digest of its own, and its labels, preprocessing and threshold change what every engine's answer
means, though each engine computes what it should.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from bdtool.models.model import BlockDropModel
from bdtool.models.parts import network_spec
from bdtool.specs import NetworkSpec
from export.bundle import Bundle
from export.check import TOLERANCES
from export.manifest import EXPORTED, Manifest


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def compare_with_model(bundle: Bundle, model: BlockDropModel) -> tuple[int, list[str]]:
    """Return how many fields of the manifest were compared with the MODEL, and what to say of each that differs.

    Compared are the network (arch, classes, labels, preprocessing, stages, threshold, parts with shapes and FLOPs), the
    provenance but for the name of the exporter, and what export recorded of each part. `max_batch`, `environment` and
    the records of calibrations are known to the manifest alone.
    """
    manifest = bundle.manifest
    provenance = {**model.spec.provenance, "model_sha256": manifest.weights_sha256}
    known = _facts({**_tree(network_spec(model).with_full()), "provenance": provenance})
    told = {name: value for name, value in manifest.provenance.items() if name != "exported_by"}
    found = _facts({**_tree(manifest.network), "provenance": told})
    names = list(dict.fromkeys([*known, *found]))
    pairs = [(name, found.get(name, _ABSENT), known.get(name, _ABSENT)) for name in names]
    differing = [_difference(name, says, must) for name, says, must in pairs if says != must]
    return len(names), [*differing, *_impossible_records(manifest)]


def _difference(name: str, says: Any, must: Any) -> str:
    more = ""
    if isinstance(says, list) and isinstance(must, list) and len(says) == len(must):  # name the first that differs
        differing = [index for index, pair in enumerate(zip(says, must, strict=True)) if pair[0] != pair[1]]
        more = f" ({len(differing)} of {len(must)} differ)" if len(must) > 1 else ""
        name, says, must = f"{name}[{differing[0]}]", says[differing[0]], must[differing[0]]
    return f"{name} is {reprlib.repr(says)}, the MODEL says {reprlib.repr(must)}{more}"


def _tree(network: NetworkSpec) -> dict[str, Any]:
    parts = {part.name: asdict(part) for part in network.parts}
    return {**asdict(network), "parts": parts, "order of parts": list(parts)}


def _facts(value: Any, name: str = "") -> dict[str, Any]:
    """Return the values of nested dicts by names such as parts.stem.inputs[0].shape; lists of values are one field."""
    if isinstance(value, Mapping):
        inner = {f"{name}.{key}" if name else str(key): one for key, one in value.items()}
    elif not isinstance(value, list | tuple):
        return {name: value}
    elif any(isinstance(one, Mapping) for one in value):
        inner = {f"{name}[{index}]": one for index, one in enumerate(value)}
    else:
        return {name: list(value)}
    return {path: field for key, one in inner.items() for path, field in _facts(one, key).items()}


def _impossible_records(manifest: Manifest) -> Iterator[str]:
    """Yield what export cannot have recorded of a part: it writes fp32, and nothing whose error is above the bound."""
    bound = TOLERANCES[EXPORTED]
    for name, file in manifest.files.items():
        if file.precision != EXPORTED:
            yield f"parts.{name}.precision is {file.precision!r}, export writes {EXPORTED!r}"
        if not 0 <= file.error <= file.tolerance <= bound:  # NaN, too
            yield f"parts.{name}.error is {file.error:g} of allowed {file.tolerance:g}, export allows {bound:g}"
