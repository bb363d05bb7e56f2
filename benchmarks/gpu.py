"""Everything that runs on a GPU, checked against PyTorch and measured, on the machine that this runs on.

    python -m benchmarks.gpu [--backend NAME,...] [--data DATA] [--masks N] [--images N] [--duration S] [--out FILE]

Makes a ResNet-110 with a policy network and random weights, opens it with each backend that works here, and for each

    compares the logits of every strategy with eager PyTorch for random masks and for the learned policy,
    runs `bdtool profile` with 17 of 54 blocks kept,
    times an image in each mode of strategy `graph` against CUDA graphs that know the mask, and the whole ResNet as one,
    runs many images and compares the device memory in use before and after.

Prints a table, and writes `benchmarks/results/gpu-<name>.json`. A backend that does not work here is named with the
reason.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdtool.data.sources import open_data
from bdtool.errors import BdtoolError
from bdtool.models.store import load_model
from bdtool.profiling.environment import describe_gpu
from bdtool.profiling.measure import Settings
from bdtool.profiling.profile import profile
from bdtool.runtime.factory import strategies_for
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.place import Place
from bdtool.runtime.policies import parse_policy
from bdtool.runtime.preprocess import preprocess
from benchmarks.latency import make_bundle
from engines.base import Backend, Call, Engine
from engines.capture import CapturingBackend
from engines.libcuda import driver_from_libcuda
from engines.network_graphs import NetworkGraphs
from engines.registry import batch_options, identify_backend, open_backend
from engines.store import EngineStore
from export.bundle import Bundle
from export.check import compare

BACKENDS = ("torch", "tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-tensorrt")
N_KEPT = 17  # of 54 blocks: the mean of the paper
AIMS = {"graph to known path": 1.15, "graph to full graph": 0.45}
DEVICE = "cuda:0"
_ROUNDS, _LAUNCHES = 20, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default=",".join(BACKENDS), help=f"default: {','.join(BACKENDS)}")
    parser.add_argument("--data", default="synthetic", help="DATA as everywhere; default: synthetic pictures")
    parser.add_argument("--masks", type=int, default=1000, help="random masks compared with PyTorch, default 1000")
    parser.add_argument("--images", type=int, default=100_000, help="images run to see memory grow, default 100000")
    parser.add_argument("--duration", type=float, default=3, help="seconds profiled for each strategy, default 3")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-<name of the GPU>.json")
    args = parser.parse_args()
    gpu = describe_gpu(DEVICE)
    if not gpu:
        sys.exit(f"no GPU to measure: {driver_from_libcuda().error}. See `bdtool doctor`")
    with tempfile.TemporaryDirectory(prefix="bdtool-benchmark-") as directory:
        path = Path(directory) / "resnet110"
        make_bundle(path)
        measured = {
            name: measure_backend(
                name, path, data=args.data, n_masks=args.masks, n_images=args.images, duration_s=args.duration
            )
            for name in args.backend.split(",")
        }
    print_results(gpu, measured)
    results = Path(__file__).parent / "results"
    out = args.out or results / f"gpu-{re.sub(r'[^a-z0-9]+', '-', str(gpu['gpu']).lower())}.json"
    out.write_text(json.dumps({"gpu": gpu, "network": "resnet110", "backends": measured}, indent=2) + "\n")
    print(f"\nwritten to {out}")


def measure_backend(
    name: str, path: Path, *, data: str, n_masks: int, n_images: int, duration_s: float
) -> dict[str, Any]:
    """Return everything measured with one backend on the bundle at `path`; {"error": reason} where it does not work."""
    try:
        identify_backend(name, DEVICE)
        bundle = Bundle.open(path)
        strategies = strategies_for(name, DEVICE)
        result: dict[str, Any] = {"parity": parity(bundle, name, strategies, n_masks)}
        source = open_data(data, network=bundle.network, resize=False)
        result["profile"] = profile(
            bundle,
            source,
            policy=f"distribute:{min(N_KEPT, bundle.network.n_blocks)}",
            strategies=[strategy for strategy in strategies if strategy != "full"],
            settings=Settings(duration_s=duration_s),
            place=Place(backend=name, device=DEVICE),
        ).to_json()
        if "graph" in strategies:
            result["graph"] = GraphBench(bundle, name).measure(n_images)
    except BdtoolError as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
    return result


def parity(bundle: Bundle, backend: str, strategies: tuple[str, ...], n_masks: int) -> dict[str, dict[str, float]]:
    """Return each strategy's worst error against eager PyTorch on the CPU, over the range of the logits."""
    model = load_model(bundle.path / "weights.safetensors").eval()
    images = open_data(f"synthetic:{min(n_masks, 64)}", network=bundle.network, resize=False).take(64).images
    keep = np.random.default_rng(0).random((n_masks, bundle.network.n_blocks)) < N_KEPT / 54
    pixels = images[np.arange(n_masks) % len(images)]
    errors = {}
    size = bundle.network.preprocessing
    for strategy in strategies:
        with Orchestrator.open(bundle, backend=backend, device=DEVICE, strategy=strategy) as runtime:
            found = runtime.run(pixels, policy=None if strategy == "full" else keep)
            given = _error(model, preprocess(pixels, size), found.logits, found.policy)
            learned = runtime.run(images)
            errors[strategy] = {"given bits": given, "learned": _error(model, preprocess(images, size), *_of(learned))}
    return errors


