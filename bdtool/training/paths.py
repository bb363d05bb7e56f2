"""Which blocks the base runs for each training image where no policy network learns: a heuristic's, or its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bdtool.data.batches import ImageSource
from bdtool.errors import PolicyError
from bdtool.models.model import BlockDropModel
from bdtool.runtime.policies import PolicyRequest
from bdtool.torch_classifier import TorchClassifier
from bdtool.training.distributed import Group
from bdtool.training.tasks import Paths, Step


def heuristic_paths(request: PolicyRequest, images: ImageSource) -> Paths:
    """Return the paths of a POLICY other than learned: an image's row of a file, or a row drawn anew in each step.

    Raises:
        PolicyError: the POLICY is a file with another number of rows than the data set has images, all of them.
    """
    if request.n_rows is None:
        return lambda step: torch.from_numpy(_drawn(request, step))
    n_images = images.n_images if images.drawn_from is None else images.drawn_from[1]
    if request.n_rows != n_images:
        raise PolicyError(
            f"policy {request.name}: got {request.n_rows} rows for {n_images} training images, expected one row for "
            "each. Write it for this data set, or give one row [K] for all"
        )
    rows = np.arange(n_images) if images.rows is None else images.rows
    return _rows_of_images(torch.from_numpy(request.matrix_at(rows)))


def deployed_paths(
    model: BlockDropModel,
    images: ImageSource,
    *,
    group: Group,
    thresholds: tuple[float, float] | None = None,
    seed: int = 0,
) -> Paths:
    """Return the paths that the policy network of `model` takes now for each image as it is, without augmentation.

    So it decides in training as it will decide when deployed: of a picture that was cropped, black moving in, it would
    keep more blocks. Reads the data set once, on the first process.

    Args:
        thresholds: draw one between these for each image of each step, in place of the model's own: the base then
            learns the paths that it will be deployed with at all of them.
        seed: of these draws.
    """
    probability = torch.empty(images.n_images, model.n_blocks, device=group.device)
    classifier = TorchClassifier(model)
    if group.is_first:
        rows = [classifier.keep_probability(batch.images) for batch in images.batches(500)]
        probability = torch.from_numpy(np.concatenate(rows)).to(group.device)
    probability = group.from_first(probability).cpu()
    if thresholds is None:
        return _rows_of_images(probability >= classifier.network.threshold)
    return lambda step: probability[step.images] >= torch.from_numpy(_thresholds(step, *thresholds, seed=seed))


def _rows_of_images(keep: Tensor) -> Paths:
    return lambda step: keep[step.images]


def _thresholds(step: Step, low: float, high: float, *, seed: int) -> np.ndarray:
    """Return a threshold for each image of a process, float32 [n, 1]; all processes together draw what one would."""
    n_batch = len(step.images) * step.n_ranks
    # a counter that is far from those of other steps
    numbers = np.random.Generator(np.random.Philox(key=seed, counter=step.number << 64))
    drawn: np.ndarray = numbers.uniform(low, high, (n_batch, 1)).astype(np.float32)
    return drawn[step.rank :: step.n_ranks]


def _drawn(request: PolicyRequest, step: Step) -> np.ndarray:
    n_batch = len(step.images) * step.n_ranks
    return request.matrix(n_batch, first=step.number * n_batch)[step.rank :: step.n_ranks]
