"""Everything that runs on a GPU, checked against PyTorch and measured, on the machine that this runs on.

    python -m benchmarks.gpu [--bundle BUNDLE] [--backend NAME,...] [--data DATA] [--masks N] [--images N]
                             [--duration S] [--policy-downscale N] [--out FILE]

Makes a ResNet-110 with a policy network and random weights, opens it with each backend that works here, and for each

    compares the logits of every strategy with eager PyTorch for random masks and for the learned policy,
    runs `bdtool profile` with 17 of 54 blocks kept,
    times an image in each mode of strategy `graph` against CUDA graphs that know the mask, and the whole ResNet as one,
    in FP32 and FP16, and compares what each mode computes with the former,
    runs many images and compares the device memory in use before and after.

Prints a table, and writes `benchmarks/results/gpu-<name>.json`. A backend that does not work here is named with the
reason, and so is a measurement that fails: the others are made all the same. The exit status is 1 where a measurement
failed, or no backend works.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdtool.data.sources import open_data
from bdtool.models.store import load_model
from bdtool.profiling.environment import describe_gpu
from bdtool.profiling.profile import profile
from bdtool.profiling.workload import Settings
from bdtool.runtime.factory import strategies_for
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.place import Place
from bdtool.runtime.preprocess import preprocess
from benchmarks.graph_bench import BEGUN, DEVICE, SHARE_KEPT, GraphBench, kept_policy
from benchmarks.latency import make_bundle
from engines.libcuda import driver_from_libcuda
from engines.registry import batch_options, identify_backend, open_backend
from export.bundle import Bundle
from export.check import compare
from export.files import write_json

BACKENDS = ("torch", "tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-tensorrt")
PRECISIONS = ("fp32", "fp16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: a ResNet-110 with random weights, which is made")
    parser.add_argument("--policy-downscale", type=int, help="of the images for its policy network, default 1")
    parser.add_argument("--backend", default=",".join(BACKENDS), help=f"default: {','.join(BACKENDS)}")
    parser.add_argument("--data", default="synthetic", help="DATA as everywhere; default: synthetic pictures")
    parser.add_argument("--masks", type=int, default=1000, help="random masks compared with PyTorch, default 1000")
    parser.add_argument("--images", type=int, default=100_000, help="images run to see memory grow, default 100000")
    parser.add_argument("--duration", type=float, default=3, help="seconds profiled for each strategy, default 3")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-<name>[-policy-downscale-N].json")
    args = parser.parse_args()
    if args.bundle and args.policy_downscale:
        parser.error("--policy-downscale is of the network that is made; a bundle has its own policy network")
    gpu = describe_gpu(DEVICE)
    if not gpu:
        sys.exit(f"no GPU to measure: {driver_from_libcuda().error}. See `bdtool doctor`")
    with tempfile.TemporaryDirectory(prefix="bdtool-benchmark-") as directory:
        path = args.bundle or Path(directory) / "resnet110"
        if args.bundle is None:
            make_bundle(path, policy_downscale=args.policy_downscale or 1)
        network = Bundle.open(path).network
        facts = {"network": network.arch, "flops": {part.name: part.flops for part in network.parts}}
        out = args.out or default_file(str(gpu["gpu"]), policy_downscale=args.policy_downscale)
        measured: dict[str, dict[str, Any]] = {}
        for name in args.backend.split(","):
            measured[name] = {}
            for what, result in measure_backend(
                name, path, data=args.data, n_masks=args.masks, n_images=args.images, duration_s=args.duration
            ):
                measured[name][what] = result  # written at once: time on a GPU is short, and may end
                write_json(out, {"gpu": gpu, **facts, "backends": measured})
                print(f"{time.strftime('%H:%M:%S')} {name}: {what} done", file=sys.stderr)
    print_results(gpu, measured)
    print(f"\nwritten to {out}")
    if failed := failures(measured):
        sys.exit(f"{'; '.join(failed)}: see above")


def default_file(gpu: str, *, policy_downscale: int | None = None) -> Path:
    name = f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.lower())}"
    if policy_downscale:
        name += f"-policy-downscale-{policy_downscale}"
    return Path(__file__).parent / "results" / f"{name}.json"


def measure_backend(
    name: str, path: Path, *, data: str, n_masks: int, n_images: int, duration_s: float
) -> Iterator[tuple[str, Any]]:
    """Yield names and figures of what is measured with one backend, "NAME, error" and the reason where one fails.

    "error" alone says why the backend does not work here.
    """
    try:
        identify_backend(name, DEVICE)
        bundle = Bundle.open(path)
        open_backend(name, DEVICE, tensorrt=batch_options(name, bundle.manifest.max_batch))  # it may be for CPUs alone
        strategies = strategies_for(name, DEVICE)
    except Exception as exc:  # of any library: the other backends are measured all the same
        yield "error", _reason(exc)
        return
    steps: dict[str, Callable[[], Any]] = {
        "parity": lambda: parity(bundle, name, strategies, n_masks),
        "profile": lambda: profiled(bundle, name, strategies, data, duration_s),
    }
    if "graph" in strategies:
        for precision in PRECISIONS:
            steps[f"graph, {precision}"] = partial(measure_graphs, bundle, name, precision, n_images)
    for what, step in steps.items():
        try:
            yield what, step()
        except Exception as exc:
            yield f"{what}, error", _reason(exc)


def failures(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Name the measurements that failed on backends that work, or say that no backend does."""
    if all("error" in result for result in measured.values()):
        return ["no backend works here"]
    found = [(name, what) for name, result in measured.items() for what in result if what.endswith(", error")]
    return [f"{name}: {what.removesuffix(', error')} failed" for name, what in found]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def profiled(bundle: Bundle, backend: str, strategies: tuple[str, ...], data: str, duration_s: float) -> dict[str, Any]:
    """Return what `bdtool profile` measures of each strategy."""
    return profile(
        bundle,
        open_data(data, network=bundle.network, resize=False),
        policy=kept_policy(bundle.network.n_blocks),
        strategies=[strategy for strategy in strategies if strategy != "full"],
        settings=Settings(duration_s=duration_s),
        place=Place(backend=backend, device=DEVICE),
    ).to_json()


