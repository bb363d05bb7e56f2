"""PyTorch's exporter, run once for many modules: they are traced side by side, and the ONNX model is cut apart.

The exporter is torch's `torch.export`-based one (`dynamo=True`); the older TorchScript one is deprecated. Most of its
time, more than a second, goes into tables of operators that it makes anew each time, however much there is to export.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

import onnx
import torch
from onnx.utils import Extractor
from torch import Tensor, nn

from bdtool.specs import BATCH_AXIS, PartSpec
from export.batch_shapes import fold_batch_shapes

OPSET = 20


def traced(modules: Sequence[tuple[torch.fx.GraphModule, PartSpec]]) -> list[onnx.ModelProto]:
    """Return the ONNX model of each module, with its part's tensor names, a dynamic batch, and random weights.

    The weights keep their names. What else is named depends on the module alone, not on those beside it.
    """
    parts = [part for _, part in modules]
    together = _SideBySide(_with_random_weights([module for module, _ in modules]), [len(p.inputs) for p in parts])
    inputs = [(index, tensor) for index, part in enumerate(parts) for tensor in part.inputs]
    # 2 images: with 1, torch.export would specialise the batch axis to a constant
    images = [torch.zeros(tensor.shape_for(2), dtype=getattr(torch, tensor.dtype)) for _, tensor in inputs]
    # one for each part, or the exporter would take the batch's size from whichever part comes first
    batches = [torch.export.Dim(f"{BATCH_AXIS}_{index}", min=1) for index in range(len(parts))]
    with _quiet():
        # else torch does it on the way, and takes Ctrl-C meanwhile, for a second or more, for a fault of the model
        importlib.import_module("torch._dynamo")
        program = torch.onnx.export(
            together,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=[_among_others(index, tensor.name) for index, tensor in inputs],
            output_names=[_among_others(i, tensor.name) for i, part in enumerate(parts) for tensor in part.outputs],
            dynamic_shapes=([{0: batches[index]} for index, _ in inputs],),
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _strip_metadata(model)
    extractor = Extractor(model)
    return [_alone(extractor, index, part) for index, part in enumerate(parts)]


class _SideBySide(nn.Module):
    """Modules that have nothing to do with each other, each with inputs of its own."""

    def __init__(self, modules: Sequence[nn.Module], n_inputs: Sequence[int]) -> None:
        super().__init__()
        self.of = nn.ModuleList(modules)
        self._n_inputs = n_inputs

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        first = 0
        for module, n_inputs in zip(self.of, self._n_inputs, strict=True):
            found = module(*inputs[first : first + n_inputs])
            outputs += [found] if isinstance(found, Tensor) else found
            first += n_inputs
        return tuple(outputs)


def _with_random_weights(modules: Sequence[torch.fx.GraphModule]) -> list[torch.fx.GraphModule]:
    """Return copies: the exporter would merge weights that happen to be equal (zero biases)."""
    generator = torch.Generator().manual_seed(0)
    copies = [copy.deepcopy(module) for module in modules]
    for module in copies:
        for weight in module.parameters():
            weight.data = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return copies


def _among_others(index: int, name: str) -> str:
    """Return the name that an input, an output or a weight of the module at `index` has in the whole model."""
    return f"of.{index}.{name}"


def _alone(extractor: Extractor, index: int, part: PartSpec) -> onnx.ModelProto:
    inputs = [_among_others(index, tensor.name) for tensor in part.inputs]
    outputs = [_among_others(index, tensor.name) for tensor in part.outputs]
    model = onnx.ModelProto()
    model.CopyFrom(extractor.extract_model(inputs, outputs))
    model.producer_name = extractor.model.producer_name  # the manifest has the version
    del model.graph.value_info[:]
    fold_batch_shapes(model)
    _state_kernels(model.graph)
    _rename(model.graph, _among_others(index, ""))
    _declare_shapes(model, part)
    return model


def _rename(graph: onnx.GraphProto, prefix: str) -> None:
    """Take `prefix` off the names that have it, and number nodes and constants, in the order in which they are read."""
    own = [
        tensor.name for tensor in (*graph.input, *graph.output, *graph.initializer) if tensor.name.startswith(prefix)
    ]
    names: dict[str, str] = {"": "", **{name: name.removeprefix(prefix) for name in own}}
    n_of_kind: Counter[str] = Counter()

    def numbered(kind: str) -> str:
        n_of_kind[kind] += 1
        return f"{kind}_{n_of_kind[kind] - 1}"

    def renamed(name: str) -> str:
        if name not in names:  # no node wrote it
            names[name] = numbered("constant")
        return names[name]

    for node in graph.node:
        label = numbered(node.op_type.lower())
        node.name = f"node_{label}"  # TensorRT gives layers with the name of a tensor another
        node.input[:] = [renamed(name) for name in node.input]
        for k, name in enumerate(node.output):
            names.setdefault(name, f"{label}_{k}" if k else label)
        node.output[:] = [names[name] for name in node.output]
    for tensor in (*graph.input, *graph.output, *graph.initializer):
        tensor.name = names[tensor.name]
    order = {name: k for k, name in enumerate(names.values())}
    graph.initializer.sort(key=lambda tensor: order[tensor.name])


def _state_kernels(graph: onnx.GraphProto) -> None:
    """Say how large each convolution's kernel is, which the weight says, too: not all versions of the exporter do."""
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv" and "kernel_shape" not in {attribute.name for attribute in node.attribute}:
            node.attribute.append(onnx.helper.make_attribute("kernel_shape", shapes[node.input[1]][2:]))


def _strip_metadata(model: onnx.ModelProto) -> None:
    """Remove what the tracer noted of this machine (stack traces with its paths): artifacts must not depend on it."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for entry in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del entry.metadata_props[:]
        entry.ClearField("doc_string")


def _declare_shapes(model: onnx.ModelProto, part: PartSpec) -> None:
    for declared, tensor in zip((*model.graph.input, *model.graph.output), (*part.inputs, *part.outputs), strict=True):
        info = onnx.helper.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, tensor.shape)
        declared.CopyFrom(info)


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
