"""Paths through the tiny network, and the ranges along them."""

import numpy as np
import pytest

from bdtool.data.synthetic import synthetic_images
from bdtool.runtime.preprocess import preprocess
from calibration.paths import PathBatch, PathWalker, TopUp, WatchedPart
from calibration.ranges import RangeCollector
from export.bundle import Bundle


@pytest.fixture(scope="session")
def bundle(tiny):
    return Bundle.open(tiny.bundle)


@pytest.fixture(scope="session")
def watched(bundle):
    return {p.name: WatchedPart(bundle.part_path(p).read_bytes(), p) for p in bundle.network.parts if p.kind != "full"}


@pytest.fixture(scope="session")
def pixels(bundle):
    return preprocess(synthetic_images(16, height=32, width=32), bundle.network.preprocessing)


@pytest.fixture(scope="session")
def collect(bundle, watched, pixels):
    """Return a function from keep bits [16, 3] to what their paths hold."""

    def run(keep, at_least=0):
        keep = np.asarray(keep, dtype=bool)
        collector = RangeCollector()
        walker = PathWalker(bundle.network, watched, TopUp.plan(bundle.network, keep, at_least=at_least))
        for first in (0, 8):
            rows = slice(first, first + 8)
            walker.add(PathBatch(first=first, images=pixels[rows], keep=keep[rows]), collector)
        return collector

    return run
