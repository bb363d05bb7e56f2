"""PyTorch module -> ONNX model: batch-norm folded, dynamic batch, pinned opset, an exporter chosen explicitly.

The exporter is torch's `torch.export`-based one (`dynamo=True`); the older TorchScript one is deprecated. It takes
about a second for each module, so modules of the same structure share one trace: only their weights are put in anew.
A ResNet-110 has 54 blocks of five structures. Whoever writes a part compares it with PyTorch, so a wrong guess about
"the same structure" cannot pass.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping

import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.fx.experimental.optimization import fuse

from bdtool.errors import ExportError
from bdtool.specs import BATCH_AXIS, PartSpec
from export.batch_shapes import fold_batch_shapes

OPSET = 20


def fold_batch_norm(module: nn.Module) -> torch.fx.GraphModule:
    """Return a traced copy of `module`, in eval mode, with each batch-norm folded into the convolution before it."""
    folded = fuse(copy.deepcopy(module).eval())
    assert isinstance(folded, torch.fx.GraphModule)
    left = [name for name, child in folded.named_modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    if left:
        raise ExportError(f"batch-norm {', '.join(left)} does not follow a convolution and cannot be folded")
    return folded


class OnnxExporter:
    """Exports modules to ONNX and remembers one traced template for each structure."""

    def __init__(self) -> None:
        self._templates: dict[str, onnx.ModelProto] = {}

    def onnx_from_module(self, folded: torch.fx.GraphModule, part: PartSpec) -> bytes:
        """Return the serialized ONNX model of a folded module, with the part's tensor names and a dynamic batch.

        Raises:
            ExportError: a weight of the module does not appear in the exported graph.
        """
        key = f"{part.inputs}{part.outputs}{structure(folded)}"
        if key not in self._templates:
            self._templates[key] = _trace(folded, part)
        model = onnx.ModelProto()
        model.CopyFrom(self._templates[key])
        model.graph.name = part.name
        _set_weights(model, {name: tensor.detach() for name, tensor in folded.state_dict().items()}, part)
        onnx.checker.check_model(model, full_check=True)
        data: bytes = model.SerializeToString(deterministic=True)
        return data


def structure(module: torch.fx.GraphModule) -> str:
    """Return a text that is equal for modules that differ in the values of their weights only."""
    return f"{module.code}\n{module}\n{ {n: tuple(t.shape) for n, t in module.state_dict().items()} }"


def _trace(module: torch.fx.GraphModule, part: PartSpec) -> onnx.ModelProto:
    """Export a copy with random weights: the exporter would merge weights that happen to be equal (zero biases)."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    # 2 images: with 1, torch.export would specialise the batch axis to a constant
    images = tuple(torch.zeros(tensor.shape_for(2), dtype=getattr(torch, tensor.dtype)) for tensor in part.inputs)
    batch = torch.export.Dim(BATCH_AXIS, min=1)
    with _quiet():
        program = torch.onnx.export(
            module,
            images,
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=[tensor.name for tensor in part.inputs],
            output_names=[tensor.name for tensor in part.outputs],
            dynamic_shapes=tuple({0: batch} for _ in images),
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _strip_metadata(model)
    _declare_shapes(model, part)
    fold_batch_shapes(model)
    return model


def _strip_metadata(model: onnx.ModelProto) -> None:
    """Remove what the tracer noted of this machine (stack traces with its paths): artifacts must not depend on it."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    for entry in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del entry.metadata_props[:]
        entry.doc_string = ""


def _declare_shapes(model: onnx.ModelProto, part: PartSpec) -> None:
    for declared, tensor in zip((*model.graph.input, *model.graph.output), (*part.inputs, *part.outputs), strict=True):
        info = onnx.helper.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, tensor.shape)
        declared.CopyFrom(info)


def _set_weights(model: onnx.ModelProto, weights: Mapping[str, torch.Tensor], part: PartSpec) -> None:
    initializers = {initializer.name: initializer for initializer in model.graph.initializer}
    missing = sorted(set(weights) - set(initializers))
    if missing:
        raise ExportError(f"part {part.name!r}: the exporter left out the weights {', '.join(missing)}; report this")
    for name, tensor in weights.items():
        initializers[name].CopyFrom(numpy_helper.from_array(tensor.contiguous().numpy(), name))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines, warnings and log records off the user's terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
