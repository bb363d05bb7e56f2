"""The frequent keep masks of a bundle, counted on sample images and stored beside its engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bdtool.errors import BundleError
from bdtool.runtime.policies import bits_of
from bdtool.specs import keep_of
from export.files import advice_on, json_from_bytes, write_json

SHARES_SLACK = 1e-6  # of sums of rounded shares
FILE = "paths.json"
NOTE_MASKS = "`bdtool build BUNDLE --coverage 0.95 --data DATA`, with this --backend, --device and --precision"
_AGAIN = f"note them again with {NOTE_MASKS}"


@dataclass(frozen=True, kw_only=True)
class MaskCount:
    """A keep mask as a string of K bits, and the share of the sample images that it was chosen for."""

    mask: str
    share: float

    @property
    def keep(self) -> np.ndarray:
        """The mask as bool [K]."""
        return keep_of(self.mask)


def count_masks(keep: Iterable[np.ndarray]) -> list[MaskCount]:
    """Return the masks of keep matrices bool [N, K], the most frequent first."""
    counts = Counter(bits_of(row) for matrix in keep for row in matrix)
    total = counts.total()
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))  # equal counts: the same order on every run
    return [MaskCount(mask=mask, share=count / total) for mask, count in ordered]


def choose_masks(counts: list[MaskCount], *, n_paths: int | None, coverage: float | None) -> list[MaskCount]:
    """Return the first `n_paths` masks, or the fewest that cover that share of the sample images."""
    if n_paths is not None:
        return counts[:n_paths]
    assert coverage is not None
    covered, chosen = 0.0, []
    for count in counts:
        if covered >= coverage - 1e-9:
            break
        chosen.append(count)
        covered += count.share
    return chosen


def write_masks(directory: Path, masks: list[MaskCount], *, source: str, policy: str) -> None:
    """Store the masks beside the engines, atomically.

    Raises:
        BundleError: the file cannot be written; an earlier one is whole.
    """
    rows = [{"mask": count.mask, "share": count.share} for count in masks]
    try:
        write_json(directory / FILE, {"source": source, "policy": policy, "masks": rows})
    except OSError as exc:
        raise BundleError(
            f"{directory / FILE} cannot be written ({exc.strerror or exc}); {advice_on(exc)} and run `bdtool build` "
            "again"
        ) from exc


def noted_masks(directory: Path, n_blocks: int, *, precision: str) -> list[MaskCount]:
    """Return the masks noted beside the engines of a directory, else those beside a bundle's others of that precision.

    They belong to network and images, not to a machine: backends and processors that do the same decide alike, so that
    masks noted on one serve on those that the bundle is taken to.

    Raises:
        BundleError: the file is damaged or does not fit the network.
    """
    others = sorted(path.parent for path in directory.parent.glob(f"*-{precision}/{FILE}"))
    return next((found for place in (directory, *others) if (found := read_masks(place, n_blocks))), [])


def read_masks(directory: Path, n_blocks: int) -> list[MaskCount]:
    """Return the stored masks, the most frequent first; none where there is no file.

    Raises:
        BundleError: the file is damaged or does not fit the network.
    """
    path = directory / FILE
    try:
        rows = json_from_bytes(path.read_bytes())["masks"]
        masks = [MaskCount(mask=row["mask"], share=float(row["share"])) for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise BundleError(f"{path} cannot be read ({exc}); {_AGAIN}") from exc
    for found in masks:
        if not isinstance(found.mask, str) or len(found.mask) != n_blocks or set(found.mask) - {"0", "1"}:
            raise BundleError(f"{path}: {found.mask!r} is not a mask of {n_blocks} bits; {_AGAIN}")
        if not 0 <= found.share <= 1:
            raise BundleError(f"{path}: {found.share} is not a share of the images, 0 to 1; {_AGAIN}")
    if (together := sum(found.share for found in masks)) > 1 + SHARES_SLACK:
        raise BundleError(f"{path}: its shares are {together:g} of the images together, expected at most 1; {_AGAIN}")
    return masks
