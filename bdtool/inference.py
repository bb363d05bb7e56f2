"""Image files in, labelled answers out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdtool.data.images import fit_image, read_image
from bdtool.errors import DataError
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import bits_of, parse_policy_for
from bdtool.specs import Preprocessing


def classify_files(
    runtime: Orchestrator, files: Sequence[Path], *, policy: str | None = None, resize: bool = False
) -> list[dict[str, Any]]:
    """Classify image files one by one; each answer has image, class, label, probability, blocks_run and policy.

    `policy` in an answer is a string of K bits, 1 = kept; `probability` is the softmax of the label.

    Raises:
        DataError: files are no images, or do not have the network's input size (and `resize` is False); all are named.
        PolicyError: the policy does not fit the network.
    """
    network = runtime.network
    request = parse_policy_for(network, policy)
    images = _read_all(files, network.preprocessing, resize=resize)
    rows = []
    for i, (file, image) in enumerate(zip(files, images, strict=True)):
        result = runtime.run(image[None], policy=request.given_at(np.array([i])))
        winner = int(result.classes[0])
        rows.append(
            {
                "image": str(file),
                "class": winner,
                "label": network.label(winner),
                "probability": float(softmax(result.logits)[0, winner]),
                "blocks_run": int(result.blocks_run[0]),
                "policy": bits_of(result.policy[0]),
            }
        )
    return rows


def _read_all(files: Sequence[Path], preprocessing: Preprocessing, *, resize: bool) -> list[np.ndarray]:
    images, problems = [], []
    for file in files:
        try:
            images.append(fit_image(read_image(file), preprocessing, source=str(file), resize=resize))
        except DataError as exc:
            problems.append(str(exc))
    if problems:
        raise DataError("\n".join(problems))
    return images


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis, float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
