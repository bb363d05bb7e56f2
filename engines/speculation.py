"""Which blocks may run while the policy network still decides: those that begin the paths of most images.

A path that begins otherwise starts again from the stem, so a wrong guess costs that, and a right one saves what the
policy network hides. Which guess pays is a matter of the device's own times: `best_speculation` is told them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from engines.dispatch import Run

Path = tuple[Run, ...]


@dataclass(frozen=True)
class Speculation:
    """The parts behind the stem that run before it is known whether they are wanted."""

    runs: Path = ()
    share: float = 0.0  # of the images, 0 to 1: those whose path begins so


NO_SPECULATION = Speculation()


def speculations(paths: Sequence[Path], shares: Sequence[float]) -> Iterator[Speculation]:
    """Yield the most frequent beginning of 1 part, of 2 parts, and so on to the longest path's.

    Args:
        paths: what the frequent masks run, of `engines.dispatch.runs`.
        shares: of the images that take each.
    """
    for n_runs in range(1, max(map(len, paths), default=0) + 1):
        found: dict[Path, float] = defaultdict(float)
        for path, share in zip(paths, shares, strict=True):
            if len(path) >= n_runs:
                found[path[:n_runs]] += share
        runs = max(found, key=lambda begun: found[begun])
        yield Speculation(runs, found[runs])


def best_speculation(
    paths: Sequence[Path],
    shares: Sequence[float],
    *,
    beside_ms: Callable[[Path], float],
    alone_ms: Callable[[Path], float],
    again_ms: float,
) -> Speculation:
    """Return the speculation that makes the mean image fastest; an empty one where none does.

    Args:
        beside_ms: gives the time of the policy network with the stem and these parts beside it.
        alone_ms: gives the time of the stem and these parts.
        again_ms: what a wrong guess adds: the stem once more.
    """
    best, best_ms = NO_SPECULATION, 0.0
    for found in speculations(paths, shares):
        # anew beside each: a clock that still rises would make all that is timed later look cheap
        decided_ms = beside_ms(())
        later_ms = beside_ms(found.runs) - decided_ms
        saved_ms = alone_ms(found.runs) - alone_ms(())
        mean_ms = later_ms - found.share * saved_ms + (1 - found.share) * again_ms
        if mean_ms < best_ms:
            best, best_ms = found, mean_ms
        if later_ms > decided_ms:  # far from hidden, and longer ones take longer still
            break
    return best
