"""Latency of a bundle's precisions side by side: the chain of each, all blocks kept, in alternating rounds of one run.

python benchmarks/precisions.py BUNDLE --data DATA --precisions fp32,int8 --threads 2 [--policy POLICY] [--batch N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from bdtool.data.sources import open_data
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import parse_policy_for
from engines.cpu import has_vnni, instruction_set
from export.bundle import Bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--precisions", default="fp32,int8")
    parser.add_argument("--policy", default="all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    network = bundle.network
    batch = open_data(args.data, network=network, resize=True).take(args.batch)
    images = batch.images
    request = parse_policy_for(network, args.policy)
    keep = request.given_at(batch.rows)
    precisions = args.precisions.split(",")
    times: dict[str, list[float]] = {name: [] for name in precisions}
    with ExitStack() as stack:
        runtimes = {
            name: stack.enter_context(Orchestrator.open(bundle, threads=args.threads, precision=name))
            for name in precisions
        }
        for index in range(args.rounds + 2):  # two of warm-up
            for name, runtime in runtimes.items():
                start = time.perf_counter()
                runtime.run(images, policy=keep)
                if index >= 2:
                    times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    baseline = medians[precisions[0]]
    result = {
        "arch": network.arch,
        "policy": request.name,
        "batch": args.batch,
        "threads": args.threads,
        "instruction_set": instruction_set(),
        "vnni": has_vnni(),
        "median_ms": medians,
        "min_ms": {name: min(values) for name, values in times.items()},
        "speedup": {name: baseline / median for name, median in medians.items()},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
