"""What holds `path` back at batch 1: its engine calls alone, what lies between them, and other ways to make them.

    python benchmarks/bounds.py BUNDLE --data DATA [--policy POLICY] [--rounds N]

One thread, ONNX Runtime on the CPU. Alone, each engine is called again and again on warm caches; in place, engines
alternate as they do for an image.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort

from bdtool.data.sources import open_data
from bdtool.runtime.loading import Loader
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.paths import parts_of_path
from bdtool.runtime.policies import parse_policy
from bdtool.specs import PartSpec
from engines.base import Call, Engine
from engines.engine_set import EngineSet
from engines.onnxrt import OnnxRuntimeBackend
from engines.registry import identify_backend
from engines.store import EngineStore
from export.bundle import Bundle
from export.compose import compose_parts

REPEATS = 8  # calls of one reading: a call is near the clock's own cost
LEVELS = {
    "optimised across block borders": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "NCHW, by im2col and GEMM": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", default="synthetic", help="DATA as everywhere; default: synthetic pictures")
    parser.add_argument("--policy", default="distribute:17")
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    images = open_data(args.data, network=bundle.network).take(64).images
    keep = parse_policy(args.policy, n_blocks=bundle.network.n_blocks, has_policy_network=True).matrix(1)
    print_alone(alone(bundle, keep[0], rounds=args.rounds))
    for strategy in ("full", "path"):
        print_in_place(strategy, in_place(bundle, strategy, images, keep, rounds=args.rounds))


def alone(bundle: Bundle, mask: np.ndarray, *, rounds: int) -> dict[str, float]:
    """Return the median microseconds of one call of each engine, and of those made in other ways."""
    network, backend = bundle.network, OnnxRuntimeBackend(threads=1)
    full, policy_part, whole = network.require("full"), network.require("policy"), network.whole("path", flops=0)
    parts = parts_of_path(network, mask)
    store = EngineStore(bundle, identify_backend("onnxruntime", "cpu"))
    baseline = Loader(bundle, store, backend, strategy="full").load().engines
    engines = Loader(bundle, store, backend, strategy="path").load().engines
    assert isinstance(engines, EngineSet)
    calls = {
        "full": _bound(backend, full, baseline[full.name]),
        "policy": _bound(backend, policy_part, engines[policy_part.name]),
        "path": _bound(backend, whole, engines.join(whole, parts).engine),
    }
    policy = bundle.part_path(policy_part).read_bytes()
    joined = compose_parts("path", [(part, bundle.part_path(part).read_bytes()) for part in parts], check=False)
    for way, level in LEVELS.items():
        calls[f"policy, {way}"], calls[f"path, {way}"] = _plain(policy, level), _plain(joined, level)
    return _medians(calls, rounds)


def in_place(bundle: Bundle, strategy: str, images: np.ndarray, keep: np.ndarray, *, rounds: int) -> list[float]:
    """Return the median microseconds before, in, between and after the engine calls of one image."""
    stamps: list[float] = []

    def wrap(part: PartSpec, call: Call) -> Call:
        def timed() -> None:
            stamps.append(time.perf_counter())
            call()
            stamps.append(time.perf_counter())

        return timed

    rows = []
    # joined ahead: until an engine of the path is there, the chain runs, in other pieces
    paths = PathOptions(ahead=list(keep)) if strategy == "path" else None
    with Orchestrator.open(bundle, strategy=strategy, threads=1, paths=paths) as opened:
        runtime = opened.timed(wrap)
        for index in range(rounds * REPEATS):
            image = images[index % len(images)][None]
            stamps.clear()
            start = time.perf_counter()
            _ = runtime.run(image) if strategy == "full" else runtime.run_with_policy_cost(image, keep)
            rows.append(np.diff([start, *stamps, time.perf_counter()]) * 1e6)
    medians: list[float] = np.median(rows[rounds:], axis=0).tolist()  # the first are the warm-up
    return medians


def _bound(backend: OnnxRuntimeBackend, part: PartSpec, engine: Engine) -> Call:
    [source], [target] = part.inputs, part.outputs
    buffers = [backend.allocate((1, *map(int, tensor.shape[1:])), "float32") for tensor in (source, target)]
    buffers[0].write(np.random.default_rng(0).normal(size=buffers[0].read().shape).astype(np.float32))
    return engine.bind({source.name: buffers[0]}, {target.name: buffers[1]})


def _plain(model: bytes, level: ort.GraphOptimizationLevel) -> Call:
    """Return a call of a session that ONNX Runtime optimises by itself, with bound input and output."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.graph_optimization_level = 1, level
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    [source], [target] = session.get_inputs(), session.get_outputs()
    values = np.random.default_rng(0).normal(size=(1, *source.shape[1:])).astype(np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input(source.name, values)
    binding.bind_ortvalue_output(
        target.name, ort.OrtValue.ortvalue_from_numpy(session.run(None, {source.name: values})[0])
    )
    return lambda: session.run_with_iobinding(binding)


def _medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    readings: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # alone: its weights are in the caches when the clock starts
            readings[name].append(_clocked(call))
    return {name: float(np.median(values)) for name, values in readings.items()}


def _clocked(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    return (time.perf_counter() - start) / REPEATS * 1e6


def print_alone(medians: dict[str, float]) -> None:
    print("| engine, alone | us a call | of full |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.0f} | {value / medians['full']:.4f} |")
    both = medians["policy"] + medians["path"]
    print(f"| policy and path | {both:.0f} | {both / medians['full']:.4f} |\n")


def print_in_place(strategy: str, medians: list[float]) -> None:
    outside, calls = sum(medians[::2]), medians[1::2]
    engines = " + ".join(f"{value:.0f}" for value in calls)
    print(f"{strategy}: {engines} us in engines, {outside:.0f} us outside them, {sum(medians):.0f} us in all")


if __name__ == "__main__":
    main()
