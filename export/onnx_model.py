"""PyTorch module -> ONNX model: batch-norm folded, dynamic batch, pinned opset, an exporter chosen explicitly.

Modules of the same structure share one trace: only their weights are put in anew. A ResNet-110 has 54 blocks of five
structures. Whoever writes a part compares it with PyTorch, so a wrong guess about "the same structure" cannot pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.fx.experimental.optimization import fuse

from bdtool.errors import ExportError
from bdtool.specs import PartSpec
from export.tracing import traced


def fold_batch_norm(module: nn.Module) -> torch.fx.GraphModule:
    """Return a traced copy of `module`, in eval mode, with each batch-norm folded into the convolution before it."""
    folded = fuse(copy.deepcopy(module).eval())
    assert isinstance(folded, torch.fx.GraphModule)
    left = [name for name, child in folded.named_modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    if left:
        raise ExportError(f"batch-norm {', '.join(left)} does not follow a convolution and cannot be folded")
    return folded


class OnnxExporter:
    """Exports modules to ONNX and remembers one traced template for each structure.

    Args:
        others: folded modules with their parts that are exported, too: they are traced with the first one.
    """

    def __init__(self, others: Iterable[tuple[torch.fx.GraphModule, PartSpec]] = ()) -> None:
        self._others = iter(others)
        self._templates: dict[str, onnx.ModelProto] = {}

    def onnx_from_module(self, folded: torch.fx.GraphModule, part: PartSpec) -> bytes:
        """Return the serialized ONNX model of a folded module, with the part's tensor names and a dynamic batch.

        Raises:
            ExportError: a weight of the module does not appear in the exported graph.
        """
        key = template_key(folded, part)
        if key not in self._templates:
            self._trace([(folded, part), *self._others])
        model = onnx.ModelProto()
        model.CopyFrom(self._templates[key])
        model.graph.name = part.name
        _set_weights(model, {name: tensor.detach() for name, tensor in folded.state_dict().items()}, part)
        onnx.checker.check_model(model, full_check=True)
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    def _trace(self, modules: Iterable[tuple[torch.fx.GraphModule, PartSpec]]) -> None:
        new: dict[str, tuple[torch.fx.GraphModule, PartSpec]] = {}
        for folded, part in modules:  # of those of one structure the others are not kept
            new.setdefault(template_key(folded, part), (folded, part))
        self._templates |= zip(new, traced(list(new.values())), strict=True)


def template_key(folded: torch.fx.GraphModule, part: PartSpec) -> str:
    """Return a text that is equal for modules and parts whose ONNX models differ in weights and names only."""
    return f"{part.inputs}{part.outputs}{structure(folded)}"


def structure(module: torch.fx.GraphModule) -> str:
    """Return a text that is equal for modules that differ in the values of their weights only."""
    return f"{module.code}\n{module}\n{ {n: tuple(t.shape) for n, t in module.state_dict().items()} }"


def _set_weights(model: onnx.ModelProto, weights: Mapping[str, torch.Tensor], part: PartSpec) -> None:
    initializers = {initializer.name: initializer for initializer in model.graph.initializer}
    missing = sorted(set(weights) - set(initializers))
    if missing:
        raise ExportError(f"part {part.name!r}: the exporter left out the weights {', '.join(missing)}; report this")
    for name, tensor in weights.items():
        initializers[name].CopyFrom(numpy_helper.from_array(tensor.contiguous().numpy(), name))
