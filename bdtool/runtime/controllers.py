"""Who decides which blocks run. Nothing outside a controller knows where the bits come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from bdtool.errors import EngineError, PolicyError

# What a controller says of one block for a batch: all images keep it, none does, or who does (bool [N]).
Decision = bool | np.ndarray


class Controller(Protocol):
    """Decides block by block; today's know all bits before block 0, others may learn as they go."""

    def begin(self, n_images: int, probabilities: Callable[[], np.ndarray]) -> None:
        """Start a batch. `probabilities()` runs the policy part and returns P(keep), float32 [N, K]."""

    def keep(self, k: int) -> Decision:
        """Say who keeps block `k`; asked once for each block, in order."""

    def observe(self, k: int, emitted: Mapping[str, np.ndarray]) -> None:
        """Receive what block `k` wrote besides the activation, each [N, ...]; zeros where it was dropped."""

    @property
    def mask(self) -> np.ndarray | None:
        """The keep matrix bool [N, K] once `begin` returned, or None where the bits are found on the way."""

    @property
    def matrix(self) -> np.ndarray:
        """The keep matrix of the batch, bool [N, K], once every block was asked."""


class MaskController:
    """Knows the whole keep matrix before block 0: from the policy network, or given.

    Args:
        given: bool [N, K], or None to keep block k where the policy network's probability is >= `threshold`.
        threshold: of the policy network (the paper's and the authors' code: 0.5).
        run_policy: run the policy network although the bits are given, so that a measurement holds its cost.
    """

    def __init__(self, given: np.ndarray | None, *, threshold: float, run_policy: bool = False) -> None:
        self.given = given
        self._threshold = threshold
        self._run_policy = run_policy or given is None
        self._matrix = np.empty((0, 0), dtype=bool)
        self._decisions: list[Decision] | None = None

    def for_image(self, row: int) -> MaskController:
        """Return a controller that decides about one image of the batch as this one does."""
        given = None if self.given is None else self.given[row : row + 1]
        return MaskController(given, threshold=self._threshold, run_policy=self._run_policy)

    def begin(self, n_images: int, probabilities: Callable[[], np.ndarray]) -> None:
        learned = self._learned(probabilities()) if self._run_policy else None
        keep = learned if self.given is None else self.given
        assert keep is not None
        if len(keep) != n_images:
            raise PolicyError(f"controller: has keep bits for {len(keep)} images, {n_images} run. Give a row for each")
        self._matrix = keep
        self._decisions = None

    def keep(self, k: int) -> Decision:
        if self._decisions is None:  # not at once: strategies that take the whole mask never ask
            self._decisions = decisions_from_matrix(self._matrix)
        return self._decisions[k]

    def observe(self, k: int, emitted: Mapping[str, np.ndarray]) -> None:
        """Nothing to learn: the bits are known."""

    @property
    def mask(self) -> np.ndarray | None:
        return self._matrix

    @property
    def matrix(self) -> np.ndarray:
        return self._matrix

    def _learned(self, probabilities: np.ndarray) -> np.ndarray:
        keep: np.ndarray = finite_probabilities(probabilities) >= self._threshold
        return keep


def decisions_from_matrix(keep: np.ndarray) -> list[Decision]:
    """Return one decision for each block of a keep matrix [N, K]; plain bools where all images agree."""
    if len(keep) == 1:
        return list(keep[0].tolist())
    everybody: list[bool] = np.all(keep, axis=0).tolist()
    somebody: list[bool] = np.any(keep, axis=0).tolist()
    return [
        True if everyone else (keep[:, k] if anyone else False)
        for k, (everyone, anyone) in enumerate(zip(everybody, somebody, strict=True))
    ]


def finite_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Return P(keep) as it is; raise EngineError where a value is NaN or infinite."""
    if not all_finite(probabilities):
        raise EngineError(
            "the policy network's probabilities are not finite; run `bdtool verify` on the bundle, and check the input"
        )
    return probabilities


def all_finite(values: np.ndarray) -> bool:
    """Return whether no value is NaN or infinite."""
    # the reduction itself: on one image, `.all()` takes longer to get there than to compare
    return bool(np.logical_and.reduce(np.isfinite(values), axis=None))
