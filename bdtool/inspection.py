"""What a MODEL or a BUNDLE is: the facts that `bdtool inspect` shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdtool.errors import BundleError
from bdtool.models.layout import network_from_spec
from bdtool.models.store import read_fitting_spec
from bdtool.runtime.masks import read_masks
from bdtool.runtime.recommendation import read_recommendations
from bdtool.specs import NetworkSpec, PartSpec, dict_from_preprocessing
from export.bundle import Bundle

_FINETUNE = "bdtool train finetune"  # as a MODEL says what made it


def describe_model(path: Path) -> dict[str, Any]:
    """Return the facts of a MODEL file, with its parts, from its header: the weights are not read.

    Raises:
        CheckpointError: it cannot be read as a MODEL, or its tensors are not those of what it says to be.
    """
    spec = read_fitting_spec(path)
    network = network_from_spec(spec)
    return {
        "kind": "MODEL",
        **_network_facts(network),
        "shortcut": spec.shortcut,
        "downscale": {"base": spec.downscale, **({"policy": spec.policy_downscale} if spec.has_policy else {})},
        "provenance": dict(spec.provenance),
        "parts": [_part_facts(part) for part in network.parts],
    }


def describe_bundle(path: Path) -> dict[str, Any]:
    """Return the facts of a bundle, with its parts, its precisions and what was built of it.

    Raises:
        BundleError: it is no bundle, or damaged.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    built = sorted(p for p in bundle.engines_path.iterdir() if p.is_dir()) if bundle.engines_path.is_dir() else []
    files = manifest.files
    return {
        "kind": "BUNDLE",
        **_network_facts(manifest.network),
        "max_batch": manifest.max_batch,
        **({"left_out": sorted(manifest.left_out), "kept": list(bundle.precisions)} if manifest.left_out else {}),
        "precisions": {name: dict(variant.calibration) for name, variant in manifest.variants.items()},
        "engines": [directory.name for directory in built],
        "built": {directory.name: _built_facts(directory, manifest.network) for directory in built},
        "provenance": dict(manifest.provenance),
        "environment": dict(manifest.environment),
        "parts": [
            {
                **_part_facts(part),
                "precision": files[part.name].precision,
                "error": files[part.name].error,
                "sha256": files[part.name].sha256,
            }
            for part in manifest.network.parts
        ],
    }


def tuned_for(provenance: Mapping[str, Any]) -> str | None:
    """Return the policy that a model's base was last fine-tuned for; None where it learned with every block.

    Every block at once is then not what the base is best at, and no baseline for an accuracy.
    """
    step: object = provenance
    while isinstance(step, Mapping):
        options = step.get("options")
        if step.get("created_by") == _FINETUNE and isinstance(options, Mapping):
            policy = str(options.get("policy", "learned"))
            return None if policy == "all" else policy
        step = step.get("start")
    return None


def _built_facts(directory: Path, network: NetworkSpec) -> dict[str, Any]:
    """Return what lies in a directory of engines: for how many parts, which masks and recommendations were noted.

    It says what is there, not whether it fits: a build or an open compares that.
    """
    recorded = {record.name.split(".")[0] for record in directory.glob("*.engine.json")}
    facts: dict[str, Any] = {
        "n_parts": len(recorded & {part.name for part in network.parts}),
        "masks": [],
        "recommendations": [],
        "problems": [],
    }
    try:
        facts["masks"] = [{"mask": m.mask, "share": m.share} for m in read_masks(directory, network.n_blocks)]
    except BundleError as exc:
        facts["problems"].append(str(exc))
    try:
        facts["recommendations"] = [
            {"strategy": r.strategy, "threads": r.threads, "batch": r.batch, "policy": r.policy}
            for r in read_recommendations(directory)
        ]
    except BundleError as exc:
        facts["problems"].append(str(exc))
    return facts


def _network_facts(network: NetworkSpec) -> dict[str, Any]:
    return {
        "arch": network.arch,
        "classes": network.n_classes,
        "labels": None if network.labels is None else list(network.labels),
        "stages": list(network.stages),
        "K": network.n_blocks,
        "policy": "learned" if network.has_policy else network.mask,
        "preprocessing": dict_from_preprocessing(network.preprocessing),
        "full_flops": network.full_flops,
    }


def _part_facts(part: PartSpec) -> dict[str, Any]:
    return {
        "name": part.name,
        "kind": part.kind,
        "input": list(part.inputs[0].shape),
        "output": list(part.outputs[0].shape),
        "flops": part.flops,
    }
