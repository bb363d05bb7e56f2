"""Strategy `path` with many keep masks: memory of the path engines, the time to join them, and latency.

    python benchmarks/paths.py BUNDLE [--paths N] [--policy POLICY] [--threads N] [--duration S]

The first N images get a mask each (by default 17 random blocks). First the cache as it is by default: every mask is
seen twice, joined in the background, and dropped again when others come. Then a cache without bounds, in which every
mask has an engine, so that every image hits.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from bdtool.data.synthetic import synthetic_images
from bdtool.profiling.measure import measure
from bdtool.profiling.workload import Settings, Workload
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.policies import parse_policy
from export.bundle import Bundle

_PAGE = 4096
_MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--paths", type=int, default=1000)
    parser.add_argument("--policy", default="random:17")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--duration", type=float, default=4)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    size, n_blocks = bundle.network.preprocessing, bundle.network.n_blocks
    images = synthetic_images(args.paths, height=size.height, width=size.width)
    request = parse_policy(args.policy, n_blocks=n_blocks, has_policy_network=False)
    keep = request.matrix(args.paths)
    runtimes = {name: Orchestrator.open(bundle, strategy=name, threads=args.threads) for name in ("full", "chain")}
    print(f"{bundle.network.arch}, {request.name}, {args.threads} threads")
    run_bounded(bundle, images, keep, args.threads)
    opened = [open_unbounded(bundle, masks, args.threads) for masks in (keep[:0], keep)]
    (_, seconds_bare, grown_bare), (runtimes["path"], seconds, grown) = opened
    samples = measure(runtimes, Workload(images=images, keep=keep), Settings(duration_s=args.duration))
    stats = runtimes["path"].path_stats
    assert stats is not None
    print(f"without bounds: {stats.n_paths} paths, hits {stats.hit_rate:.1%}")
    print(f"memory of the paths {(grown - grown_bare) / _MIB:.0f} MiB, estimate {stats.n_bytes / _MIB:.0f} MiB")
    print(f"joined in {(seconds - seconds_bare) / stats.n_paths * 1000:.1f} ms each")
    for name in ("chain", "path"):
        print(f"{name}: {samples[name].median_ms:.3f} ms, {samples[name].ratio_to(samples['full']):.3f} of full")


def open_unbounded(bundle: Bundle, masks: np.ndarray, threads: int) -> tuple[Orchestrator, float, int]:
    """Open a runtime with an engine for each mask; return it, the seconds and the bytes that the process grew by."""
    before, start = resident_bytes(), time.perf_counter()
    options = PathOptions(ahead=list(masks), max_paths=max(1, len(masks)), max_bytes=2**40, background=False)
    runtime = Orchestrator.open(bundle, strategy="path", threads=threads, paths=options)
    return runtime, time.perf_counter() - start, resident_bytes() - before


def run_bounded(bundle: Bundle, images: np.ndarray, keep: np.ndarray, threads: int) -> None:
    """Run every mask twice through the default cache; print its bound and what the process grew by."""
    with Orchestrator.open(bundle, strategy="path", threads=threads, paths=PathOptions()) as runtime:
        before = largest = resident_bytes()
        for image, mask in zip(images, keep, strict=True):
            for _ in range(2):
                runtime.run(image[None], policy=mask)
            largest = max(largest, resident_bytes())
        stats = runtime.path_stats
    assert stats is not None
    print(
        f"default bounds: {stats.joined} joined, {stats.n_paths} held, {stats.dropped} dropped; "
        f"estimate {stats.n_bytes / _MIB:.0f} MiB of at most {stats.max_bytes / _MIB:.0f}, "
        f"the process grew by at most {(largest - before) / _MIB:.0f} MiB"
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


if __name__ == "__main__":
    main()
