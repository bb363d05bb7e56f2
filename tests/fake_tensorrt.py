"""A stand-in for TensorRT that notes what the builder is told, and whose engines compute with ONNX Runtime.

It has only names that the real classes have (`tests/engines/test_trt_fake.py` checks it): TensorRT-RTX, which is
installed, shares them.
"""

import base64
import enum
import json
import math
import weakref
from types import SimpleNamespace

import numpy as np

from engines.cuda_device import CudaDevice
from engines.libcuda import Driver, Gpu
from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from engines.trt_library import library_from_module
from engines.trt_options import TensorRTOptions
from export.bundle import Bundle
from export.check import OnnxReference
from tests.fake_driver import FakeDriver

CHANNELS_LAST = {1 << 2, 1 << 8, 1 << 11}  # HWC8, HWC, HWC16
DType = enum.Enum("DataType", ["FLOAT", "HALF", "UINT8"])
NUMPY_TYPES = {"FLOAT": np.dtype(np.float32), "HALF": np.dtype(np.float16), "UINT8": np.dtype(np.uint8)}
LayerType = enum.Enum("LayerType", ["CONVOLUTION", "ACTIVATION", "DEQUANTIZE"])


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    def __init__(self):
        pass


class IProgressMonitor:
    def __init__(self):
        pass

    def phase_start(self, phase, parent, n_steps):
        raise NotImplementedError

    def step_complete(self, phase, step):
        raise NotImplementedError

    def phase_finish(self, phase):
        raise NotImplementedError


class ITimingCache:
    def __init__(self, entries):
        self.entries = set(entries)

    def combine(self, other, ignore_mismatch):
        assert not ignore_mismatch
        self.entries |= other.entries
        return True

    def serialize(self):
        return ",".join(sorted(self.entries)).encode()


class IBuilderConfig:
    """Notes flags and attributes; a build adds the part's kernel to its timing cache."""

    def __init__(self):
        self.flags_set, self.shapes, self.cache, self.progress_monitor = {"TF32"}, {}, None, None

    def set_flag(self, flag):
        self.flags_set.add(flag)

    def clear_flag(self, flag):
        self.flags_set.discard(flag)

    def add_optimization_profile(self, profile):
        self.shapes = profile.shapes
        return 0

    def set_compute_capability(self, capability, index):
        return True

    def create_timing_cache(self, blob):
        return ITimingCache(name for name in blob.decode().split(",") if name)

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache is None:
            raise TypeError("set_timing_cache(): incompatible function arguments")
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class IOptimizationProfile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, least, best, most):
        self.shapes[name] = (least, best, most)


class OnnxParser:
    """Reads the real ONNX model, so that the network is the part's."""

    def __init__(self, network, log):
        self.network, self.num_errors = network, 0

    def parse(self, model):
        import onnx

        graph = onnx.ModelProto.FromString(model).graph
        weights = {weight.name: _dtype(weight.data_type) for weight in graph.initializer}
        self.network.model = model
        self.network.inputs, self.network.outputs = (
            [SimpleNamespace(name=info.name, dtype=_dtype(info.type.tensor_type.elem_type)) for info in infos]
            for infos in (graph.input, graph.output)
        )
        convolutions = [weights[node.input[1]] for node in graph.node if node.op_type == "Conv"]
        self.network.layers = [_layer(self.network.forced_type or dtype) for dtype in convolutions]
        return True


def _dtype(onnx_type):
    import onnx

    return {onnx.TensorProto.FLOAT16: DType.HALF, onnx.TensorProto.UINT8: DType.UINT8}.get(onnx_type, DType.FLOAT)


def _layer(dtype):
    return SimpleNamespace(
        type=LayerType.CONVOLUTION,
        num_inputs=1,
        get_input=lambda i: SimpleNamespace(name="x"),
        get_output=lambda i: SimpleNamespace(dtype=dtype),
    )


class INetworkDefinition:
    forced_type = None

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.layers))

    def get_input(self, i):
        return self.inputs[i]

    def get_output(self, i):
        return self.outputs[i]

    def get_layer(self, i):
        return self.layers[i]


class Builder:
    def __init__(self, log):
        self.log = log
        self.notes = FakeTensorRT.notes
        self.notes["builder's contexts"] = list(self.notes["driver"].contexts)

    def create_network(self, flags):
        self.notes["network_flags"] = flags
        return INetworkDefinition()

    def create_builder_config(self):
        self.notes["config"] = IBuilderConfig()
        return self.notes["config"]

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        tensors = [*network.inputs, *network.outputs]
        self.notes["formats"] = [tensor.allowed_formats for tensor in tensors]
        if not _takes_steps(config.progress_monitor):
            self.log.log(ILogger.ERROR, "Build canceled by user")
            return None
        if config.cache is not None:
            config.cache.entries.add(self.notes["part"])
        plan = {
            "inputs": [tensor.name for tensor in network.inputs],
            "formats": {tensor.name: tensor.allowed_formats for tensor in tensors},
            "types": {tensor.name: tensor.dtype.name for tensor in tensors},
            "profile": config.shapes,
            "host code": "VERSION_COMPATIBLE" in config.flags_set,
            "user allocation": "REQUIRE_USER_ALLOCATION" in config.flags_set,
            "model": base64.b64encode(network.model).decode(),
        }
        return self.notes.get("data", json.dumps(plan).encode())


