"""What is run under the clock: which images in which requests, for how long, and what the clock holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container
from dataclasses import dataclass, replace

import numpy as np

from bdtool.errors import UsageError
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.place import Place
from bdtool.runtime.result import RunResult
from export.manifest import CALIBRATED, EXPORTED

BASELINE = "full"
PRECISIONS = (EXPORTED, *CALIBRATED)
BOUNDARY = (
    "uint8 images in host memory to logits in host memory: preprocessing, policy network, kept blocks, head; "
    "reading and decoding files is outside"
)
Run = Callable[[np.ndarray, np.ndarray | None], RunResult]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how wide to measure; names as in trtexec."""

    batch: int = 1
    warmup_ms: float = 200
    duration_s: float = 3
    percentiles: tuple[float, ...] = (90, 95, 99)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.warmup_ms < 0 or not self.duration_s > 0:
            raise ValueError(f"batch and duration must be positive and warmup_ms not negative; got {self}")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The images to run, uint8 [M, H, W, 3], and their keep bits [M, K] (None: the policy network decides)."""

    images: np.ndarray
    keep: np.ndarray | None

    @property
    def images_sha256(self) -> str:
        """Digest of the pixels and their shape: the same images from another place have the same one."""
        return _sha256(self.images)

    @property
    def keep_sha256(self) -> str | None:
        """Digest of the keep bits; None where the policy network decides."""
        return None if self.keep is None else _sha256(self.keep)

    def request(self, index: int, batch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return request number `index`: `batch` images, starting again from the first when the images run out."""
        rows = np.arange(index * batch, (index + 1) * batch) % len(self.images)
        return self.images[rows], None if self.keep is None else self.keep[rows]

    def requests(self, batch: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Return the fewest requests that hold every image; the last one is filled up with the first images again."""
        return [self.request(i, batch) for i in range(math.ceil(len(self.images) / batch))]


def _sha256(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What is measured under a name `STRATEGY[@PRECISION][@MODE]`; None: as all others of the profile."""

    strategy: str
    precision: str | None = None
    cuda_graph: str | None = None

    def place(self, place: Place) -> Place:
        """Return where it runs, in a profile of `place`."""
        return replace(
            place, precision=self.precision or place.precision, cuda_graph=self.cuda_graph or place.cuda_graph
        )


def contender_of(name: str) -> Contender:
    """Return what is measured under that name.

    Raises:
        UsageError: two precisions, or two CUDA graph modes.
    """
    strategy, *words = name.split("@")
    precisions = [word for word in words if word in PRECISIONS]
    modes = [word for word in words if word not in PRECISIONS]
    if len(precisions) > 1 or len(modes) > 1:
        raise UsageError(f"strategy {name!r}: expected at most one precision and one CUDA graph mode behind it")
    return Contender(
        strategy=strategy,
        precision=precisions[0] if precisions else None,
        cuda_graph=modes[0] if modes else None,
    )


def is_static(name: str) -> bool:
    """Say whether what is measured under that name is a static ResNet: `full`, or `full:<arch>` of another bundle."""
    return contender_of(name).strategy == BASELINE or name.startswith(f"{BASELINE}:")


def baseline_of(name: str, measured: Container[str]) -> str:
    """Return the static network to compare a strategy with: `full` in its precision where measured, else `full`."""
    own = f"{BASELINE}@{contender_of(name).precision}"
    return own if own in measured else BASELINE


def heads_page(name: str) -> bool:
    """Say whether a page whose accuracy is of the profile's own precision may show this latency beside it."""
    return not is_static(name) and contender_of(name).precision is None


def runner(name: str, runtime: Orchestrator) -> Run:
    """Return what answers a request. Given bits still pay for the policy network, whose cost belongs to the answer."""
    if is_static(name):
        return lambda images, keep: runtime.run(images)
    return lambda images, keep: runtime.run(images) if keep is None else runtime.run_with_policy_cost(images, keep)
