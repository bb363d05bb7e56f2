"""Which keep masks a bundle's policy chooses on sample images: the path engines worth having ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from bdtool.data.batches import ImageSource
from bdtool.evaluation import keep_for
from bdtool.runtime.masks import MaskCount, count_masks
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import PolicyRequest

_BATCH = 64


def frequent_masks(
    runtime: Orchestrator,
    data: ImageSource,
    request: PolicyRequest,
    *,
    limit: int | None = None,
    on_batch: Callable[[int], None] = lambda n_images: None,
) -> list[MaskCount]:
    """Count the masks of the first `limit` images (None: all), the most frequent first; only the policy network runs.

    Args:
        runtime: an opened bundle, of any strategy but `full`.
        request: the policy whose masks are counted.
    """
    return count_masks(_decisions(runtime, data, request, limit, on_batch))


def _decisions(
    runtime: Orchestrator,
    data: ImageSource,
    request: PolicyRequest,
    limit: int | None,
    on_batch: Callable[[int], None],
) -> Iterator[np.ndarray]:
    first = 0
    for batch in data.batches(_BATCH, limit=limit):
        keep = keep_for(request, len(batch.images), first)
        yield runtime.decide(batch.images) if keep is None else keep
        first += len(batch.images)
        on_batch(len(batch.images))