def _of(result: Any) -> tuple[np.ndarray, np.ndarray]:
    return result.logits, result.policy


def _error(model: torch.nn.Module, prepared: np.ndarray, logits: np.ndarray, keep: np.ndarray) -> float:
    with torch.inference_mode():
        expected = model(torch.from_numpy(prepared), torch.from_numpy(keep)).numpy()
    return compare(expected, logits, tolerance=0).error


class GraphBench:
    """Launches of the graph that decides beside those of graphs that know: the same image, copies included."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        self._backend: Backend = open_backend(name, DEVICE, tensorrt=batch_options(name, bundle.manifest.max_batch))
        store = EngineStore(bundle, identify_backend(name, DEVICE))
        self._network = store.network
        store.build(lambda: self._backend)
        self._engines: dict[str, Engine] = dict(store.load(self._backend, store.find()))
        assert isinstance(self._backend, CapturingBackend)
        self._capturer = self._backend.capturer()
        self._graphs = NetworkGraphs(self._network, self._backend, self._engines)
        rng = np.random.default_rng(0)
        stem = self._network.require("stem")
        self._pixels = rng.integers(0, 256, size=stem.inputs[0].shape_for(1), dtype=np.uint8)

    def measure(self, n_images: int) -> dict[str, Any]:
        """Return median milliseconds, their ratios beside the aims, the cost of a SWITCH, and the growth of memory."""
        n_blocks = self._network.n_blocks
        bits = parse_policy(f"distribute:{min(N_KEPT, n_blocks)}", n_blocks=n_blocks, has_policy_network=False)
        masks = {"17 kept": bits.matrix(1)[0], "none": np.zeros(n_blocks, bool), "all": np.ones(n_blocks, bool)}
        switch, cache = self._graphs.deciding(), self._graphs.deciding([masks["17 kept"]])
        runs: dict[str, Callable[[], object]] = {}
        for name, mask in masks.items():
            runs[f"graph, {name}"] = self._deciding(switch, mask)
            runs[f"policy cache, {name}"] = self._deciding(cache, mask)  # "17 kept" hits
            runs[f"path cache, {name}"] = self._reading_back(mask)
            runs[f"known path, {name}"] = self._request(self._graphs.path(mask))
            runs[f"known path and policy, {name}"] = self._request(self._known_with_policy(mask))
        runs["full graph"] = self._request(self._graphs.whole())
        ms = alternate_ms(runs)
        ratios = {
            "graph to known path": ms["graph, 17 kept"] / ms["known path, 17 kept"],
            "graph to full graph": ms["graph, 17 kept"] / ms["full graph"],
        }
        switch_us = {
            name: 1000 * (ms[f"graph, {name}"] - ms[f"known path and policy, {name}"]) / n_blocks
            for name in ("none", "all")
        }
        growth = self._growth(runs["graph, 17 kept"], n_images)
        return {"median_ms": ms, "ratios": ratios, "aims": AIMS, "switch_us": switch_us, "memory": growth}

    def _deciding(self, call: Call, mask: np.ndarray) -> Callable[[], object]:
        """Return a request of a graph that decides, the bits given."""
        forced = np.where(mask, 1, 2).astype(np.uint8)

        def request() -> None:
            self._graphs.image.write(self._pixels)
            call()
            self._graphs.kept.read()
            self._graphs.logits.read()

        # the bits stay where they are while one mask is timed, as those of a learned policy do
        request.prepare = lambda: self._graphs.force.write(forced)  # type: ignore[attr-defined]
        return request

    def _known_with_policy(self, mask: np.ndarray) -> Call:
        policy, path = self._graphs.policy(), self._graphs.path(mask)
        assert policy is not None

        def call() -> None:
            policy()
            path()

        return call

    def _reading_back(self, mask: np.ndarray) -> Callable[[], object]:
        """Return a request that waits for the policy before it launches the graph of the mask."""
        policy, path = self._graphs.policy(), self._graphs.path(mask)
        assert policy is not None

        def request() -> None:
            self._graphs.image.write(self._pixels)
            policy()
            self._graphs.probability.read()
            path()
            self._graphs.logits.read()

        return request

    def _request(self, call: Call) -> Callable[[], object]:
        def request() -> None:
            self._graphs.image.write(self._pixels)
            call()
            self._graphs.logits.read()

        return request

    def _growth(self, request: Callable[[], object], n_images: int) -> dict[str, int]:
        cu = self._capturer.device.cu
        before = int(cu.cuMemGetInfo()[1])
        for _ in range(n_images):
            request()
        return {"images": n_images, "growth_bytes": before - int(cu.cuMemGetInfo()[1])}


def alternate_ms(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median milliseconds of each, in alternating rounds; the first calls of a round are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            getattr(run, "prepare", lambda: None)()
            for i in range(3 + _LAUNCHES):
                start = time.perf_counter()
                run()
                if i >= 3:
                    times[name].append((time.perf_counter() - start) * 1000)
    return {name: float(np.median(values)) for name, values in times.items()}


def print_results(gpu: dict[str, Any], measured: dict[str, dict[str, Any]]) -> None:
    print(", ".join(f"{name} {value}" for name, value in gpu.items()))
    print("\n| backend | strategy | worst error | median, ms | to full |\n|---|---|---|---|---|")
    for name, result in measured.items():
        if "error" in result:
            print(f"| {name} | - | {result['error']} | | |")
            continue
        for strategy, errors in result["parity"].items():
            row = result["profile"]["strategies"][strategy]
            median, ratio = row["latency_ms"]["median"], row["ratio_to_full"]
            print(f"| {name} | {strategy} | {max(errors.values()):.2g} | {median:.4f} | {ratio:.3f} |")
    for name, result in measured.items():
        if "graph" not in result:
            continue
        found = result["graph"]
        print(f"\n{name}: one launch, copies included, median ms")
        print("\n".join(f"  {what:<32} {ms:.4f}" for what, ms in found["median_ms"].items()))
        for what, ratio in found["ratios"].items():
            print(f"  {what}: {ratio:.3f} (aim: at most {found['aims'][what]})")
        print("  a SWITCH: " + ", ".join(f"{us:.2f} us with {what} kept" for what, us in found["switch_us"].items()))
        print(f"  memory after {found['memory']['images']} images: {found['memory']['growth_bytes']:+d} bytes")


if __name__ == "__main__":
    main()
