"""What a caller of `Orchestrator.run` asks for by `policy`, as the keep matrix of the batch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from bdtool.errors import PolicyError
from bdtool.runtime.policies import PolicyRequest, keep_matrix_from, names_file, parse_policy_for
from bdtool.specs import NetworkSpec

PolicyLike = str | npt.ArrayLike | None


class PolicyReader:
    """Reads policies for one network; texts that came before are not parsed again, files are.

    Args:
        runs_all: every block runs whatever is asked for, so nothing else may be asked for.
    """

    def __init__(self, network: NetworkSpec, *, runs_all: bool) -> None:
        self._network = network
        self._runs_all = runs_all
        self._parse = lru_cache(maxsize=64)(self._parse_text)

    def keep_matrix(self, policy: PolicyLike, n_images: int, *, first: int | None = None) -> np.ndarray | None:
        """Return the keep matrix bool [n_images, K] asked for, or None where the policy network decides.

        Args:
            first: number of the first image in the data set that a file has rows for; None: the batch is that set.

        Raises:
            PolicyError: the policy does not fit the network or the number of images, or drops what always runs.
        """
        if self._runs_all:
            every_block = np.ones((n_images, self._network.n_blocks), dtype=bool)
            if policy is None or self._keeps_every_block(policy, n_images, first):
                return every_block
            raise PolicyError("strategy 'full' runs every block; choose another, such as 'chain', for a policy")
        if policy is None or isinstance(policy, str):
            return self._matrix_of(policy, n_images, first)
        return keep_matrix_from(policy, n_images, self._network.n_blocks)

    def _keeps_every_block(self, policy: str | npt.ArrayLike, n_images: int, first: int | None) -> bool:
        if not isinstance(policy, str):
            return bool(keep_matrix_from(policy, n_images, self._network.n_blocks).all())
        keep = self._matrix_of(policy, n_images, first)
        return keep is not None and bool(keep.all())

    def _matrix_of(self, policy: str | None, n_images: int, first: int | None) -> np.ndarray | None:
        is_file = policy is not None and names_file(policy)  # which may be written anew between two calls
        request = self._parse_text(policy) if is_file else self._parse(policy)
        if first is not None and first < 0:
            raise ValueError(f"first: got {first}, expected the number of an image, from 0 on")
        if request.is_learned:
            return None
        if first is None and request.n_rows not in (None, n_images):
            raise PolicyError(
                f"policy {request.name}: got {request.n_rows} rows for {n_images} images, expected one row for each "
                "image. Pass `first`, the number of the batch's first image in the data set that the file is for"
            )
        return request.matrix(n_images, first=first or 0)

    def _parse_text(self, policy: str | None) -> PolicyRequest:
        network = self._network
        return parse_policy_for(network, policy)
