"""INT8 under a policy: calibrated along the policy's own paths, and along paths with every block kept.

    python benchmarks/path_ranges.py BUNDLE --data TRAIN --eval TEST --policies random:12,distribute:12 [--eval-limit N]

Each row compares INT8 with fp32 on equal keep bits. The bundle is copied; it stays as it is.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from bdtool.calibrating import DEFAULT_LIMIT, CalibrationRequest, calibrate
from bdtool.data.sources import open_data
from bdtool.gates import measure_gates
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import parse_policy
from export.bundle import Bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--policies", required=True)
    parser.add_argument("--limit", type=int, default=DEFAULT_LIMIT)
    parser.add_argument("--eval-limit", type=int)
    parser.add_argument("--method", default="min-max")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print("| policy | calibrated on | method | fp32 top-1 | int8 top-1 | classes changed | logits error |")
    print("|---|---|---|---|---|---|---|")
    for policy in args.policies.split(","):
        for source in dict.fromkeys(("all", policy)):
            print(row(args, policy, source), flush=True)


def row(args: argparse.Namespace, policy: str, source: str) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(shutil.copytree(args.bundle, Path(directory) / "bundle"))
        bundle = Bundle.open(path)
        network = bundle.network
        images, judged = open_data(args.data, network=network, split="train"), open_data(args.eval, network=network)
        request = CalibrationRequest(
            policy=source,
            limit=args.limit,
            method=args.method,
            max_accuracy_drop=100,
            eval_limit=1,
            threads=args.threads,
        )
        calibrate(bundle, images, judged, request)
        parsed = parse_policy(policy, n_blocks=network.n_blocks, has_policy_network=network.has_policy)
        with (
            Orchestrator.open(path, threads=args.threads) as fp32,
            Orchestrator.open(path, threads=args.threads, precision="int8") as int8,
        ):
            gates = measure_gates(fp32, int8, judged, parsed, limit=args.eval_limit, max_accuracy_drop=100)
    assert gates.accuracy is not None
    assert gates.accuracy_fp32 is not None
    assert gates.changed_classes is not None
    assert gates.logits_error is not None
    return (
        f"| {policy} | {source} | {args.method} | {100 * gates.accuracy_fp32:.2f} % | {100 * gates.accuracy:.2f} % "
        f"| {100 * gates.changed_classes:.2f} % | {100 * gates.logits_error:.2f} % |"
    )


if __name__ == "__main__":
    main()