def measure_graphs(bundle: Bundle, backend: str, precision: str, n_images: int) -> dict[str, Any]:
    return GraphBench(bundle, backend, precision).measure(n_images)


def parity(bundle: Bundle, backend: str, strategies: tuple[str, ...], n_masks: int) -> dict[str, dict[str, float]]:
    """Return each strategy's worst error against eager PyTorch on the CPU, over the range of the logits."""
    model = load_model(bundle.path / "weights.safetensors").eval()
    images = open_data(f"synthetic:{min(n_masks, 64)}", network=bundle.network, resize=False).take(64).images
    keep = np.random.default_rng(0).random((n_masks, bundle.network.n_blocks)) < SHARE_KEPT
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


def print_results(gpu: dict[str, Any], measured: dict[str, dict[str, Any]]) -> None:
    print(", ".join(f"{name} {value}" for name, value in gpu.items()))
    print("\n| backend | strategy | worst error | median, ms | to full |\n|---|---|---|---|---|")
    for name, result in measured.items():
        strategies = {**result.get("parity", {}), **result.get("profile", {}).get("strategies", {})}
        for strategy in strategies:
            print(_row(name, strategy, result))
        for what, reason in result.items():
            if what.endswith("error"):
                print(f"| {name} | {what.removesuffix('error').removesuffix(', ') or '-'} | {reason} | | |")
    for name, result in measured.items():
        for precision in PRECISIONS:
            if f"graph, {precision}" in result:
                print_graphs(f"{name}, {precision}", result[f"graph, {precision}"])


def _row(name: str, strategy: str, result: dict[str, Any]) -> str:
    """Return the row of a strategy, of which some figures may be missing."""
    errors = result.get("parity", {}).get(strategy)
    timed = result.get("profile", {}).get("strategies", {}).get(strategy)
    error = "-" if errors is None else f"{max(errors.values()):.2g}"
    times = "- | -" if timed is None else f"{timed['latency_ms']['median']:.4f} | {timed['ratio_to_full']:.3f}"
    return f"| {name} | {strategy} | {error} | {times} |"


def print_graphs(what: str, found: dict[str, Any]) -> None:
    print(f"\n{what}: an image, copies included, median ms; {found['n_kept']} of {found['n_blocks']} blocks are some")
    print("\n".join(f"  {name:<36} {ms:.4f}" for name, ms in found["median_ms"].items()))
    for mode, errors in found["errors"].items():
        print(f"  {mode:<22} worst errors: " + ", ".join(f"{name} {error:.2g}" for name, error in errors.items()))
    aims = ", ".join(f"{aim} to {name}" for name, aim in found["aims"].items())
    print(f"  ratios (aims: at most {aims})")
    for mode, ratios in found["ratios"].items():
        print(f"  {mode:<14} " + ", ".join(f"{ratio:.3f} {name}" for name, ratio in ratios.items()))
    switches = ", ".join(f"{us:.1f} us with {name} kept" for name, us in found["all_switches_us"].items())
    print(f"  {BEGUN}: {found['n_begun']} blocks beside the policy network")
    print(f"  all SWITCHes, one for {found['blocks_per_switch']} blocks: {switches}")
    print(f"  memory after {found['memory']['images']} images: {found['memory']['growth_bytes']:+d} bytes")


if __name__ == "__main__":
    main()
