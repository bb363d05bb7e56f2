"""The baseline: the whole static ResNet as one engine, on a GPU replayed as a CUDA graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from bdtool.errors import BackendError, EngineError, UsageError
from bdtool.runtime.controllers import Controller
from bdtool.runtime.strategies import MAX_LANES, Outcome, Strategy, WrapCall, fill, take
from bdtool.specs import NetworkSpec
from engines.base import Backend, Buffer, Call, Engine
from engines.device_array import Images
from engines.graph_modes import OFF, PATH_CACHE, REPLAY, GraphChoice, GraphPlan


class FullStrategy(Strategy):
    """Runs every block and asks no controller.

    Where the backend's work can be captured, a batch is one launch of a CUDA graph: the strongest static network there
    is to compare with. `graph` says so, or why not.
    """

    def __init__(
        self,
        network: NetworkSpec,
        backend: Backend,
        engines: Mapping[str, Engine],
        *,
        wrap: WrapCall = lambda part, call: call,
        graphs: GraphPlan | None = None,
    ) -> None:
        self._part = network.require("full")
        self._backend = backend
        self._engine = engines[self._part.name]
        self._wrap = wrap
        self._graphs = graphs
        if graphs is not None:
            self.graph = _choice(graphs)
        self._bound: OrderedDict[int, tuple[Buffer, Call, Buffer]] = OrderedDict()

    def close(self) -> None:
        self._bound.clear()

    def run(self, images: Images, controller: Controller) -> Outcome:
        if len(images) not in self._bound:
            self._bound[len(images)] = self._bind(len(images))
            if len(self._bound) > MAX_LANES:
                self._bound.popitem(last=False)
        self._bound.move_to_end(len(images))
        image, call, logits = self._bound[len(images)]
        controller.begin(len(images), _no_policy)
        fill(image, images)
        call()
        return Outcome(take(logits, images))

    def _bind(self, n_images: int) -> tuple[Buffer, Call, Buffer]:
        source, result = self._part.inputs[0], self._part.outputs[0]
        image = self._backend.allocate(source.shape_for(n_images), source.dtype)
        logits = self._backend.allocate(result.shape_for(n_images), result.dtype)
        call = self._call({source.name: image}, {result.name: logits})
        return image, self._wrap(self._part, call), logits

    def _call(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        if self.graph is None or self.graph.mode == OFF:
            return self._engine.bind(inputs, outputs)
        try:
            return self._replayed(inputs, outputs)
        except (BackendError, EngineError) as error:
            if self._graphs is None or self._graphs.is_forced:
                raise
            # a profile needs its baseline also where its work cannot be captured; it says that it is a weaker one
            self.graph = GraphChoice(mode=OFF, reason=str(error))
            return self._engine.bind(inputs, outputs)

    def _replayed(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        from engines.capture import CapturingBackend, replayed_call  # only GPUs need it

        assert isinstance(self._backend, CapturingBackend)  # else there is no plan with graphs
        return replayed_call(self._backend.capturer(), self._engine, inputs, outputs)


def _choice(graphs: GraphPlan) -> GraphChoice:
    if graphs.replays:
        return GraphChoice(mode=REPLAY, reason="one static engine: nothing to decide")
    return GraphChoice(mode=OFF, reason="asked for" if graphs.is_forced else graphs.missing[PATH_CACHE])


def _no_policy() -> np.ndarray:
    raise UsageError("strategy 'full' runs every block and has no policy; choose another, such as 'chain'")
