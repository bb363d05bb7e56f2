"""Batches of images that keep different blocks, on two processors: one pool of two threads, or a thread for each half.

    python benchmarks/batches.py BUNDLE --data DATA [--policy POLICY] [--batch N] [--rounds N]

Each way runs in a process of its own, as ONNX Runtime's pool belongs to the process, and times the chain and the whole
network as one engine in alternating rounds. The second way opens two orchestrators of one thread and hands each half
of the batch, so that the rows that the chain gathers and scatters are moved by both processors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bdtool.data.sources import open_data
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import parse_policy_for
from export.bundle import Bundle

WAYS = ("one thread", "a pool of two threads", "two orchestrators of one thread")
N_BATCHES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", required=True, help="DATA as everywhere")
    parser.add_argument("--policy", default="random:17")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run_way(args)))
        return
    print("| way | full, ms | chain, ms | chain / full | x the share of the FLOPs |\n|---|---|---|---|---|")
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--way", way]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        ratio = row["chain"] / row["full"]
        print(
            f"| {way} | {row['full']:.3f} | {row['chain']:.3f} | {ratio:.3f} | {ratio / row['flops']:.3f} |", flush=True
        )


def run_way(args: argparse.Namespace) -> dict[str, float]:
    """Return the median milliseconds an image of each strategy, and the chain's share of the FLOPs of `full`."""
    network = Bundle.open(args.bundle).network
    sample = open_data(args.data, network=network).take(args.batch * N_BATCHES)
    images = sample.images
    request = parse_policy_for(network, args.policy)
    keep = request.matrix_at(sample.rows)
    threads, n_parallel = (2 if args.way == WAYS[1] else 1), (2 if args.way == WAYS[2] else 1)
    opened = {
        name: [Orchestrator.open(args.bundle, strategy=name, threads=threads) for _ in range(n_parallel)]
        for name in ("full", "chain")
    }
    times_ms: dict[str, list[float]] = {name: [] for name in opened}
    with ThreadPoolExecutor(n_parallel) as pool:
        for _ in range(args.rounds):
            for name, runtimes in opened.items():
                run_batch(pool, runtimes, images[: args.batch], keep[: args.batch])  # not counted: warms the caches
                for first in range(0, len(images), args.batch):
                    rows = slice(first, first + args.batch)
                    start = time.perf_counter()
                    run_batch(pool, runtimes, images[rows], keep[rows])
                    times_ms[name].append((time.perf_counter() - start) * 1000 / len(images[rows]))
    dynamic = network.flops_per_image(keep, with_policy=network.has_policy).mean()
    full = network.flops_per_image(np.ones_like(keep), with_policy=False).mean()
    return {name: statistics.median(times) for name, times in times_ms.items()} | {"flops": float(dynamic / full)}


def run_batch(pool: ThreadPoolExecutor, runtimes: list[Orchestrator], images: np.ndarray, keep: np.ndarray) -> None:
    if len(runtimes) == 1:
        runner(runtimes[0])(images, keep)
        return
    pieces = zip(runtimes, np.array_split(images, 2), np.array_split(keep, 2), strict=True)
    for future in [pool.submit(runner(runtime), *piece) for runtime, *piece in pieces]:
        future.result()


def runner(runtime: Orchestrator) -> Callable[[np.ndarray, np.ndarray], object]:
    if runtime.strategy_name == "full":
        return lambda images, keep: runtime.run(images)
    return runtime.run_with_policy_cost


if __name__ == "__main__":
    main()
