"""`benchmarks/batches.py`: its milliseconds are those of an image."""

import argparse
from types import SimpleNamespace

import pytest

from benchmarks import batches


def test_smaller_last_batch_counts_its_own_images(tiny, monkeypatch):
    now_s = 0.0

    def run_batch(pool, runtimes, images, keep):
        nonlocal now_s
        now_s += 0.001 * len(images)

    monkeypatch.setattr(batches, "run_batch", run_batch)
    monkeypatch.setattr(batches, "time", SimpleNamespace(perf_counter=lambda: now_s))
    args = argparse.Namespace(
        bundle=tiny.bundle, data="synthetic:6", policy="random:1", batch=4, rounds=1, way="one thread"
    )
    figures = batches.run_way(args)
    assert (figures["full"], figures["chain"]) == pytest.approx((1, 1))
