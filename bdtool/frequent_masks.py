"""Which keep masks a bundle's policy chooses on sample images: the path engines worth having ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from bdtool.data.batches import ImageSource
from bdtool.runtime.masks import MaskCount, count_masks
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import PolicyRequest

_BATCH = 64


def frequent_masks(
    runtime: Orchestrator,
    data: ImageSource,
    request: PolicyRequest,
    *,
    on_batch: Callable[[int], None] = lambda n_images: None,
) -> list[MaskCount]:
    """Count the masks of the images, the most frequent first; only the policy network runs.

    Args:
        runtime: an opened bundle, of any strategy but `full`.
        request: the policy whose masks are counted.
    """
    return count_masks(_decisions(runtime, data, request, on_batch))


def _decisions(
    runtime: Orchestrator,
    data: ImageSource,
    request: PolicyRequest,
    on_batch: Callable[[int], None],
) -> Iterator[np.ndarray]:
    for batch in data.batches(_BATCH):
        keep = request.given_at(batch.rows)
        yield runtime.decide(batch.images) if keep is None else keep
        on_batch(len(batch.images))
