"""A stand-in for `onnxruntime` with GPU providers: it notes what each session was asked for, and runs it on the CPU.

Options are refused unless the installed library of that provider knows them, so that a misspelt one shows. The package
for CPUs alone has no such library: there a test that makes a session on a GPU skips.
"""

import contextlib
import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from engines.libcuda import Driver, Gpu
from engines.onnxrt_providers import DISABLED_OPTIMIZERS
from export.ort_threads import any_threads_options

ALL = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
# The versions of each operator, first to last, that its CUDA provider has kernels for since 1.25; None: that one alone,
# as a kernel without a last version is not taken for a later one (onnxruntime/core/framework/kernel_registry.cc).
_KERNELS = {
    **dict.fromkeys(("Add", "Mul", "Relu"), (14, None)),
    **dict.fromkeys(("Gemm", "Sigmoid", "Slice", "Clip"), (13, None)),
    **dict.fromkeys(("ReduceMean", "Split"), (18, None)),
    **dict.fromkeys(("And", "Or"), (7, None)),
    **dict.fromkeys(("Cast", "DequantizeLinear", "Identity", "If", "Pad", "QuantizeLinear", "Reshape"), (19, 20)),
    **dict.fromkeys(("Flatten", "Transpose"), (13, 20)),
    **{"AveragePool": (19, 21), "Conv": (11, 21), "GlobalAveragePool": (1, 21), "MaxPool": (12, None)},
    **{"GreaterOrEqual": (16, None), "Not": (1, None), "Gather": (13, None), "ScatterND": (13, None)},
}
# What it compares, by its own list: docs/OperatorKernels.md.
_COMPARED = {
    *(TensorProto.INT32, TensorProto.INT64, TensorProto.UINT32, TensorProto.UINT64),
    *(TensorProto.DOUBLE, TensorProto.FLOAT, TensorProto.FLOAT16),
}
_LIBRARIES = {ALL[0]: "libonnxruntime_providers_tensorrt.so", ALL[1]: "libonnxruntime_providers_cuda.so"}


class FakeOnnxRuntime:
    """What `engines.onnxrt_providers` uses of the module; `loadable` names the providers that start."""

    def __init__(self, available=ALL, loadable=ALL):
        self.__version__ = ort.__version__
        self.available, self.loadable, self.loads = available, loadable, 0
        self.sessions = []  # the providers of each, as they were asked for: {name: options}

    def __getattr__(self, name):
        return getattr(ort, name)

    def get_available_providers(self):
        return list(self.available)

    def preload_dlls(self):
        self.loads += 1

    def InferenceSession(self, data, options, *, providers, enable_fallback):
        assert enable_fallback == 0
        if providers == ["CPUExecutionProvider"]:
            return ort.InferenceSession(data, options, providers=providers)
        asked = dict(providers)
        for name, given in asked.items():
            assert all(isinstance(value, str) for value in given.values()), given
            assert set(given) <= known_options(name), set(given) - known_options(name)
            _require_flags_spelt_out(given)
        _refuse_what_cuda_has_no_kernel_for(data)
        _refuse_quantized_biases(data, options)
        self.sessions.append(asked)
        session = ort.InferenceSession(data, any_threads_options(), providers=["CPUExecutionProvider"])
        chosen = [name for name in asked if name in self.loadable]
        session.get_providers = lambda: [*chosen, "CPUExecutionProvider"]
        return session

    def prefixes(self):
        return [asked[ALL[0]]["trt_engine_cache_prefix"] for asked in self.sessions if ALL[0] in asked]


def _refuse_what_cuda_has_no_kernel_for(data):
    """Fail as ONNX Runtime does where a node has no kernel on the GPU and `disable_cpu_ep_fallback` is set."""
    model = onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(data))
    [opset] = [opset.version for opset in model.opset_import if opset.domain == ""]
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.value_info)}
    for node in _nodes(model.graph):
        first, last = _KERNELS.get(node.op_type, (None, None))
        since = onnx.defs.get_schema(node.op_type, opset, node.domain).since_version
        has_kernel = first is not None and first <= since <= (first if last is None else last)
        if not has_kernel or (node.op_type == "GreaterOrEqual" and types[node.input[0]] not in _COMPARED):
            raise RuntimeError(f"{node.name}: this session contains graph nodes assigned to the default CPU EP")


def _refuse_quantized_biases(data, options):
    """Fail where the optimiser, before it knows the provider, quantizes biases: CUDA dequantises no int32."""
    if b"DequantizeLinear" not in data:
        return
    plain = any_threads_options()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with contextlib.suppress(RuntimeError):  # where the options say nothing of it
        plain.add_session_config_entry(DISABLED_OPTIMIZERS, options.get_session_config_entry(DISABLED_OPTIMIZERS))
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        plain.optimized_model_filepath = file.name
        ort.InferenceSession(data, plain, providers=["CPUExecutionProvider"])
        graph = onnx.load(file.name).graph
    integers = {weight.name for weight in graph.initializer if weight.data_type == TensorProto.INT32}
    if any(node.op_type == "DequantizeLinear" and node.input[0] in integers for node in graph.node):
        raise RuntimeError("this session contains graph nodes assigned to the default CPU EP")


def _nodes(graph):
    """Yield the nodes of a graph, and those of the branches within it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _require_flags_spelt_out(options):
    """Fail as ONNX Runtime's Python module does, which has such a message for each flag of the TensorRT provider."""
    for name, value in options.items():
        refusal = f"The value for the key '{name}' should be 'True' or 'False'."
        if value not in ("True", "False") and refusal in _python_module():
            raise RuntimeError(refusal)


@functools.cache
def _python_module():
    return Path(ort.capi.onnxruntime_pybind11_state.__file__).read_bytes().decode("latin-1")


def known_options(provider):
    """Return the words in the provider's library: every option it knows is one of them."""
    if provider not in _CACHE:
        library = Path(ort.__file__).parent / "capi" / _LIBRARIES[provider]
        if not library.is_file():
            pytest.skip(f"needs onnxruntime-gpu: the installed onnxruntime has no {library.name}")
        data = library.read_bytes()
        _CACHE[provider] = {word.decode() for word in data.split(b"\0") if word.isascii() and len(word) < 64}
    return _CACHE[provider]


_CACHE: dict[str, set[str]] = {}


def install_onnxruntime(monkeypatch, cache_dir, **options):
    """Make this machine one with a GPU and an ONNX Runtime for it, both stand-ins; return the latter."""
    fake = FakeOnnxRuntime(**options)
    found = Driver((13, 0), (Gpu("NVIDIA H200", (9, 0)),))
    allocate = ort.OrtValue.ortvalue_from_shape_and_type
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")  # so that what is set is undone afterwards
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    monkeypatch.setattr("engines.onnxrt_providers.ort", fake)
    monkeypatch.setattr("engines.onnxrt_providers.driver_from_libcuda", lambda: found)
    on_host = staticmethod(lambda shape, dtype, kind, index: allocate(shape, np.dtype(dtype), "cpu", 0))
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", on_host)
    return fake
