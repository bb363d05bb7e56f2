"""Graphs of a bundle's engines on the GPU, timed side by side: those that decide beside those that know the mask."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bdtool.errors import EngineError
from bdtool.runtime.policies import parse_policy
from bdtool.specs import NetworkSpec
from bdtool.words import counted
from engines.base import Backend, Call, Engine
from engines.capture import CapturingBackend
from engines.cuda_graph import BLOCKS_PER_SWITCH
from engines.graph_modes import PATH_CACHE, POLICY_CACHE, SWITCH
from engines.network_graphs import NetworkGraphs
from engines.registry import batch_options, identify_backend, open_backend
from engines.store import EngineStore
from export.bundle import Bundle
from export.check import compare

DEVICE = "cuda:0"
SHARE_KEPT = 17 / 54  # the mean of the paper
AIMS = {"known path": 1.15, "full graph": 0.45}  # the most that strategy `graph` may take, as a ratio to each
BEGUN = f"{POLICY_CACHE} begun"  # its first blocks run beside the policy network, and are the right ones for "some"
MODES = (SWITCH, POLICY_CACHE, BEGUN, PATH_CACHE)
_ROUNDS, _LAUNCHES = 20, 25


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
        speculation = self._graphs.speculation([masks["some"]], [1.0])
        begun = self._graphs.deciding([masks["some"]], speculation)
        runs: dict[str, Callable[[], object]] = {}
        for name, mask in masks.items():
            runs[f"{SWITCH}, {name} kept"] = self._deciding(switch, mask)
            runs[f"{POLICY_CACHE}, {name} kept"] = self._deciding(cache, mask)  # which knows "some"
            runs[f"{BEGUN}, {name} kept"] = self._deciding(begun, mask)
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
