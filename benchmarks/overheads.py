"""What the chain of engines would cost without its two measures against overhead: a shared thread pool, native layout.

A fourth way gives ONNX Runtime a batch size of 1 instead of any, to see what engines of fixed sizes would save.

    python benchmarks/overheads.py BUNDLE [--threads N] [--policy POLICY] [--duration S]

Each way runs in a process of its own (ONNX Runtime's pool belongs to the process) and is compared there with the same
baseline, the whole network as one engine on the shared pool's threads, in alternating rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bdtool.data.sources import open_data
from bdtool.profiling.measure import measure
from bdtool.profiling.workload import Settings, Workload
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import parse_policy_for
from bdtool.specs import BATCH_AXIS
from engines.base import PLAIN_LAYOUT
from engines.onnxrt import OnnxRuntimeBackend
from engines.registry import identify_backend
from engines.store import EngineStore
from export.bundle import Bundle

WAYS = ("as shipped", "plain NCHW borders", "a pool for each session", "engines of one batch size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--policy", default="all")
    parser.add_argument("--duration", type=float, default=4)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run_way(args.way, args.bundle, args.policy, args.threads, args.duration)))
        return
    print(f"policy {args.policy}, {args.threads} threads\n\n| way | chain, median ms | chain / full |\n|---|---|---|")
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--way", way]
        figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(f"| {way} | {figures['chain_ms']:.3f} | {figures['ratio']:.3f} |", flush=True)


def run_way(way: str, path: Path, policy: str, threads: int, duration: float) -> dict[str, float]:
    bundle = Bundle.open(path)
    data = open_data("synthetic:64", network=bundle.network)
    batch = data.take(64)
    request = parse_policy_for(bundle.network, policy)
    workload = Workload(images=batch.images, keep=request.given_at(batch.rows))
    with tempfile.TemporaryDirectory(prefix="bdtool-benchmark-") as directory:
        runtimes = {"full": open_way(way, bundle, "full", threads, Path(directory))}
        runtimes["chain"] = open_way(way, bundle, "chain", threads, Path(directory))
        samples = measure(runtimes, workload, Settings(duration_s=duration))
    return {
        "chain_ms": samples["chain"].median_ms,
        "ratio": samples["chain"].ratio_to(samples["full"]),
    }


def open_way(way: str, bundle: Bundle, strategy: str, threads: int, directory: Path) -> Orchestrator:
    library = OnnxRuntimeBackend(threads=1 if way == WAYS[2] else threads)
    if way == WAYS[2]:
        library._options.intra_op_num_threads = threads
    if way == WAYS[1]:
        library.activation_layout = lambda network: PLAIN_LAYOUT  # type: ignore[method-assign]
    store = EngineStore(bundle, identify_backend("onnxruntime", "cpu"), directory=directory)
    store.build(lambda: library)  # compares each engine with its ONNX part on two images
    if way == WAYS[3]:
        library._options.add_free_dimension_override_by_name(BATCH_AXIS, 1)
    engines = store.load(library, store.find())
    return Orchestrator(bundle.network, library, engines, strategy=strategy, max_batch=bundle.manifest.max_batch)


if __name__ == "__main__":
    main()
