"""At which probability the policy network keeps a block, where it is not the bundle's own threshold.

A bundle gets it before it is opened: engines and CUDA graphs that decide on their own are made for one threshold.
"""

from __future__ import annotations

import math
import re

from bdtool.errors import PolicyError
from export.bundle import Bundle

_RANGE = re.compile(r"learned:(?P<low>[0-9]*\.?[0-9]+)-(?P<high>[0-9]*\.?[0-9]+)")


def threshold_of(policy: str | None) -> float | None:
    """Return the threshold that a POLICY `learned:THRESHOLD` names; None where it names none.

    Raises:
        PolicyError: it is no probability.
    """
    form, colon, number = (policy or "").strip().partition(":")
    if form != "learned" or not colon:
        return None
    return _checked(number, f"policy {policy!r}")


def threshold_range_of(policy: str) -> tuple[float, float] | None:
    """Return the thresholds that a POLICY of training, `learned:LOW-HIGH`, names; None where it names none.

    Raises:
        PolicyError: they are no probabilities, or LOW is above HIGH.
    """
    if (match := _RANGE.fullmatch(policy.strip())) is None:
        return None
    low, high = (_checked(match[name], f"policy {policy!r}") for name in ("low", "high"))
    if low > high:
        raise PolicyError(f"policy {policy!r}: got LOW {low:g} above HIGH {high:g}. Write learned:{high:g}-{low:g}")
    return low, high


def bundle_at(threshold: float | None, bundle: Bundle) -> Bundle:
    """Return the bundle with another threshold of its policy network; None leaves it.

    Raises:
        PolicyError: the threshold is no probability, or the bundle has no policy network.
    """
    if threshold is None:
        return bundle
    if not bundle.network.has_policy:
        raise PolicyError(f"threshold {threshold!r}: the bundle has no policy network. Leave the threshold out")
    return bundle.with_threshold(_checked(threshold, f"threshold {threshold!r}"))


def _checked(given: float | str, source: str) -> float:
    try:
        threshold = math.nan if isinstance(given, bool) else float(given)  # True is no 1 here
    except (TypeError, ValueError):
        threshold = math.nan
    if not 0 <= threshold <= 1:  # NaN is not, either
        raise PolicyError(f"{source}: expected a threshold from 0 to 1; the higher it is, the fewer blocks run")
    return threshold
