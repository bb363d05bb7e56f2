"""ONNX files beside each other as ONNX Runtime's CPU provider runs them by default, as a program without bdtool would.

    python -m benchmarks.files A.onnx B.onnx ... [--threads N]

For what `bdtool fuse` writes in several forms. Each reads the same picture of noise; times are of alternating rounds,
as a share of the first file's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import onnxruntime as ort

from benchmarks.turns import rounds_of

ROUNDS, SECONDS_A_ROUND = 15, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.onnx")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    calls = [call_of(file, args.threads) for file in args.files]
    rounds = rounds_of(calls, n_rounds=ROUNDS, seconds=SECONDS_A_ROUND)
    print("| file | ms | to the first |\n|---|---|---|")
    for file, column in zip(args.files, zip(*rounds, strict=True), strict=True):
        ratio = statistics.median(taken / one[0] for taken, one in zip(column, rounds, strict=True))
        print(f"| {file} | {1e3 * statistics.median(column):.3f} | {ratio:.3f} |")


def call_of(file: str, n_threads: int) -> Callable[[], object]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    image = session.get_inputs()[0]
    shape = [1 if isinstance(size, str) else size for size in image.shape]
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return partial(session.run, ["logits"], {image.name: values})


if __name__ == "__main__":
    main()
