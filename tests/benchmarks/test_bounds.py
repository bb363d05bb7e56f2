"""`benchmarks/bounds.py`: what it measures in place is the path, from the first image on."""

import numpy as np

from bdtool.data.synthetic import synthetic_images
from benchmarks.bounds import REPEATS, in_place
from export.bundle import Bundle


def test_path_is_measured_and_not_the_chain_that_runs_until_it_is_joined(tiny):
    bundle = Bundle.open(tiny.bundle)
    size, keep = bundle.network.preprocessing, np.arange(bundle.network.n_blocks)[None] < 1
    images = synthetic_images(2, height=size.height, width=size.width)
    medians = in_place(bundle, "path", images, keep, rounds=1)
    assert REPEATS > 1  # so that one round is left behind the warm-up
    assert len(medians) == 5  # before, in and between two engine calls, and after
