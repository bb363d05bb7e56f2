"""INT8 against fp32 under a policy, calibrated along the policy's own paths and along paths with every block kept.

    python benchmarks/path_ranges.py MODEL_OR_BUNDLE --data TRAIN --eval TEST [--policies all,random:12] [--methods mse]

A MODEL (a file, or the name of a shipped one) is exported first. Each row compares both on equal keep bits, as the
gates of `bdtool calibrate` do, and is printed as soon as it is known. What is given stays as it is.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bdtool.calibrating.calibrate import calibrate
from bdtool.calibrating.gates import Gates, Reference, measure_gates
from bdtool.calibrating.request import CalibrationRequest
from bdtool.data.sources import open_data
from bdtool.models.shipped import shipped_models
from bdtool.pipeline import export_model
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import parse_policy_for
from calibration.methods import DEFAULT_METHOD
from export.bundle import Bundle

WAY = ("policy", "calibrated on", "method", "biases")
COLUMNS = (*WAY, "fp32 top-1", "int8 top-1", "drop", "classes changed", "logits error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="MODEL_OR_BUNDLE")
    parser.add_argument("--data", required=True, help="calibration images; a DATA of bdtool")
    parser.add_argument("--eval", required=True, help="labelled images; a DATA of bdtool")
    parser.add_argument("--policies", help="default: learned and all, or all without a policy network")
    parser.add_argument("--methods", default=DEFAULT_METHOD)
    parser.add_argument("--biases", default="corrected", help="corrected, plain, or both with a comma")
    parser.add_argument("--limit", type=int, default=CalibrationRequest.limit, help="calibration images")
    parser.add_argument("--eval-limit", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with bundle_copy(args.source) as bundle:
        default = "learned,all" if bundle.network.has_policy else "all"
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        choices = (args.policies or default, args.methods, args.biases)
        for policy, method, biases in itertools.product(*(choice.split(",") for choice in choices)):
            for source in dict.fromkeys(("all", policy)):
                figures = formatted(measure(bundle, args, policy, source, method, biases))
                print(f"| {policy} | {source} | {method} | {biases} | {' | '.join(figures)} |", flush=True)


@contextmanager
def bundle_copy(source: str) -> Iterator[Bundle]:
    """Give a bundle that may be changed: a copy, or the export of a MODEL."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "bundle"
        if Path(source).is_dir():
            shutil.copytree(source, path)
        else:
            export_model(shipped_models().get(source, Path(source)), path)
        yield Bundle.open(path)


def measure(bundle: Bundle, args: argparse.Namespace, policy: str, source: str, method: str, biases: str) -> Gates:
    network = bundle.network
    images, judged = open_data(args.data, network=network, split="train"), open_data(args.eval, network=network)
    request = CalibrationRequest(
        policy=source,
        limit=args.limit,
        method=method,
        bias_correction=biases == "corrected",
        max_accuracy_drop=100,
        eval_limit=1,
        threads=args.threads,
    )
    calibrate(Bundle.open(bundle.path), images, judged, request)
    parsed = parse_policy_for(network, policy)
    with (
        Orchestrator.open(bundle.path, threads=args.threads) as fp32,
        Orchestrator.open(bundle.path, threads=args.threads, precision="int8") as int8,
    ):
        return measure_gates(Reference(fp32, judged.drawn(args.eval_limit), parsed), int8, max_accuracy_drop=100)


def formatted(gates: Gates) -> list[str]:
    drop, changed, error = gates.accuracy_drop, gates.changed_classes, gates.logits_error
    if gates.accuracy is None or gates.accuracy_fp32 is None or drop is None:
        raise SystemExit(f"{gates.input_source} has no labels; give labelled images with --eval")
    assert changed is not None
    assert error is not None
    shares = [f"{100 * share:.2f} %" for share in (gates.accuracy_fp32, gates.accuracy, changed, error)]
    return [*shares[:2], f"{drop:.2f}", *shares[2:]]


if __name__ == "__main__":
    main()
