"""`RunResult`: what a batch of images gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.device_array import DeviceArray, Logits


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)  # arrays have no one truth value
class RunResult:
    """What came out for N images."""

    logits: Any  # float32 [N, classes]: a numpy array, or a `DeviceArray` where the images were on a GPU
    policy: np.ndarray  # bool [N, K], True = kept
    hits: np.ndarray | None = None  # bool [N], ran as one path engine; None for strategies without them

    @property
    def blocks_run(self) -> np.ndarray:
        """Blocks that ran for each image, int [N]."""
        blocks: np.ndarray = self.policy.sum(axis=1)
        return blocks

    @property
    def classes(self) -> np.ndarray:
        """The class with the largest logit, int [N].

        Raises:
            TypeError: the logits are on a GPU.
        """
        if isinstance(self.logits, DeviceArray):
            raise TypeError("the logits are on the GPU, like the images: take their argmax there, or pass numpy images")
        classes: np.ndarray = self.logits.argmax(axis=1)
        return classes


def joined(
    results: Sequence[RunResult], *, concatenate: Callable[[Sequence[Any]], Logits] = np.concatenate
) -> RunResult:
    """Return the results of several batches as that of one; `concatenate` joins their logits."""
    hits = [result.hits for result in results if result.hits is not None]
    return RunResult(
        logits=concatenate([result.logits for result in results]),
        policy=np.concatenate([result.policy for result in results]),
        hits=np.concatenate(hits) if hits else None,
    )
