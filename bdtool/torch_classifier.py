"""A MODEL run by PyTorch: the oracle that engines are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from torch import nn

from bdtool.errors import EngineError
from bdtool.models.model import BlockDropModel
from bdtool.models.parts import network_spec, part_modules
from bdtool.runtime.controllers import all_finite
from bdtool.runtime.preprocess import Preprocessor
from bdtool.runtime.result import RunResult, joined
from bdtool.specs import PartSpec
from engines.torch_precision import convolutions, exact, matrix_products


class TorchClassifier:
    """The masked forward pass of a model, on the model's device, behind the same `run` as an `Orchestrator`.

    It computes in float32, on GPUs without TF32.

    Args:
        max_batch: images that run at once, which bounds the memory; more of them run in slices. None: all.
        threshold: of the policy network; None takes the model's.
    """

    name = "PyTorch"

    def __init__(self, model: BlockDropModel, *, max_batch: int | None = None, threshold: float | None = None) -> None:
        self.network = network_spec(model).with_threshold(threshold)
        self._model = model.eval()
        self._preprocess = Preprocessor(self.network.preprocessing)
        self._max_batch = max_batch

    def run(self, images: np.ndarray, policy: np.ndarray | None = None) -> RunResult:
        """Classify images (as `Orchestrator.run` takes them) with keep bits [N, K]; None asks the policy network.

        Raises:
            EngineError: logits, or the policy network's probabilities, are not finite.
        """
        slices = self._slices(images)
        return joined([self._run_slice(images[s], None if policy is None else policy[s]) for s in slices])

    def keep_probability(self, images: np.ndarray) -> np.ndarray:
        """Return P(keep), float32 [N, K]."""
        with _float32(self._device):
            rows = [self._model.keep_probability(self._inputs(images[s])) for s in self._slices(images)]
        return _finite(torch.cat(rows), what="probabilities")

    def decide(self, images: np.ndarray) -> np.ndarray:
        """Return what the policy network keeps, bool [N, K]."""
        keep: np.ndarray = self.keep_probability(images) >= self.network.threshold
        return keep

    def run_part(self, part: PartSpec, values: np.ndarray) -> np.ndarray:
        """Return what the module of a part, of one input and one output, makes of float32 values [n, ...]."""
        with _float32(self._device):
            result: np.ndarray = self._modules[part.name](torch.from_numpy(values).to(self._device)).cpu().numpy()
        return result

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return part_modules(self._model)

    def _slices(self, images: np.ndarray) -> list[slice]:
        step = self._max_batch or max(1, len(images))
        return [slice(start, start + step) for start in range(0, max(1, len(images)), step)]

    def _run_slice(self, images: np.ndarray, policy: np.ndarray | None) -> RunResult:
        inputs = self._inputs(images)
        with _float32(self._device):
            if policy is None and self._model.policy is None:
                keep = torch.ones(len(images), self.network.n_blocks, dtype=torch.bool, device=inputs.device)
            elif policy is None:
                probability = self._model.keep_probability(inputs)
                _finite(probability, what="probabilities")
                keep = probability >= self.network.threshold
            else:
                keep = torch.from_numpy(policy).to(inputs.device)
            logits = self._model(inputs, keep)
        return RunResult(logits=_finite(logits, what="logits"), policy=keep.cpu().numpy())

    def _inputs(self, images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._preprocess(images)).to(self._device)


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Compute in inference mode, and in float32: by default cuDNN rounds the operands of convolutions to TF32."""
    with torch.inference_mode(), exact(convolutions(device), matrix_products(device)):
        yield


def _finite(values: torch.Tensor, *, what: str) -> np.ndarray:
    """Return values [N, ...] as an array, after a look at them: of NaN argmax would make a class, and >= a bit."""
    array: np.ndarray = values.cpu().numpy()
    if not all_finite(array):
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        raise EngineError(
            f"the {what} of image {bad[0]} are not finite ({len(bad)} of {len(array)} images). Check the input for NaN "
            "or huge values; else the model's weights are of no use: train or import it again"
        )
    return array
