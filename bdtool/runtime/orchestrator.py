"""`Orchestrator`: a bundle opened for inference. Images go in; logits, and which blocks ran, come out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from bdtool.errors import DataError, EngineError, PolicyError
from bdtool.runtime.controllers import Controller, MaskController, all_finite, finite_probabilities
from bdtool.runtime.factory import DEFAULT_STRATEGY, make_strategy
from bdtool.runtime.image_forms import ImageForms
from bdtool.runtime.intake import Intake
from bdtool.runtime.loading import Loaded
from bdtool.runtime.opening import open_engines
from bdtool.runtime.padding import padded
from bdtool.runtime.path_cache import PathOptions, PathStats
from bdtool.runtime.policies import keep_matrix_from
from bdtool.runtime.requests import PolicyLike, PolicyReader
from bdtool.runtime.result import RunResult, joined
from bdtool.runtime.strategies import Strategy, WrapCall
from bdtool.runtime.thresholds import bundle_at
from bdtool.runtime.turns import Turns
from bdtool.specs import NetworkSpec, PartSpec
from engines.base import DEFAULT_BACKEND, DEFAULT_DEVICE, Backend, Engine, context_of
from engines.device_array import DeviceArray, DeviceArrayBackend, Images
from engines.device_timer import DeviceTimer, timer_of
from engines.engine_set import smallest_batch_of
from engines.graph_modes import AUTO as AUTO_GRAPH
from engines.graph_modes import GraphChoice, GraphPlan, chosen
from export.bundle import Bundle

logger = logging.getLogger(__name__)
_CLOSED = "this orchestrator was closed; open the bundle again"


class Orchestrator:
    """A bundle's engines, chained for each image by its policy vector.

    Threads may share one, whose images then run one call after the other: the buffers between engines are its own. To
    run them side by side, open one for each thread.

    Args:
        network: as `engines` take it, images as pixels or preprocessed.
        preprocessed: gives engines for preprocessed images where `engines` take pixels, when such images first come.

    Attributes:
        network: the bundle's parts, their images and activations in the types that the engines have.
        threads: CPU threads of one engine call.
        max_batch: images that run at once, by the bundle and its engines; more of them run in slices.
        min_batch: images that the engines take at least; fewer of them take as long.
    """

    def __init__(
        self,
        network: NetworkSpec,
        backend: Backend,
        engines: Mapping[str, Engine],
        *,
        strategy: str,
        max_batch: int,
        paths: PathOptions | None = None,
        graphs: GraphPlan | None = None,
        wrap: WrapCall = lambda part, call: call,
        preprocessed: Callable[[], Loaded] | None = None,
    ) -> None:
        self.network = network
        self.strategy_name = strategy
        self.threads = backend.threads
        self._library: Backend | None = backend  # None once it is closed
        has_threads = backend.threads > 1 or strategy == "path"  # which joins engines in the background
        self._turns = Turns(needs_own_process=has_threads or timer_of(backend) is not None)
        self.max_batch = max_batch
        self.min_batch = smallest_batch_of(engines)
        self._graphs, self._paths = graphs, paths
        self._current = context_of(backend)

        def make(loaded: Loaded) -> Strategy:  # refers to no orchestrator: one that nobody closed is freed at once
            found = loaded.network, backend, loaded.engines
            return make_strategy(strategy, *found, wrap=wrap, paths=paths, graphs=graphs)

        # None once it is closed
        self._forms: ImageForms | None = ImageForms(Loaded(network, engines), make, preprocessed)
        self._intake = Intake(network)
        self._policies = PolicyReader(network, runs_all=strategy == "full")

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        backend: str = DEFAULT_BACKEND,
        device: str = DEFAULT_DEVICE,
        strategy: str = DEFAULT_STRATEGY,
        threads: int | None = None,
        precision: str = "fp32",
        paths: PathOptions | None = None,
        cuda_graph: str = AUTO_GRAPH,
        threshold: float | None = None,
    ) -> Orchestrator:
        """Open a bundle. Engines that it lacks for this machine are built first, as `bdtool build` does.

        Args:
            bundle: the bundle's directory, or an opened `Bundle`.
            backend: "onnxruntime", "onnxruntime-tensorrt" (ONNX Runtime with its TensorRT provider), "torch",
                "tensorrt" or "tensorrt-rtx".
            device: "cpu", or "cuda:N" where the backend has it ("cuda" is "cuda:0"); never exchanged for another in
                silence.
            strategy: "chain" (one engine call for each kept block), "path" (one engine for each frequent keep mask,
                the chain for the others), "fused" (the whole network as one engine with an `If` for each block),
                "graph" (likewise by CUDA graphs, for single images on a GPU), "full" (the whole ResNet as one engine)
                or "auto" (what `bdtool profile --strategy auto` recommended for this target and number of threads).
            threads: CPU threads of one engine call; None takes the processors that are there, at most 4. More than
                one come from a pool that ONNX Runtime makes once in a process, and that each later session of the
                process must use, the caller's own too: `SessionOptions.use_per_session_threads = False`. It keeps its
                size: None takes that from then on, and another number is refused, 1 included.
            precision: which parts to run: "fp32", or one that `bdtool calibrate` has added to the bundle; or "fp16",
                which all backends but "onnxruntime" make of the fp32 parts where it was not added.
            paths: bounds of the path cache; None takes the defaults, with the masks that `bdtool build` noted.
            cuda_graph: how "graph" and "full" use CUDA graphs on a GPU. "auto" takes of what driver and packages
                allow what is measured to be the fastest when the bundle is opened; for "graph" one of "policy-cache"
                (the decision stays on the device: one SWITCH over the paths of the frequent masks in `paths`),
                "switch" (likewise with a SWITCH for every few blocks), "path-cache" (the policy is read back, a graph
                for each mask), or "off" (plain launches, for "full", too). `graph_choice` says which, and why.
            threshold: the policy network's decision keeps blocks whose probability is at least this; None takes the
                bundle's, 0.5. A higher one trades accuracy for time.

        Raises:
            BundleError: the bundle is damaged, incomplete or too new, or has no recommendation for "auto".
            BackendError: backend, device or threads are not to be had here, or an engine does not build.
            UsageError: an unknown backend, device or strategy, or no number of threads.
            PolicyError: a threshold that is no probability, or for a bundle without policy network.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
        found = open_engines(
            bundle_at(threshold, opened),
            backend=backend,
            device=device,
            strategy=strategy,
            threads=threads,
            precision=precision,
            paths=paths,
            cuda_graph=cuda_graph,
        )
        runtime = cls(
            found.network,
            found.backend,
            found.engines,
            strategy=found.strategy,
            max_batch=found.loader.max_batch,
            paths=found.paths,
            graphs=found.graphs,
            preprocessed=found.loader.load_preprocessed,
        )
        if (choice := runtime.graph_choice) is not None:
            logger.info("strategy %s: CUDA graph mode %s (%s)", found.strategy, choice.mode, choice.reason)
        return runtime

    def run(self, images: Any, policy: PolicyLike = None, *, first: int | None = None) -> RunResult:
        """Classify a batch.

        Args:
            images: uint8 [N, H, W, 3], or float32 [N, 3, H, W] already preprocessed: a numpy array, or one on the host
                with DLPack (a CPU tensor of PyTorch). A batch larger than the bundle's `max_batch` runs in slices. On a
                GPU backend they may be on its device: any array with `__cuda_array_interface__` or DLPack (PyCUDA,
                CuPy, PyTorch). Nothing of it passes through the host, and the logits come back likewise: as an array on
                the device with `__cuda_array_interface__`, the caller's to keep, whose values nobody has looked at.
                Engines of a GPU take uint8; parts that read images are built again when the first float32 ones come.
            policy: None for the policy network's own decision (where the bundle has none, the mask that the base was
                trained for, or every block), a POLICY text, or zeros and ones [K] or [N, K].
            first: number of the first image in its data set, from which POLICY texts that draw bits for each image
                (`random:7`) or read them (a file of rows) go on. None: the batch is the whole data set, so `random:7`
                gives each batch the same bits, and a file must have a row for each image.

        Raises:
            TypeError: the images are no array.
            DataError: they have another shape or type, or are on a GPU that the engines do not run on.
            PolicyError: the policy does not fit.
            EngineError: an engine fails, or a result on the host is not finite; or the process is a fork of the one
                that opened the runtime, and cannot use it.
            ValueError: the runtime is closed, or `first` is below 0.
        """
        intake = self._intake
        taken = intake.checked(images) if isinstance(images, np.ndarray) else intake.taken(images, self._backend)
        keep = self._policies.keep_matrix(policy, len(taken), first=first)
        return self._run_slices(taken, keep, run_policy=False)

    def run_with_policy_cost(self, images: Images, policy: np.ndarray) -> RunResult:
        """Classify with given bits [N, K], but run the policy network too: what a learned policy of these would cost.

        Raises:
            As `run` does.
        """
        if policy.dtype != bool or policy.shape != (len(images), self.network.n_blocks):  # a benchmark's are
            policy = keep_matrix_from(policy, len(images), self.network.n_blocks)
        return self._run_slices(images, policy, run_policy=self.network.has_policy)

    def run_with(self, images: Images, controller: Controller) -> RunResult:
        """Classify with a controller of one's own; at most `max_batch` images.

        Raises:
            DataError: there are more, or they have another shape or type.
            PolicyError: the controller decides for another number of images.
            EngineError: an engine fails; or a controller runs images on the runtime that is asking it.
        """
        if len(images) > self.max_batch:
            raise DataError(
                f"images: got {len(images)}, one controller decides for at most {self.max_batch}. Pass fewer"
            )
        return self._run_slice(images, controller, first=0)

    def _run_slice(self, images: Images, controller: Controller, *, first: int) -> RunResult:
        """Run at most `max_batch` images, of which the first is number `first` of the caller's batch."""
        self._require_open()  # before anything of the backend, as in `keep_probability`
        turns = self._turns
        with turns.lock, self._current():
            if turns.is_running:
                raise EngineError(
                    "a controller ran images on the runtime that was asking it; open another one for that"
                )
            taken = images if isinstance(images, DeviceArray) else self.prepare(images)
            forms = self._require_open()  # another thread may have closed it
            strategy = forms.strategy_for(preprocessed=self._intake.needs_preprocessed_parts(taken))
            turns.is_running = True
            try:
                logits, hits = strategy.run(taken, controller)
            finally:
                turns.is_running = False
        if isinstance(logits, np.ndarray) and not all_finite(logits):
            bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
            raise EngineError(
                f"the logits of image {first + bad[0]} are not finite ({len(bad)} of {len(logits)} images). "
                "Check the input for NaN or huge values, and run `bdtool verify` on the bundle"
            )
        return RunResult(logits=logits, policy=controller.matrix, hits=hits)

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """Return the network's input for a batch; valid until the next call. `run` does this, and takes it as it is.

        It is float32 [N, 3, height, width]; pixels, uint8 [N, height, width, 3], stay what they are where the engines
        normalise them (`network.takes_pixels`).

        Raises:
            DataError: the images have another shape or type.
        """
        return self._intake.prepare(images)

    def keep_probability(self, images: Any) -> np.ndarray:
        """Return the policy network's P(keep), float32 [N, K], without running anything else.

        Args:
            images: as `run` takes them, but on the host.

        Raises:
            TypeError: the images are no array on the host.
            DataError: they have another shape or type.
            PolicyError: the bundle has no policy network.
            EngineError: its engine fails, or gives what is not finite.
        """
        part = self.network.find("policy")
        if part is None:
            raise PolicyError("the bundle has no policy network; give a POLICY")
        self._require_open()  # before anything of the backend, which may have stayed behind in another process
        with self._turns.lock, self._current():
            forms = self._require_open()
            if part.name not in forms.loaded.engines:
                name = self.strategy_name
                raise PolicyError(f"strategy {name!r} loads no policy network; open the bundle with 'chain'")
            taken = self._intake.checked(images)
            starts = range(0, len(taken), self.max_batch)
            pieces = [self._probability(forms, part, taken[start : start + self.max_batch]) for start in starts]
        return finite_probabilities(np.concatenate(pieces))

    def _probability(self, forms: ImageForms, part: PartSpec, images: np.ndarray) -> np.ndarray:
        """Return P(keep) of at most `max_batch` images, as the policy network's engine gives it."""
        aside = self._turns.is_running  # a controller asks: the images that it decides about may be read again
        taken = padded(self._intake.prepare(images, aside=aside), self.min_batch)
        engines = forms.engines_for(preprocessed=self._intake.needs_preprocessed_parts(taken))
        return engines[part.name].run({part.inputs[0].name: taken})[part.outputs[0].name][: len(images)]

    def decide(self, images: Any) -> np.ndarray:
        """Return what the policy network keeps, bool [N, K], without running anything else; see `keep_probability`."""
        keep: np.ndarray = self.keep_probability(images) >= self.network.threshold
        return keep

    @property
    def path_stats(self) -> PathStats | None:
        """What the path cache has done; None for other strategies. Preprocessed images may have one of their own."""
        return None if self._forms is None else self._forms.path_stats

    @property
    def graph_choice(self) -> GraphChoice | None:
        """How CUDA graphs are used, and why so; None where this strategy and backend have none.

        After a `run`, what it used: engines that take preprocessed images have graphs of their own.
        """
        return self._require_open().graph

    @property
    def device_timer(self) -> DeviceTimer | None:
        """A timer for engine calls that only enqueue; None where they return when they are done."""
        return timer_of(self._backend)

    def engine(self, part: PartSpec) -> Engine:
        """Return the loaded engine of a part (for verification and profiling)."""
        return self._require_open().loaded.engines[part.name]

    def timed(self, wrap: WrapCall, *, paths: PathOptions | None = None) -> Orchestrator:
        """Return an orchestrator on the same engines whose every engine call goes through `wrap` (for profiling).

        Its path cache is its own, of `paths`; None: of the same. Close it when done.
        """
        forms = self._require_open()
        choice = self.graph_choice if self.strategy_name == "graph" else None  # modes are not compared again
        if choice is not None and paths is not None and paths is not self._paths:
            choice = replace(choice, speculation=None)  # which is of the masks that were frequent
        return Orchestrator(
            self.network,
            self._backend,
            forms.loaded.engines,
            strategy=self.strategy_name,
            max_batch=self.max_batch,
            paths=paths or self._paths,
            graphs=self._graphs if choice is None else chosen(self._graphs, choice),
            wrap=wrap,
            preprocessed=forms.load_preprocessed,
        )

    def close(self) -> None:
        """Let go of engines and buffers, and stop what runs in the background; after what runs in other threads."""
        if self._turns.are_inherited:
            return  # they are the parent's
        with self._turns.lock:
            if self._forms is not None:
                self._forms.close()
            self._forms, self._library, self._current = None, None, nullcontext

    def __enter__(self) -> Orchestrator:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_slices(self, images: Images, keep: np.ndarray | None, *, run_policy: bool) -> RunResult:
        at_once = self._at_once(images)
        if len(images) <= at_once:
            return self.run_with(images, self._controller(keep, run_policy))
        results = []
        for start in range(0, len(images), at_once):
            piece = slice(start, start + at_once)
            bits = None if keep is None else keep[piece]
            results.append(self._run_slice(images[piece], self._controller(bits, run_policy), first=start))
        if isinstance(images, np.ndarray):
            return joined(results)
        return joined(results, concatenate=cast(DeviceArrayBackend, self._backend).concatenate)

    def _at_once(self, images: Images) -> int:
        """Return how many of these images one call of the strategy takes that runs images of their form."""
        self._require_open()  # before anything of the backend, as in `keep_probability`
        if isinstance(images, np.ndarray):
            return self.max_batch
        with self._turns.lock, self._current():  # the strategy may have to be made
            forms = self._require_open()
            strategy = forms.strategy_for(preprocessed=self._intake.needs_preprocessed_parts(images))
        limit = strategy.max_device_images
        return self.max_batch if limit is None else min(limit, self.max_batch)

    def _controller(self, keep: np.ndarray | None, run_policy: bool) -> Controller:
        return MaskController(keep, threshold=self.network.threshold, run_policy=run_policy)

    @property
    def _backend(self) -> Backend:
        if self._library is None:
            raise ValueError(_CLOSED)
        return self._library

    def _require_open(self) -> ImageForms:
        if self._forms is None:
            raise ValueError(_CLOSED)
        self._turns.require_own_process()
        return self._forms
