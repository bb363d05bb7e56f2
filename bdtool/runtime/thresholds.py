"""At which probability the policy network keeps a block, where it is not the bundle's own threshold.

A bundle gets it before it is opened: engines and CUDA graphs that decide on their own are made for one threshold.
"""

from __future__ import annotations

import math

from bdtool.errors import PolicyError
from export.bundle import Bundle


def threshold_of(policy: str | None) -> float | None:
    """Return the threshold that a POLICY `learned:THRESHOLD` names; None where it names none.

    Raises:
        PolicyError: it is no probability.
    """
    form, colon, number = (policy or "").strip().partition(":")
    if form != "learned" or not colon:
        return None
    try:
        threshold = float(number)
    except ValueError:
        threshold = math.nan
    return _checked(threshold, f"policy {policy!r}")


def bundle_at(threshold: float | None, bundle: Bundle) -> Bundle:
    """Return the bundle with another threshold of its policy network; None leaves it.

    Raises:
        PolicyError: the threshold is no probability, or the bundle has no policy network.
    """
    if threshold is None:
        return bundle
    if not bundle.network.has_policy:
        raise PolicyError(f"threshold {threshold!r}: the bundle has no policy network. Leave the threshold out")
    return bundle.with_threshold(_checked(float(threshold), f"threshold {threshold!r}"))


def _checked(threshold: float, source: str) -> float:
    if not 0 <= threshold <= 1:  # NaN is not, either
        raise PolicyError(f"{source}: expected a threshold from 0 to 1; the higher it is, the fewer blocks run")
    return threshold
