"""What Python does for an image on a GPU: its time, and whether memory grows. No GPU is needed.

    python -m benchmarks.host_loop [--bundle BUNDLE] [--images N] [--strategy NAME,...]

Opens a ResNet-110 with random weights on the tests' stand-ins for TensorRT and the driver, whose calls then return at
once, and runs single images with 8 keep masks in turns. What is left is our own code: a request's microseconds of it,
and how much the process grew over many images after the first thousand. On a GPU the driver's calls come on top.
"""

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.runtime.path_cache import PathOptions
from benchmarks.latency import make_bundle
from export.bundle import Bundle
from tests.fake_tensorrt import install_gpu

STRATEGIES = ("graph@policy-cache", "graph@switch", "graph@path-cache", "full", "chain")
_N_MASKS, _N_KEPT = 8, 17
_WARM_UP = 1000  # images; the allocator's pools fill
_SILENT = (  # the driver's functions that a request calls
    "cuCtxSetCurrent",
    "cuCtxPushCurrent",
    "cuCtxPopCurrent",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuGraphLaunch",
    "cuMemcpyDtoDAsync",
    "cuMemcpyDtoHAsync",
    "cuMemcpyHtoDAsync",
    "cuStreamSynchronize",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: a ResNet-110 with random weights, which is made")
    parser.add_argument("--images", type=int, default=100_000, help="for each strategy, default 100000")
    parser.add_argument("--strategy", default=",".join(STRATEGIES), help=f"default: {','.join(STRATEGIES)}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bdtool-benchmark-") as directory, pytest.MonkeyPatch.context() as patch:
        path = args.bundle or Path(directory) / "resnet110"
        if args.bundle is None:
            make_bundle(path)
        print("| strategy | µs an image | growth, KiB |\n|---|---|---|")
        for name in args.strategy.split(","):
            row = host_loop(path, name, args.images, patch, Path(directory) / name)
            print(f"| `{name}` | {row['us_an_image']:.1f} | {row['growth_bytes'] / 1024:.0f} |", flush=True)


def host_loop(
    bundle: Path, name: str, n_images: int, patch: pytest.MonkeyPatch, cache: Path, *, n_warm_up: int = _WARM_UP
) -> dict[str, Any]:
    """Return microseconds an image, and the bytes that the process grew by."""
    driver = install_gpu(patch, cache)
    strategy, _, mode = name.partition("@")
    options = {"backend": "tensorrt", "device": "cuda:0", "strategy": strategy, "cuda_graph": mode or "auto"}
    masks = _masks(Bundle.open(bundle).network.n_blocks)
    with Orchestrator.open(bundle, **options, paths=PathOptions(ahead=list(masks))) as runtime:
        image = np.zeros(runtime.network.require("stem").inputs[0].shape_for(1), np.uint8)
        keep = None if strategy == "full" else masks
        for i in range(_N_MASKS):  # makes what each mask needs
            runtime.run(image, policy=None if keep is None else keep[i])
        _silence(driver)
        _run(runtime, image, keep, n_warm_up)
        before, start = _resident_bytes(), time.perf_counter()
        _run(runtime, image, keep, n_images)
        seconds = time.perf_counter() - start
        return {"us_an_image": 1e6 * seconds / n_images, "growth_bytes": _resident_bytes() - before}


def _run(runtime: Orchestrator, image: np.ndarray, keep: np.ndarray | None, n_images: int) -> None:
    for i in range(n_images):
        runtime.run(image, policy=None if keep is None else keep[i % _N_MASKS])


def _masks(n_blocks: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    n_kept = min(_N_KEPT, n_blocks)
    return np.array([rng.permutation(n_blocks) < n_kept for _ in range(_N_MASKS)])


def _silence(driver: Any) -> None:
    """Let calls do nothing: what the stand-in would compute is no part of what is measured."""
    done = (driver.CUresult.CUDA_SUCCESS,)
    for name in _SILENT:
        setattr(driver, name, lambda *arguments: done)
    driver.enqueue = lambda work, ms, stream: None


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
