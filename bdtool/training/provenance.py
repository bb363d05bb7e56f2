"""What a run was asked for, and what its MODEL says of how it was made."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bdtool.data.batches import ImageSource
from bdtool.models.model import BlockDropModel, build_model
from bdtool.models.model_spec import ModelSpec
from bdtool.runtime.policies import names_file
from bdtool.specs import dict_from_preprocessing
from bdtool.training.options import FinetuneOptions, StageOptions
from bdtool.training.place import TrainingPlace
from bdtool.version import version
from export.files import sha256_of_file


def run_request(
    spec: ModelSpec,
    stage: str,
    options: StageOptions,
    place: TrainingPlace,
    data: Mapping[str, str | int],
    *,
    amp: bool,
) -> dict[str, Any]:
    """Return all that a run's result depends on, as JSON values: a checkpoint of another request is refused."""
    return {
        "stage": stage,
        "arch": spec.arch,
        "classes": list(spec.labels or ()) or spec.n_classes,
        "preprocessing": dict_from_preprocessing(spec.preprocessing),
        "downscale": spec.downscale,
        "policy_file": _digest_of_policy(options),
        "data": dict(data),
        "start": place.start,
        "options": asdict(options),
        "amp": amp,
        "processes": place.group.size,
    }


def _digest_of_policy(options: StageOptions) -> str | None:
    """Return the digest of a POLICY that is a file; its name alone would let a run go on along other paths."""
    policy = options.policy if isinstance(options, FinetuneOptions) else None
    return sha256_of_file(Path(policy.strip())) if policy is not None and names_file(policy) else None


def origin_of(name: str, other: BlockDropModel | None) -> dict[str, Any]:
    """Return what a MODEL's provenance says of another that it learned from, where there is one."""
    return {} if other is None else {name: dict(other.spec.provenance)}


def versions() -> dict[str, str]:
    """Return the versions of what makes a MODEL, for its provenance."""
    return {"bdtool": version(), "torch": torch.__version__, "python": platform.python_version()}


def finished_model(
    model: BlockDropModel,
    stage: str,
    options: StageOptions,
    data: Mapping[str, str | int],
    val: ImageSource | None,
    figures: Mapping[str, float],
    origins: Mapping[str, Any],
) -> BlockDropModel:
    """Return the model on the CPU, in NCHW, with its provenance: how it was made, from what, and how good it is."""
    provenance: dict[str, Any] = {
        "created_by": f"bdtool train {stage}",
        "data": dict(data),
        "options": asdict(options),
        "seed": options.seed,
        "versions": versions(),
        **origins,
    }
    if val is not None:
        provenance |= {"val": val.name, "figures": dict(figures)}
    if model.spec.provenance:
        provenance["start"] = dict(model.spec.provenance)
    spec = dataclasses.replace(model.spec, provenance=provenance)
    finished = build_model(spec)
    finished.load_state_dict(model.state_dict())
    return finished
