"""POLICY: what a user writes after `--policy`, as a keep matrix bool [N, K] or as a call for the policy network."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from bdtool.errors import PolicyError
from bdtool.runtime.thresholds import threshold_of
from bdtool.specs import DEFAULT_THRESHOLD, NetworkSpec, keep_of

POLICY_FORMS = (
    "learned[:THRESHOLD], all, none, first:K, random:K[:SEED], random:LOW-HIGH[:SEED], distribute:K, a string of 0 and "
    "1 with one bit for each block, FILE.npy with [K] or [N, K] zeros and ones"
)
_COUNTED = re.compile(r"(?P<form>first|distribute):(?P<count>[0-9]{1,9})")
_RANDOM = re.compile(r"random:(?P<low>[0-9]{1,9})(?:-(?P<high>[0-9]{1,9}))?(?::(?P<seed>[0-9]{1,18}))?")


@dataclass(frozen=True, kw_only=True)
class PolicyRequest:
    """A POLICY that fits the model: the policy network decides (`is_learned`), or `matrix` gives the bits.

    Attributes:
        name: canonical text, the same for equal requests: `random:3` becomes `random:3:0`.
        draw: computes the keep matrix from the images' numbers; None where the policy network decides.
        n_rows: number of rows of a file that gives each image of one data set its own bits; None otherwise.
        mask: the bits of all images, bool [K], where it gives all the same; None otherwise.
    """

    name: str
    draw: Callable[[np.ndarray], np.ndarray] | None
    n_rows: int | None = None
    mask: np.ndarray | None = None

    @property
    def is_learned(self) -> bool:
        return self.draw is None

    def matrix(self, n_images: int, *, first: int = 0) -> np.ndarray:
        """Return the keep matrix bool [n_images, K] of images that follow one another; see `matrix_at`.

        Args:
            first: number of the batch's first image in the data set.
        """
        return self.matrix_at(np.arange(first, first + n_images))

    def matrix_at(self, rows: np.ndarray) -> np.ndarray:
        """Return the keep matrix bool [n, K] of some images, True = kept; the caller owns it.

        Args:
            rows: int [n], the images' numbers in the whole data set: an image has the same bits in every batch and
                every sample.

        Raises:
            PolicyError: a file has fewer rows than the data set images.
            ValueError: the policy is learned, so only the policy network knows its bits.
        """
        if self.draw is None:
            raise ValueError("policy 'learned' has no fixed matrix: run the policy network")
        return self.draw(rows)

    def given_at(self, rows: np.ndarray) -> np.ndarray | None:
        """Return `matrix_at`, or None where the policy network decides."""
        return None if self.is_learned else self.matrix_at(rows)


def parse_policy_for(network: NetworkSpec, text: str | None) -> PolicyRequest:
    """Read a POLICY for a network, None for its default: `learned` where it has a policy network, else the mask that it
    was trained for, else `all`; see `parse_policy`.
    """
    return parse_policy(
        network.default_policy if text is None else text,
        n_blocks=network.n_blocks,
        has_policy_network=network.has_policy,
        threshold=network.threshold,
    )


def parse_policy(
    text: str, *, n_blocks: int, has_policy_network: bool, threshold: float = DEFAULT_THRESHOLD
) -> PolicyRequest:
    """Read one of `POLICY_FORMS`.

    `learned` keeps the blocks whose probability is at least `threshold`; `learned:THRESHOLD` has to name the same.

    `first:K`, `random:K` and `distribute:K` keep K of the `n_blocks` blocks: the first ones, K drawn for each image,
    or K spread evenly (see `_distributed`). Source: BlockDrop, section 4.2, FirstK, RandomK and DistributeK.
    `random:LOW-HIGH` draws the number of blocks of each image, too, all numbers alike often.

    Raises:
        PolicyError: unknown form, a number or length that does not fit the model, or an unreadable file.
    """
    text = text.strip()
    if text == "learned" or text.startswith("learned:"):
        return _learned(text, has_policy_network=has_policy_network, threshold=threshold)
    if text in ("all", "none"):
        return _fixed(text, np.full(n_blocks, text == "all"))
    if names_file(text):
        return _from_file(text, n_blocks=n_blocks)
    if text and set(text) <= {"0", "1"}:
        return _from_bits(text, n_blocks=n_blocks)
    if text.startswith("random:"):
        return _random(text, n_blocks=n_blocks)
    return _counted(text, n_blocks=n_blocks)


def names_file(policy: str) -> bool:
    """Say whether a POLICY is a file, not bits or a form."""
    return policy.strip().lower().endswith(".npy")


def bits_of(keep: np.ndarray) -> str:
    """Return keep bits [K] as the POLICY that gives them; `keep_of` undoes it."""
    return "".join("1" if bit else "0" for bit in keep)


def keep_matrix_from(policy: ArrayLike, n_images: int, n_blocks: int) -> np.ndarray:
    """Return a given policy as keep matrix bool [n_images, n_blocks], True = kept; the caller owns it.

    Args:
        policy: [K], used for every image, or [N, K]; booleans, or numbers that are all 0 or 1.

    Raises:
        PolicyError: another shape or dtype, or a value other than 0 and 1, NaN included.
    """
    keep = _checked_bits(policy, n_blocks=n_blocks, source="policy")
    if keep.ndim == 2 and len(keep) != n_images:
        raise PolicyError(
            f"policy: got {len(keep)} rows for {n_images} images, expected one row for each image. "
            f"Pass shape [{n_images}, {n_blocks}], or [{n_blocks}] for all images alike"
        )
    return np.broadcast_to(keep, (n_images, n_blocks)).copy()


def _learned(text: str, *, has_policy_network: bool, threshold: float) -> PolicyRequest:
    if not has_policy_network:
        raise PolicyError(
            f"policy {text!r}: the model has no policy network. Train one (`bdtool train imitate` or `curriculum`), or "
            f"use another POLICY, for instance all. POLICY is one of: {POLICY_FORMS}"
        )
    if (asked := threshold_of(text)) not in (None, threshold):
        raise PolicyError(
            f"policy {text!r}: this network was opened with the threshold {threshold!r}. Open the bundle with "
            f"threshold={asked!r}, or give the bits: runtime.keep_probability(images) >= {asked!r}"
        )
    return PolicyRequest(name="learned" if threshold == DEFAULT_THRESHOLD else f"learned:{threshold!r}", draw=None)


def _fixed(name: str, keep: np.ndarray) -> PolicyRequest:
    return PolicyRequest(name=name, draw=functools.partial(_repeat_row, keep), mask=keep)


def _from_bits(text: str, *, n_blocks: int) -> PolicyRequest:
    if len(text) != n_blocks:
        raise PolicyError(
            f"policy {text!r}: got {len(text)} bits, the model has {n_blocks} blocks. Give one bit for each block"
        )
    return _fixed(text, keep_of(text))


def _counted(text: str, *, n_blocks: int) -> PolicyRequest:
    match = _COUNTED.fullmatch(text)
    if match is None:
        raise _not_a_form(text)
    form, count = match["form"], int(match["count"])
    _check_count(text, count, n_blocks=n_blocks)
    keep = np.arange(n_blocks) < count if form == "first" else _distributed(count, n_blocks)
    return _fixed(f"{form}:{count}", keep)


def _random(text: str, *, n_blocks: int) -> PolicyRequest:
    match = _RANDOM.fullmatch(text)
    if match is None:
        raise _not_a_form(text)
    low, seed = int(match["low"]), int(match["seed"] or 0)
    high = int(match["high"] or low)
    if low > high:
        raise PolicyError(f"policy {text!r}: got LOW {low} above HIGH {high}. Write random:{high}-{low}")
    _check_count(text, high, n_blocks=n_blocks)
    counts = f"{low}" if low == high else f"{low}-{high}"
    return PolicyRequest(
        name=f"random:{counts}:{seed}", draw=functools.partial(_random_rows, low, high, seed, n_blocks)
    )


def _not_a_form(text: str) -> PolicyError:
    return PolicyError(f"policy {text!r}: not a form of POLICY. POLICY is one of: {POLICY_FORMS}")


def _check_count(text: str, count: int, *, n_blocks: int) -> None:
    if count > n_blocks:
        raise PolicyError(
            f"policy {text!r}: got K = {count}, the model has {n_blocks} blocks. Use K from 0 to {n_blocks}"
        )


def _distributed(count: int, n_blocks: int) -> np.ndarray:
    """Keep the blocks floor(i * n_blocks / count) for i = 0 to count - 1: block 0, then even steps."""
    keep = np.zeros(n_blocks, dtype=bool)
    keep[[i * n_blocks // count for i in range(count)]] = True
    return keep


def _repeat_row(keep: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.tile(keep, (len(rows), 1))


def _random_rows(low: int, high: int, seed: int, n_blocks: int, rows: np.ndarray) -> np.ndarray:
    """Give every block of every image a random number, and keep the lowest of each image: `low` to `high` of them.

    Philox counts: image i always gets the same stretch of its counter, whatever batch it comes in.
    """
    n_numbers = n_blocks if low == high else n_blocks + 1  # the last one says how many blocks to keep
    steps = -(-n_numbers // 4)  # one step of Philox4x64 yields four numbers
    numbers = np.concatenate([_philox(seed, run, steps) for run in _runs(rows)])
    counts = low + numbers[:, n_blocks:n_numbers] % np.uint64(high - low + 1) if high > low else low
    ranks = numbers[:, :n_blocks].argsort(axis=1).argsort(axis=1)
    return np.asarray(ranks < counts)


def _philox(seed: int, rows: np.ndarray, steps: int) -> np.ndarray:
    """Return random numbers uint64 [n, 4 x steps] for images that follow one another."""
    first = int(rows[0]) if len(rows) else 0
    numbers = np.random.Philox(key=seed, counter=first * steps).random_raw(len(rows) * steps * 4)
    return np.asarray(numbers).reshape(len(rows), steps * 4)


def _runs(rows: np.ndarray) -> list[np.ndarray]:
    """Split numbers of images into runs of such as follow one another."""
    return np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)


def _from_file(text: str, *, n_blocks: int) -> PolicyRequest:
    try:
        with Path(text).open("rb") as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as exc:
        raise PolicyError(f"policy {text}: no such file. Check the path") from exc
    except Exception as exc:  # on a damaged header numpy raises almost anything: TokenError
        raise PolicyError(f"policy {text}: not a readable .npy file ({exc}). Write it with np.save") from exc
    keep = _checked_bits(values, n_blocks=n_blocks, source=f"policy {text}")
    if keep.ndim == 1:
        return _fixed(bits_of(keep), keep)  # by what it says: whoever reads the name later may not have the file
    return PolicyRequest(name=text, draw=functools.partial(_file_rows, keep, text), n_rows=len(keep))


def _file_rows(keep: np.ndarray, name: str, rows: np.ndarray) -> np.ndarray:
    if (last := int(rows.max(initial=-1))) >= len(keep):
        raise PolicyError(
            f"policy {name}: has {len(keep)} rows, but image {last} of the data set needs row {last}. Give a row for "
            "each image of the data set, of which --limit draws some, or one row [K] for all"
        )
    return np.asarray(keep[rows])


def _checked_bits(policy: ArrayLike, *, n_blocks: int, source: str) -> np.ndarray:
    """Return the bits as bool [K] or [N, K]."""
    try:
        values = np.asarray(policy)
    except ValueError as exc:
        raise PolicyError(f"{source}: rows differ in length ({exc}). Give {n_blocks} values for each image") from exc
    except (TypeError, RuntimeError) as exc:  # PyTorch's, of a tensor on a GPU, or of one that takes part in a gradient
        raise PolicyError(
            f"{source}: the {type(policy).__name__} cannot be read ({exc}). Give a numpy array of {n_blocks} values "
            "for each image"
        ) from exc
    if values.ndim not in (1, 2) or values.shape[-1] != n_blocks or values.size == 0:
        raise PolicyError(
            f"{source}: got shape {list(values.shape)}, expected [{n_blocks}] or [N, {n_blocks}]. "
            f"Give one value for each of the model's {n_blocks} blocks"
        )
    if values.dtype.kind not in "biuf":
        raise PolicyError(f"{source}: got dtype {values.dtype}, expected zeros and ones. Give booleans or numbers")
    wrong = values[(values != 0) & (values != 1)]
    if wrong.size:
        raise PolicyError(f"{source}: got the value {wrong[0]}, expected only 0 (drop) and 1 (keep). Round or fix it")
    return values.astype(bool)