def _takes_steps(monitor, n_steps=3):
    monitor.phase_start("Building engine", None, n_steps)
    goes_on = all(monitor.step_complete("Building engine", step) for step in range(n_steps))
    monitor.phase_finish("Building engine")
    return goes_on


class OnGpu:
    """What has memory on the GPU of `notes["driver"]`."""

    def __init__(self):
        self.driver = FakeTensorRT.notes["driver"]

    def __del__(self):
        self.driver.destroy(self)


class Runtime(OnGpu):
    """Its engines compute what their ONNX says, on the memory of the driver, in their formats."""

    engine_host_code_allowed = False

    def __init__(self, log):
        super().__init__()
        self.log = log

    def deserialize_cuda_engine(self, data):
        try:
            plan = json.loads(data)
        except ValueError:
            self.log.log(ILogger.ERROR, "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed")
            return None
        if plan["host code"] and not self.engine_host_code_allowed:
            self.log.log(ILogger.ERROR, "IRuntime::getEngineHostCodeAllowed() is false")
            return None
        return ICudaEngine(plan, self)


class ICudaEngine(OnGpu):
    device_memory_size_v2 = 4096

    def __init__(self, plan, runtime):
        super().__init__()
        self.plan, self.runtime = plan, runtime
        self.tensors = list(plan["formats"])
        self.reference = OnnxReference(base64.b64decode(plan["model"]))
        self.contexts = 0

    num_io_tensors = property(lambda self: len(self.tensors))

    def get_tensor_name(self, i):
        return self.tensors[i]

    def get_tensor_dtype(self, name):
        return DType[self.plan["types"][name]]

    def get_tensor_profile_shape(self, name, profile):
        assert profile == 0
        return [tuple(shape) for shape in self.plan["profile"][name]]

    def create_engine_inspector(self):
        return SimpleNamespace(get_engine_information=lambda form: '{"Layers": []}')

    def create_execution_context(self, allocation):
        if isinstance(allocation, IRuntimeConfig):
            FakeTensorRT.notes["runtime_config"] = allocation
            allocation = allocation.strategy
        assert allocation == "USER_MANAGED"
        FakeTensorRT.notes["contexts"] = FakeTensorRT.notes.get("contexts", 0) + 1
        return IExecutionContext(self)

    def create_runtime_config(self):
        return IRuntimeConfig(self.tensors[-1])


class IRuntimeConfig:
    """Of TensorRT-RTX, for an engine that computes `output`."""

    def __init__(self, output):
        self.output = output

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return IRuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        cache.kernels.add(self.output)
        return True


class IRuntimeCache:
    """It holds for one GPU, that of the current context: it is neither read nor written without one."""

    def __init__(self):
        self.driver, self.kernels = FakeTensorRT.notes["driver"], set()

    def deserialize(self, blob):
        """Add what is in a blob, as TensorRT-RTX 1.7.1 did over a stand-in for the driver."""
        if not self.driver.contexts or not blob.startswith(b"kernels "):
            return False
        self.kernels |= set(blob.decode().split()[1:])
        return True

    def serialize(self):
        return " ".join(["kernels", *sorted(self.kernels)]).encode() if self.driver.contexts else None


