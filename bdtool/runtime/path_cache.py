"""Engines of whole paths by keep mask: a bounded cache that joins those of masks as they come up."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from weakref import WeakKeyDictionary

import numpy as np

from bdtool.errors import BdtoolError
from bdtool.runtime.chain import Lane
from bdtool.runtime.masks import SHARES_SLACK, MaskCount
from engines.base import Call, Engine, JoinedEngine

logger = logging.getLogger(__name__)

BUILD_AFTER = 2  # times that a mask is seen before its engine is joined: a mask seen once may never come again
_MAX_COUNTED = 4096  # masks whose sightings are counted
HALVE_AFTER = 4096  # images, after which all counts are halved: what comes now counts more than what came once
_TIMES_MORE = 2  # how often a mask has to be seen for each sighting of the one that would go for it
_MAX_WAITING = 8  # engines that wait to be joined in the background


@dataclass(frozen=True, kw_only=True)
class PathOptions:
    """What the path cache holds.

    Attributes:
        max_paths: engines kept; the least recently used one goes, for a mask that comes twice as often.
        max_bytes: memory of all engines kept, as the backend estimates it; weights that they share count once.
        ahead: masks, bool [K] each or [n, K], joined when the bundle is opened; of equally frequent ones the first
            come first. May be those of sample images, as `Orchestrator.decide` gives them: repeated ones add up.
        shares: of the images that take each of `ahead`, 0 to 1. None: as many take each, and none takes another.
        background: join engines of masks that come up while running, in a thread of its own.
    """

    max_paths: int = 64
    max_bytes: int = 256 * 2**20
    ahead: Sequence[np.ndarray] = ()
    shares: Sequence[float] | None = None
    background: bool = True

    def __post_init__(self) -> None:
        if self.max_paths < 1 or self.max_bytes < 1:
            raise ValueError(f"max_paths and max_bytes must be at least 1; got {self.max_paths} and {self.max_bytes}")
        if self.shares is not None and (len(self.shares) != len(self.ahead) or not _are_shares(self.shares)):
            raise ValueError(
                f"shares: got {list(self.shares)} for {len(self.ahead)} masks ahead; expected as many, of at least 0 "
                "and of at most 1 together"
            )
        for mask in map(np.asarray, self.ahead):
            wrong = mask[(mask != 0) & (mask != 1)] if mask.dtype.kind in "iuf" else np.empty(0)
            if wrong.size:
                raise ValueError(
                    f"ahead: got the value {wrong[0]:g}, expected only 0 (drop) and 1 (keep); `Orchestrator.decide` "
                    "gives the bits of images"
                )

    @classmethod
    def of_counts(cls, counts: Sequence[MaskCount], *, background: bool = True) -> PathOptions:
        """Return the options for masks that were counted."""
        masks, shares = [count.keep for count in counts], [count.share for count in counts]
        return cls(ahead=masks, shares=shares, background=background)

    def frequent(self) -> list[tuple[np.ndarray, float]]:
        """Return the masks that are prepared for, bool [K] each, with the share of the images that take each.

        They are different ones, the most frequent first.
        """
        shares = [1 / len(self.ahead) for _ in self.ahead] if self.shares is None else self.shares
        masks: dict[bytes, np.ndarray] = {}
        taken: dict[bytes, float] = {}
        for given, share in zip(self.ahead, shares, strict=True):
            mask = np.asarray(given, dtype=bool)
            key = mask.tobytes()
            masks.setdefault(key, mask)
            taken[key] = taken.get(key, 0.0) + share
        order = sorted(taken, key=taken.__getitem__, reverse=True)
        return [(masks[key], taken[key]) for key in order[: self.max_paths]]

    def frequent_share(self) -> float:
        """Return the share of the images that takes one of the masks prepared for, 0 to 1."""
        return min(1.0, sum(share for _, share in self.frequent()))


def _are_shares(values: Sequence[float]) -> bool:
    return all(value >= 0 for value in values) and sum(values) <= 1 + SHARES_SLACK


@dataclass(frozen=True, kw_only=True)
class PathStats:
    """What the path cache has done since the bundle was opened.

    Images of different masks are not looked up where they run through the chain in any case: in a batch that is on the
    GPU, or of a backend that makes a plan for each batch size. They count as neither hits nor misses.
    """

    hits: int  # images that ran as one path engine
    misses: int  # images whose mask had no engine, and that ran through the chain
    n_paths: int  # engines held now
    n_bytes: int  # of memory that they take, estimated, and of the weights that they share
    max_bytes: int
    joined: int
    dropped: int

    @property
    def hit_rate(self) -> float:
        """Share of images that hit, 0 to 1; NaN before the first."""
        images = self.hits + self.misses
        return self.hits / images if images else float("nan")

    def __add__(self, other: PathStats) -> PathStats:
        """Return the figures of two caches together."""
        return PathStats(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})


@dataclass(kw_only=True)
class PathEngine:
    """A path engine, bound to the buffers of each lane it was used with; weakly, as the chain drops lanes."""

    engine: Engine
    n_bytes: int  # of its own
    calls: WeakKeyDictionary[Lane, Call] = field(default_factory=WeakKeyDictionary)


class PathCache:
    """Path engines by mask, at most as many as the options say; safe for one user and its background thread."""

    def __init__(self, join: Callable[[np.ndarray], JoinedEngine], options: PathOptions) -> None:
        self._join = join
        self._options = options
        self._paths: OrderedDict[bytes, PathEngine] = OrderedDict()
        self._seen: OrderedDict[bytes, float] = OrderedDict()  # images; -inf: its engine is not to be had
        self._n_counted = 0  # images, since counts were halved
        self._waiting: set[bytes] = set()
        self._lock = threading.Lock()
        self._own_bytes = self._shared_bytes = self._hits = self._misses = self._joined = self._dropped = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bdtool-paths") if options.background else None
        for mask, _ in options.frequent():
            if not self._add(mask, ahead=True):
                break
            self._seen[mask.tobytes()] = BUILD_AFTER

    def get(self, mask: np.ndarray, n_images: int = 1) -> PathEngine | None:
        """Return the engine of a mask bool [K], or None; a mask seen often enough is then joined in the background."""
        key = mask.tobytes()
        with self._lock:
            path = self._paths.get(key)
            self._count(key, n_images)
            if path is not None:
                self._paths.move_to_end(key)
                self._hits += n_images
                return path
            self._misses += n_images
            if wanted := self._is_wanted(key):
                self._waiting.add(key)
        if wanted and self._thread is not None:
            self._thread.submit(self._add_in_background, mask.copy())
        return None

    @property
    def stats(self) -> PathStats:
        with self._lock:
            return PathStats(
                hits=self._hits,
                misses=self._misses,
                n_paths=len(self._paths),
                n_bytes=self._n_bytes(),
                max_bytes=self._options.max_bytes,
                joined=self._joined,
                dropped=self._dropped,
            )

    def settle(self) -> None:
        """Wait until the background thread has nothing left to join."""
        if self._thread is not None:
            self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Stop joining; a join under way is finished."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._paths.clear()
            self._own_bytes = self._shared_bytes = 0

    def _count(self, key: bytes, n_images: int) -> None:
        self._seen[key] = self._seen.pop(key, 0) + n_images
        if len(self._seen) > _MAX_COUNTED:
            self._seen.popitem(last=False)
        self._n_counted += n_images
        if self._n_counted >= HALVE_AFTER:
            self._n_counted = 0
            self._seen = OrderedDict((mask, count / 2) for mask, count in self._seen.items())

    def _is_wanted(self, key: bytes) -> bool:
        """Say whether the engine of a mask that has none should be joined now.

        Where another would go for it, only if it comes more often: of more masks than fit, which all come alike often,
        engines would be joined without end, for nothing.
        """
        if self._seen[key] < BUILD_AFTER or key in self._waiting or len(self._waiting) >= _MAX_WAITING:
            return False
        if self._shared_bytes >= self._options.max_bytes:
            return False  # no engine is ever kept
        return not self._is_full() or self._seen[key] >= _TIMES_MORE * self._seen.get(next(iter(self._paths)), 0)

    def _is_full(self) -> bool:
        """Whether there is no room for one more engine, of the mean size of those that there are."""
        n_paths = len(self._paths)
        if n_paths == 0:
            return False
        return n_paths >= self._options.max_paths or (
            self._n_bytes() + self._own_bytes / n_paths > self._options.max_bytes
        )

    def _n_bytes(self) -> int:
        return self._own_bytes + self._shared_bytes

    def _add(self, mask: np.ndarray, *, ahead: bool = False) -> bool:
        """Join the engine of `mask` and keep it, dropping others where it does not fit; say whether it is kept.

        Args:
            ahead: drop none for it, and drop it before those that are there: they are more frequent.
        """
        joined = self._join(mask)
        with self._lock:
            self._shared_bytes += joined.shared_bytes  # kept or not: the weights stay
            room = self._options.max_bytes - self._shared_bytes - (self._own_bytes if ahead else 0)
            fits = joined.own_bytes <= room
            if fits:
                self._keep(mask.tobytes(), joined)
                self._paths.move_to_end(mask.tobytes(), last=not ahead)
            while self._paths and not self._are_within_bounds():
                self._drop_oldest()
        return fits

    def _keep(self, key: bytes, joined: JoinedEngine) -> None:
        self._paths[key] = PathEngine(engine=joined.engine, n_bytes=joined.own_bytes)
        self._own_bytes += joined.own_bytes
        self._joined += 1

    def _are_within_bounds(self) -> bool:
        return len(self._paths) <= self._options.max_paths and self._n_bytes() <= self._options.max_bytes

    def _drop_oldest(self) -> None:
        _, dropped = self._paths.popitem(last=False)
        self._own_bytes -= dropped.n_bytes
        self._dropped += 1

    def _add_in_background(self, mask: np.ndarray) -> None:
        kept = False
        try:
            kept = self._add(mask)
        except BdtoolError as error:
            logger.warning("a path engine could not be joined, its images run through the chain: %s", error)
        except Exception:
            logger.exception("a path engine could not be joined, its images run through the chain")
        with self._lock:
            self._waiting.discard(mask.tobytes())
            if not kept:  # too large, or it failed: it would be so the next time
                self._seen[mask.tobytes()] = -math.inf
