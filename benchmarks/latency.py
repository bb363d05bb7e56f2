"""ResNet-110 by each strategy against the whole network as one engine, ONNX Runtime on the CPU.

    python benchmarks/latency.py [--data DATA] [--threads 1,2] [--duration S]
                                 [--policy-downscale N] [--out FILE]

Makes a ResNet-110 with a policy network and random weights (latency does not depend on their values), exports it, and
runs `bdtool profile` on it for each number of threads in a process of its own, the policy network included:

    distribute:17, batch 1   17 of 54 blocks kept (mean of the paper: 16.9; its Table 2: 0.452 of the full time)
    all, batch 1             what chaining costs when nothing is dropped
    random:17, batch 64      every image keeps other blocks
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdtool.models.model import BlockDropModel, ModelSpec, build_model
from bdtool.models.resnet import BasicBlock
from bdtool.models.store import save_model
from bdtool.specs import Preprocessing
from export.files import write_json

_BRANCH_SCALE = 0.2  # of what a block adds to its input


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is profiled, and the most that each strategy's ratio to full may be, for one and for two threads.

    With `of_flops` the aims are multiples of the share of the FLOPs, which changes with the policy network.
    """

    policy: str
    batch: int
    aims: dict[str, tuple[float, float]]
    of_flops: bool = False


CASES = (
    Case(policy="distribute:17", batch=1, aims={"chain": (0.40, 0.45), "path": (0.34, 0.36), "fused": (0.48, 0.48)}),
    Case(policy="all", batch=1, aims={"chain": (1.25, 1.25)}),
    Case(policy="random:17", batch=64, aims={"chain": (1.15, 1.15)}, of_flops=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="DATA as everywhere; default: synthetic pictures")
    parser.add_argument("--threads", type=numbers, default="1,2", help="default: 1,2")
    parser.add_argument("--duration", default="6", help="seconds measured for each strategy, default 6")
    parser.add_argument(
        "--policy-downscale", type=int, default=1, help="of the images for the policy network, default 1"
    )
    parser.add_argument("--out", type=Path, help="write the profiles as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bdtool-benchmark-") as directory:
        bundle = Path(directory) / "resnet110"
        timings = make_bundle(bundle, policy_downscale=args.policy_downscale)
        runs = [
            (case, run_profile(bundle, case, threads, args.duration, args.data))
            for threads in args.threads
            for case in CASES
        ]
    print_results(runs, timings)
    if args.out is not None:
        profiles = [profile for _, profile in runs]
        write_json(args.out, {"timings_s": timings, "profiles": profiles})


def numbers(text: str) -> list[int]:
    """Read numbers of threads, with commas between them; argparse turns a ValueError into its own message."""
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def make_bundle(bundle: Path, *, policy_downscale: int = 1) -> dict[str, float]:
    """Make, export and build the network; return the seconds of the commands, the start of Python included."""
    model = bundle.with_suffix(".safetensors")
    save_model(random_model(policy_downscale=policy_downscale), model)
    return {
        "bdtool export": run_command("export", str(model), "-o", str(bundle)),
        "bdtool build": run_command("build", str(bundle)),
    }


def random_model(*, policy_downscale: int = 1) -> BlockDropModel:
    """Return the ResNet-110 with a policy network, whose activations stay within what half precision holds."""
    size = Preprocessing(height=32, width=32, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    spec = ModelSpec(
        arch="resnet110",
        n_classes=10,
        labels=None,
        preprocessing=size,
        shortcut="average-pool",
        has_policy=True,
        provenance={"created_by": "benchmarks/latency.py", "weights": "random, seed 0"},
        policy_downscale=policy_downscale,
    )
    model = build_model(spec, seed=0)
    for block in model.modules():
        if isinstance(block, BasicBlock):
            # batch norms that were not trained normalise nothing: each block would about double the variance of its
            # input, and 54 of them in a row come to 1e9
            block.bn2.weight.data *= _BRANCH_SCALE
    return model


def run_command(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bdtool", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def run_profile(bundle: Path, case: Case, threads: int, duration: str, data: str | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "bdtool", "profile", str(bundle), "--policy", case.policy]
    command += ["--strategy", ",".join(case.aims), "--batch", str(case.batch), "--threads", str(threads)]
    command += ["--duration", duration, "--json", "-", *(["--data", data] if data else [])]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    profile: dict[str, Any] = json.loads(output)
    return profile


def print_results(runs: list[tuple[Case, dict[str, Any]]], timings: dict[str, float]) -> None:
    first = runs[0][1]
    environment = first["environment"]
    print(f"{environment['cpu']} ({environment['instruction_set']}), {environment['backend']}")
    print(f"{first['n_images']} images of {first['input_source']}; {first['boundary']}")
    print("; ".join(f"{name} {seconds:.3f} s" for name, seconds in timings.items()))
    columns = "full, mean ms | this, mean ms | ratio | of the minima | FLOPs share | aim"
    print(f"\n| threads | batch | policy | strategy | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case, profile in runs:
        threads = profile["environment"]["threads"]
        latency_ms = profile["strategies"]["full"]["latency_ms"]
        full = latency_ms["mean"] / case.batch  # as the ratios are of means
        for name, aims in case.aims.items():
            row = profile["strategies"][name]
            aim = aims[min(threads, 2) - 1] * (row["flops_ratio_to_full"] if case.of_flops else 1)
            print(
                f"| {threads} | {case.batch} | {case.policy} | {name} | {full:.3f} "
                f"| {row['latency_ms']['mean'] / case.batch:.3f} | {row['ratio_to_full']:.3f} "
                f"| {row['latency_ms']['min'] / latency_ms['min']:.3f} "
                f"| {row['flops_ratio_to_full']:.3f} | {aim:.3f} |"
            )


if __name__ == "__main__":
    main()