class IExecutionContext(OnGpu):
    """Enqueues on the stand-in driver; shapes and addresses are those of the moment of the call, as in TensorRT."""

    nvtx_verbosity = "DETAILED"  # that of the engine

    def __init__(self, engine):
        super().__init__()
        self.engine, self.shapes, self.addresses, self.scratch = engine, {}, {}, None
        self.ms = FakeTensorRT.notes.get("ms", {}).get(engine.tensors[-1], 1)  # by the name of what it computes

    def set_device_memory(self, memory, size):
        assert size >= self.engine.device_memory_size_v2
        self.scratch = (memory, size)

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        FakeTensorRT.notes["pointed"] = FakeTensorRT.notes.get("pointed", 0) + 1
        self.addresses[name] = address
        return name in self.engine.tensors

    def execute_async_v3(self, stream):
        assert stream % 0x10 == 0x5, "a stream of the stand-in for the driver"
        notes = FakeTensorRT.notes
        assert self.nvtx_verbosity != "DETAILED", "each call would put together what a layer does"
        dynamic = any(least != most for least, _, most in self.engine.plan["profile"].values())
        assert not (dynamic and self.engine.plan["user allocation"]), "here TensorRT-RTX 1.7.1 ends the process"
        notes["enqueued"] = notes.get("enqueued", 0) + 1
        if notes.get("failing"):
            self.engine.runtime.log.log(ILogger.ERROR, notes["failing"])
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        this = weakref.proxy(self)  # a graph does not keep alive what it was captured from
        self.driver.enqueue(lambda: this._compute(shapes, addresses), self.ms, stream)
        return True

    def _compute(self, shapes, addresses):
        self.driver.use(self)
        self.driver.view(*self.scratch, writes=True)[:] = 0xCD  # an engine may leave anything there
        inputs, formats = self.engine.plan["inputs"], self.engine.plan["formats"]
        feeds = {name: self._read(addresses[name], shapes[name], name) for name in inputs}
        for name, values in self.engine.reference.run(feeds).items():
            values = values.transpose(0, 2, 3, 1) if formats[name] in CHANNELS_LAST else values
            self.driver.view(addresses[name], values.nbytes, writes=True)[:] = np.frombuffer(values.tobytes(), np.uint8)

    def _read(self, address, shape, name):
        dtype = NUMPY_TYPES[self.engine.plan["types"][name]]
        values = self.driver.view(address, math.prod(shape) * dtype.itemsize).view(dtype)
        if self.engine.plan["formats"][name] not in CHANNELS_LAST:
            return values.reshape(shape)
        n, c, h, w = shape
        return np.ascontiguousarray(values.reshape(n, h, w, c).transpose(0, 3, 1, 2))


class FakeTensorRT:
    """What `import tensorrt` gives, as far as the builder uses it."""

    notes = {}
    __version__ = "10.14.1"
    ILogger, Builder, OnnxParser, Runtime = ILogger, Builder, OnnxParser, Runtime
    IProgressMonitor, LayerType, DataType = IProgressMonitor, LayerType, DType
    NetworkDefinitionCreationFlag = enum.IntEnum("N", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1})
    TensorFormat = enum.IntEnum("F", {"LINEAR": 0, "HWC8": 2, "HWC": 8, "HWC16": 11})
    BuilderFlag = SimpleNamespace(**{n: n for n in ("TF32", "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT")})
    HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS", SAME_COMPUTE_CAPABILITY="SAME")
    ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED", LAYER_NAMES_ONLY="LAYER_NAMES_ONLY")
    LayerInformationFormat = SimpleNamespace(JSON="JSON")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")


class FakeRtx(FakeTensorRT):
    """What `import tensorrt_rtx` gives beside that, as far as it is used to run engines."""

    __version__ = "1.7.1"
    CudaGraphStrategy = SimpleNamespace(DISABLED="DISABLED")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="EAGER")
    ComputeCapability = enum.IntEnum("C", {"SM89": 89, "SM90": 90})
    BuilderFlag = SimpleNamespace(**vars(FakeTensorRT.BuilderFlag), REQUIRE_USER_ALLOCATION="REQUIRE_USER_ALLOCATION")


def install_gpu(monkeypatch, cache_dir, *, rtx=False, sm=90, driver=None):
    """Make this machine one with a GPU and a TensorRT, both stand-ins; return the driver, whose memory they work on."""
    driver = driver or FakeDriver()
    module = FakeRtx if rtx else FakeTensorRT
    found = Driver((13, 0), (Gpu("NVIDIA H200", (sm // 10, sm % 10)),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))
    monkeypatch.setattr(FakeTensorRT, "notes", {"driver": driver, "part": "any"})
    monkeypatch.setattr("engines.trt_identity.installed_version", lambda backend: module.__version__)
    monkeypatch.setattr("engines.registry.driver_from_libcuda", lambda: found)
    monkeypatch.setattr("engines.trt.driver_from_libcuda", lambda: found)
    monkeypatch.setattr("bdtool.profiling.environment.driver_from_libcuda", lambda: found)
    monkeypatch.setattr("engines.trt.load_library", lambda backend: library_from_module(backend, module))
    monkeypatch.setattr("engines.trt.open_device", lambda device: CudaDevice(driver, int(device[-1])))
    return driver


def build_engines(bundle, backend="tensorrt", device="cuda:0", **options):
    """Build a bundle's engines by `TensorRTOptions`, where `install_gpu` was called, and return where they are."""
    asked = TensorRTOptions(**options)
    store = EngineStore(Bundle.open(bundle), identify_backend(backend, device, tensorrt=asked))
    statuses = store.build(lambda: open_backend(backend, device, tensorrt=asked))
    assert {status.status for status in statuses} == {"built"}
    return store
