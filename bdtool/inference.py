"""Image files in, labelled answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bdtool.data.images import fit_image, read_image
from bdtool.errors import DataError
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import bits_of, parse_policy_for
from bdtool.specs import NetworkSpec


@dataclass(frozen=True, kw_only=True)
class Classified:
    """What became of image files: an answer for each that could be read, and why the others could not, by file."""

    answers: list[dict[str, Any]]
    refused: dict[str, str]


def classify_files(
    runtime: Orchestrator, files: Sequence[Path], *, policy: str | None = None, resize: bool = False, top: int = 1
) -> Classified:
    """Classify image files one by one; each answer has image, class, label, probability, blocks_run and policy.

    `policy` in an answer is a string of K bits, 1 = kept; `probability` is the softmax of the label. With `top` above 1
    an answer has `top`, too: class, label and probability of as many classes, or all, the most probable first. Files
    are refused that are no images, or do not have the network's input size where `resize` is False.

    Raises:
        PolicyError: the policy does not fit the network.
    """
    network = runtime.network
    request = parse_policy_for(network, policy)
    answers, refused = [], {}
    for i, file in enumerate(files):
        try:
            image = fit_image(read_image(file), network.preprocessing, source=str(file), resize=resize)
        except DataError as exc:
            refused[str(file)] = str(exc)
            continue
        result = runtime.run(image[None], policy=request.given_at(np.array([i])))
        best = _best(network, result.logits[0], top)
        answers.append(
            {
                "image": str(file),
                **best[0],
                "blocks_run": int(result.blocks_run[0]),
                "policy": bits_of(result.policy[0]),
            }
            | ({"top": best} if top > 1 else {})
        )
    return Classified(answers=answers, refused=refused)


def _best(network: NetworkSpec, logits: np.ndarray, n: int) -> list[dict[str, Any]]:
    """Return the `n` most probable classes of logits [classes], the most probable first."""
    probabilities = softmax(logits)
    order = np.argsort(-logits, kind="stable")[:n]  # equal ones as `argmax` takes them
    return [{"class": int(k), "label": network.label(int(k)), "probability": float(probabilities[k])} for k in order]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis, float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
