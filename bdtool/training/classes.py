"""Whether the training images are of all the classes that a network tells apart."""

from __future__ import annotations

import logging

import numpy as np

from bdtool.data.batches import ImageSource
from bdtool.specs import NetworkSpec

logger = logging.getLogger(__name__)
_N_NAMED = 5


def warn_of_classes_without_images(images: ImageSource, network: NetworkSpec) -> None:
    """Log a warning that names them, as a wrong number of classes shows nowhere else."""
    if images.labels is None:
        return
    missing = np.setdiff1d(np.arange(network.n_classes), images.labels)
    if not missing.size:
        return
    names = [network.labels[number] if network.labels else str(number) for number in missing[:_N_NAMED]]
    logger.warning(
        "%s: no image of %d of the model's %d classes (%s), and it learns nothing of these. If that is not meant, make "
        "the network with another number of --classes",
        images.description,
        missing.size,
        network.n_classes,
        ", ".join(names) + (", ..." if missing.size > _N_NAMED else ""),
    )
