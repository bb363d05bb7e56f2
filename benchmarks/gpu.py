"""Everything that runs on a GPU, checked against PyTorch and measured, on the machine that this runs on.

    python -m benchmarks.gpu [--bundle BUNDLE] [--backend NAME,...] [--data DATA] [--masks N] [--images N]
                             [--duration S] [--out FILE]

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
from bdtool.errors import EngineError
from bdtool.models.store import load_model
from bdtool.profiling.environment import describe_gpu
from bdtool.profiling.profile import profile
from bdtool.profiling.workload import Settings
from bdtool.runtime.factory import strategies_for
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.place import Place
from bdtool.runtime.policies import parse_policy
from bdtool.runtime.preprocess import preprocess
from bdtool.specs import NetworkSpec
from bdtool.words import counted
from benchmarks.latency import make_bundle
from engines.base import Backend, Call, Engine
from engines.capture import CapturingBackend
from engines.cuda_graph import BLOCKS_PER_SWITCH
from engines.graph_modes import IF, PATH_CACHE, POLICY_CACHE, SWITCH
from engines.libcuda import driver_from_libcuda
from engines.network_graphs import NetworkGraphs
from engines.registry import batch_options, identify_backend, open_backend
from engines.store import EngineStore
from export.bundle import Bundle
from export.check import compare
from export.files import write_json

BACKENDS = ("torch", "tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-tensorrt")
SHARE_KEPT = 17 / 54  # the mean of the paper
AIMS = {"known path": 1.15, "full graph": 0.45}  # the most that strategy `graph` may take, as a ratio to each
BEGUN = f"{POLICY_CACHE} begun"  # its first blocks run beside the policy network, and are the right ones for "some"
MODES = (SWITCH, POLICY_CACHE, BEGUN, IF, PATH_CACHE)
PRECISIONS = ("fp32", "fp16")
DEVICE = "cuda:0"
_ROUNDS, _LAUNCHES = 20, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: a ResNet-110 with random weights, which is made")
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
        path = args.bundle or Path(directory) / "resnet110"
        if args.bundle is None:
            make_bundle(path)
        arch = Bundle.open(path).network.arch
        results = Path(__file__).parent / "results"
        out = args.out or results / f"gpu-{re.sub(r'[^a-z0-9]+', '-', str(gpu['gpu']).lower())}.json"
        measured: dict[str, dict[str, Any]] = {}
        for name in args.backend.split(","):
            measured[name] = {}
            for what, result in measure_backend(
                name, path, data=args.data, n_masks=args.masks, n_images=args.images, duration_s=args.duration
            ):
                measured[name][what] = result  # written at once: time on a GPU is short, and may end
                write_json(out, {"gpu": gpu, "network": arch, "backends": measured})
                print(f"{time.strftime('%H:%M:%S')} {name}: {what} done", file=sys.stderr)
    print_results(gpu, measured)
    print(f"\nwritten to {out}")
    if failed := failures(measured):
        sys.exit(f"{'; '.join(failed)}: see above")


def measure_backend(
    name: str, path: Path, *, data: str, n_masks: int, n_images: int, duration_s: float
) -> Iterator[tuple[str, Any]]:
    """Yield names and figures of what is measured with one backend, "NAME, error" and the reason where one fails.

    "error" alone says why the backend does not work here.
    """
    try:
        identify_backend(name, DEVICE)
        bundle = Bundle.open(path)
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


def kept_policy(n_blocks: int) -> str:
    return f"distribute:{max(1, round(SHARE_KEPT * n_blocks))}"


def kept_masks(n_blocks: int) -> dict[str, np.ndarray]:
    some = parse_policy(kept_policy(n_blocks), n_blocks=n_blocks, has_policy_network=False)
    return {"some": some.matrix(1)[0], "none": np.zeros(n_blocks, bool), "all": np.ones(n_blocks, bool)}


def open_engines(
    bundle: Bundle, backend: str, precision: str = "fp32"
) -> tuple[NetworkSpec, Backend, dict[str, Engine]]:
    """Return the network as its engines take it, the backend, and every engine; those that are missing are built.

    Raises:
        EngineError: one does not build.
    """
    library = open_backend(backend, DEVICE, tensorrt=batch_options(backend, bundle.manifest.max_batch))
    store = EngineStore(bundle, identify_backend(backend, DEVICE), precision=precision)
    failed = [status.message for status in store.build(lambda: library) if status.status == "failed"]
    if failed:
        raise EngineError(f"{counted(len(failed), 'engine')} did not build in {precision}; the first: {failed[0]}")
    return store.network, library, dict(store.load(library, store.find()))


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


class GraphBench:
    """Launches of the graph that decides beside those of graphs that know: the same image, copies included."""

    def __init__(self, bundle: Bundle, name: str, precision: str = "fp32") -> None:
        self._network, backend, engines = open_engines(bundle, name, precision)
        assert isinstance(backend, CapturingBackend)
        self._capturer = backend.capturer()
        self._graphs = NetworkGraphs(self._network, backend, engines)
        rng = np.random.default_rng(0)
        stem = self._network.require("stem")
        self._pixels = rng.integers(0, 256, size=stem.inputs[0].shape_for(1), dtype=np.uint8)

    def measure(self, n_images: int) -> dict[str, Any]:
        """Return errors, median milliseconds, their ratios, what the SWITCHes cost, and how much memory grew."""
        masks = kept_masks(self._network.n_blocks)
        switch, cache = self._graphs.deciding(), self._graphs.deciding([masks["some"]])
        branch, speculation = self._graphs.branching(), self._graphs.speculation([masks["some"]], [1.0])
        begun = self._graphs.deciding([masks["some"]], speculation)
        runs: dict[str, Callable[[], object]] = {}
        for name, mask in masks.items():
            runs[f"{SWITCH}, {name} kept"] = self._deciding(switch, mask)
            runs[f"{POLICY_CACHE}, {name} kept"] = self._deciding(cache, mask)  # which knows "some"
            runs[f"{BEGUN}, {name} kept"] = self._deciding(begun, mask)
            runs[f"{IF}, {name} kept"] = self._deciding(branch, mask)
            runs[f"{PATH_CACHE}, {name} kept"] = self._reading_back(mask)
            runs[f"known path, {name} kept"] = self._request(self._graphs.path(mask))
            runs[f"known path and policy, {name} kept"] = self._request(self._known_with_policy(mask))
        runs["full graph"] = self._request(self._graphs.whole())
        errors = self._errors(runs, masks)
        ms = alternate_ms(runs)
        compared = {name: ms[f"{name}, some kept"] for name in ("known path", "known path and policy")}
        compared["full graph"] = ms["full graph"]
        ratios = {
            mode: {f"to {name}": ms[f"{mode}, some kept"] / other for name, other in compared.items()} for mode in MODES
        }
        switch_us = {
            name: 1000 * (ms[f"{SWITCH}, {name} kept"] - ms[f"known path and policy, {name} kept"])
            for name in ("none", "some", "all")
        }
        return {
            "n_kept": int(masks["some"].sum()),
            "n_blocks": len(masks["some"]),
            "blocks_per_switch": BLOCKS_PER_SWITCH,
            "n_begun": len(speculation.runs),
            "errors": errors,
            "median_ms": ms,
            "ratios": ratios,
            "aims": AIMS,
            "all_switches_us": switch_us,
            "memory": self._growth(runs[f"{SWITCH}, some kept"], n_images),
        }

    def _deciding(self, call: Call, mask: np.ndarray) -> Callable[[], object]:
        """Return a request of a graph that decides, the bits given."""
        forced = np.where(mask, 1, 2).astype(np.uint8)

        def request() -> None:
            self._graphs.image.write(self._pixels)
            call()
            self._graphs.logits.begin_read()
            self._graphs.kept.read()

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

    def _errors(self, runs: dict[str, Callable[[], object]], masks: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return each mode's worst errors, over the masks, against the policy network and the known path in a row.

        Those of logits and of probabilities are over the range of the values; of keep bits the wrong ones are counted.
        """
        worst: dict[str, Any] = {mode: {"logits": 0.0, "probabilities": 0.0, "keep bits": 0} for mode in MODES}
        for kept, mask in masks.items():
            expected = self._outputs(runs[f"known path and policy, {kept} kept"])
            for mode, errors in worst.items():
                found = self._outputs(runs[f"{mode}, {kept} kept"])
                for name in ("logits", "probabilities"):
                    errors[name] = max(errors[name], compare(expected[name], found[name], tolerance=0).error)
                if mode != PATH_CACHE:  # where the host knows them
                    errors["keep bits"] += int(np.count_nonzero(found["keep bits"] != mask))
        return worst

    def _outputs(self, request: Callable[[], object]) -> dict[str, np.ndarray]:
        """Return what a request writes; where it writes nothing, zeros."""
        graphs = self._graphs
        buffers = {"logits": graphs.logits, "probabilities": graphs.probability, "keep bits": graphs.kept}
        for buffer in buffers.values():
            buffer.write(np.zeros_like(buffer.read()))
        _prepare(request)
        request()
        return {name: buffer.read().copy() for name, buffer in buffers.items()}

    def _growth(self, request: Callable[[], object], n_images: int) -> dict[str, int]:
        cu = self._capturer.device.cu
        _prepare(request)
        before = int(cu.cuMemGetInfo()[1])
        for _ in range(n_images):
            request()
        return {"images": n_images, "growth_bytes": before - int(cu.cuMemGetInfo()[1])}


def alternate_ms(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median milliseconds of each, in alternating rounds; the first calls of a round are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            _prepare(run)
            for i in range(3 + _LAUNCHES):
                start = time.perf_counter()
                run()
                if i >= 3:
                    times[name].append((time.perf_counter() - start) * 1000)
    return {name: float(np.median(values)) for name, values in times.items()}


def _prepare(request: Callable[[], object]) -> None:
    """Give a request its keep bits, where it does not do so each time."""
    getattr(request, "prepare", lambda: None)()


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
