"""PyTorch as a backend computes what the ONNX parts say, bound or not, for every kind of part that is exported."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

from bdtool import Orchestrator
from bdtool.errors import BackendError, BundleError, EngineError, UsageError
from bdtool.specs import PartSpec, TensorSpec
from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from engines.torch_fusion import fuse_convolutions
from engines.torch_onnx import OnnxFunction, memory_format
from engines.torchrt import TorchBackend
from export.bundle import Bundle
from export.check import OnnxReference
from export.half import half_from_fp32


@pytest.fixture(scope="module")
def backend():
    return TorchBackend()


def _feeds(part, n_images, seed=0):
    rng = np.random.default_rng(seed)
    return {t.name: rng.normal(size=t.shape_for(n_images)).astype(t.dtype) for t in part.inputs}


NETWORKS = {
    "cifar, average-pool": ("resnet8", {"shortcut": "average-pool"}),
    "cifar, option-a": ("resnet8", {"shortcut": "option-a"}),
    "imagenet, basic": ("resnet18", {"size": 64}),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_engines_equal_their_onnx_parts(backend, export_random, network):
    arch, options = NETWORKS[network]
    bundle = Bundle.open(export_random(arch, **options).bundle)
    for part in bundle.network.parts:
        model, feeds = bundle.part_path(part).read_bytes(), _feeds(part, 3)
        built = backend.build(part, model, layout="NCHW")
        assert 0 <= built.error <= 1e-4
        [actual] = backend.load(part, built.data, layout="NCHW").run(feeds).values()
        [expected] = OnnxReference(model).run(feeds).values()
        np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4, err_msg=part.name)


@pytest.mark.parametrize("name", ["stem", "block_01", "shortcut_01", "head", "full"])
def test_half_engines_equal_their_half_parts(backend, tiny_bundle, name):
    part = tiny_bundle.network.part(name)
    model = half_from_fp32(tiny_bundle.part_path(part).read_bytes(), part, "fp16")
    half = part.with_activation("float16")
    assert backend.build(half, model, layout="NCHW").error <= 5e-3
    [y] = backend.load(half, model, layout="NCHW").run(_feeds(half, 1)).values()
    assert y.dtype == half.outputs[0].dtype


def test_bfloat16_is_refused_with_what_to_do(backend, tiny_bundle):
    part = tiny_bundle.network.part("block_00")
    model = half_from_fp32(tiny_bundle.part_path(part).read_bytes(), part, "bf16")
    with pytest.raises(EngineError, match=r"'block_00': .* float32 and float16 parts, this one is bfloat16"):
        backend.load(part.with_activation("bfloat16"), model, layout="NCHW")


# cuDNN's kernels that compute a convolution and what follows it, on the CPU
def _conv_relu(x, weight, bias, *geometry):
    return torch.relu(F.conv2d(x, weight, bias, *geometry))


def _conv_add_relu(x, weight, z, alpha, bias, *geometry):
    return torch.relu(F.conv2d(x, weight, bias, *geometry) + alpha * z)


@pytest.mark.parametrize("network", ["cifar, average-pool", "imagenet, bottleneck"])
def test_fused_convolutions_compute_what_their_nodes_say(monkeypatch, export_random, network):
    arch, options = {**NETWORKS, "imagenet, bottleneck": ("resnet50", {"size": 64})}[network]
    calls = []
    for name, stand_in in {"relu": _conv_relu, "add_relu": _conv_add_relu}.items():
        monkeypatch.setattr(torch, f"cudnn_convolution_{name}", lambda *a, n=name, f=stand_in: calls.append(n) or f(*a))
    bundle = Bundle.open(export_random(arch, **options).bundle)
    parts = {name: bundle.network.part(name) for name in ("stem", "policy", "block_00", "block_01", "full", "head")}
    fused = {}
    for name, part in parts.items():
        model, x = bundle.part_path(part).read_bytes(), torch.from_numpy(_feeds(part, 2)[part.inputs[0].name])
        expected = OnnxFunction(part, model, torch.device("cpu"), fuse=False)(x)
        assert calls == []
        actual = OnnxFunction(part, model, torch.device("cpu"), fuse=True)(x)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        fused[name] = calls.copy()
        calls.clear()
    inner = ["relu"] * (2 if arch == "resnet50" else 1)
    assert fused["stem"] == ["relu"]
    assert fused["block_00"] == fused["block_01"] == [*inner, "add_relu"]
    assert fused["full"] == ["relu", *(len(bundle.network.blocks) * [*inner, "add_relu"])]
    assert fused["head"] == []


@pytest.mark.parametrize("reader", ["an output", "another node"])
def test_result_that_is_read_elsewhere_is_not_fused_away(reader):
    nodes = [helper.make_node("Conv", ["x0", "w", "b"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    if reader == "an output":
        outputs.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
    else:
        nodes.append(helper.make_node("Sigmoid", ["c"], ["z"]))
    assert list(fuse_convolutions(helper.make_graph(nodes, "p", [], outputs))) == nodes


def test_float32_on_a_gpu_lies_as_its_convolutions_without_tensor_cores_want_it():
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert memory_format(cuda, torch.float32) == torch.contiguous_format
    assert memory_format(cuda, torch.float16) == memory_format(cpu, torch.float32) == torch.channels_last


def test_activations_lie_channels_last_and_look_plain(backend, tiny_bundle):
    part = tiny_bundle.network.part("block_00")
    x, y = (backend.allocate(t.shape_for(2), t.dtype) for t in (part.inputs[0], part.outputs[0]))
    engine = backend.load(part, tiny_bundle.part_path(part).read_bytes(), layout="NCHW")
    call = engine.bind({"x": x}, {"y": y})
    reference = OnnxReference(tiny_bundle.part_path(part).read_bytes())
    for seed in (1, 2):  # the same buffers again: nothing of the first call may stay
        feeds = _feeds(part, 2, seed)
        x.write(feeds["x"])
        call()
        np.testing.assert_allclose(y.read(), reference.run(feeds)["y"], atol=1e-4, rtol=1e-4)
        np.testing.assert_array_equal(x.read(), feeds["x"])
    assert x.tensor.is_contiguous(memory_format=torch.channels_last)
    assert engine._function(x.tensor).is_contiguous(memory_format=torch.channels_last)  # and so does what it makes


def test_rows_move_between_buffers(backend):
    values = np.arange(4 * 2 * 3 * 3, dtype=np.float32).reshape(4, 2, 3, 3)
    whole, some = backend.allocate(values.shape, "float32"), backend.allocate(values.shape, "float32").first(2)
    whole.write(values)
    some.gather(whole, np.array([3, 1]))
    np.testing.assert_array_equal(some.read(), values[[3, 1]])
    whole.scatter(some, np.array([0, 2]))
    np.testing.assert_array_equal(whole.read(), values[[3, 1, 1, 3]])
    other = backend.allocate(values.shape, "float32")
    other.write(-values)
    other.copy_rows(whole, np.array([1, 3]))
    np.testing.assert_array_equal(other.read(), [-values[0], values[1], -values[2], values[3]])


def test_joined_engines_share_their_weights(tiny_bundle):
    backend = TorchBackend()
    parts = [tiny_bundle.network.part(name) for name in ("stem", "head")]
    files = [(part, tiny_bundle.part_path(part).read_bytes()) for part in parts]
    joined = [backend.join(tiny_bundle.network.whole("path", flops=0), files) for _ in range(3)]
    assert len(backend._functions) == len(parts)
    assert [one.shared_bytes for one in joined] == [sum(len(data) for _, data in files), 0, 0]
    assert {one.own_bytes for one in joined} == {0}
    del joined
    assert len(backend._functions) == 0  # and nothing outlives the engines


def test_first_rows_share_the_buffers_memory(backend):
    whole = backend.allocate((3, 8, 2, 2), "float32")
    whole.first(2).write(np.ones((2, 8, 2, 2), np.float32))
    assert whole.read().sum() == 64


@pytest.mark.parametrize("strategy", ["chain", "path", "full"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_whole_bundle_equals_the_masked_forward(bundle_copy, tiny, preprocessed, torch_logits, strategy, precision):
    images = preprocessed(tiny.model, 6)
    policy = "all" if strategy == "full" else np.random.default_rng(0).integers(0, 2, (6, 3)).astype(bool)
    options = {"backend": "torch", "strategy": strategy, "precision": precision}
    with Orchestrator.open(bundle_copy, **options) as runtime:
        result = runtime.run(images, policy=policy)
    expected = torch_logits(tiny.model, images, None if strategy == "full" else policy)
    tolerance = 1e-4 if precision == "fp32" else 3e-2  # fp16: nine convolutions, each rounded to 11 bits
    np.testing.assert_allclose(result.logits, expected, atol=tolerance, rtol=tolerance)
    assert result.logits.dtype == np.float32


def test_autocast_of_the_caller_changes_nothing(tiny, pixels):
    images = pixels(tiny.model, 4)
    with Orchestrator.open(tiny.bundle, backend="torch") as runtime:
        logits, probability = runtime.run(images).logits, runtime.keep_probability(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            np.testing.assert_array_equal(runtime.run(images).logits, logits)
            np.testing.assert_array_equal(runtime.keep_probability(images), probability)


def test_learned_policy_is_that_of_fp32_in_half_precision_too(bundle_copy, tiny, preprocessed):
    images = preprocessed(tiny.model, 12)
    kept = []
    for backend, precision in (("onnxruntime", "fp32"), ("torch", "fp16")):
        with Orchestrator.open(bundle_copy, backend=backend, precision=precision) as runtime:
            kept.append(runtime.run(images).policy)
    np.testing.assert_array_equal(*kept)
    assert 0 < kept[0].mean() < 1


def test_fused_names_the_backend_that_has_it(bundle_copy):
    with pytest.raises(
        UsageError, match="'torch' has no strategy 'fused', only chain, path, full; or use --backend onnx"
    ):
        Orchestrator.open(bundle_copy, backend="torch", strategy="fused")


def test_engines_are_found_again_and_int8_is_refused(bundle_copy):
    identity = identify_backend("torch", "cpu")
    store = EngineStore(Bundle.open(bundle_copy), identity)
    store.build(lambda: open_backend("torch", "cpu"))
    assert all(status.cached for status in store.build(lambda: pytest.fail("nothing is left to build")))
    with pytest.raises(BundleError, match="has no int8 parts"):
        EngineStore(Bundle.open(bundle_copy), identity, precision="int8")


def test_cuda_without_a_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"finds no usable GPU; see `bdtool doctor`"):
        open_backend("torch", "cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BackendError, match=r"sees 1 GPU\(s\)"):
        open_backend("torch", "cuda:1")


def test_pytorch_that_is_not_installed_is_named_with_what_adds_it(tiny, monkeypatch):
    monkeypatch.setattr("engines.registry.installed_version", lambda distribution: None)
    with pytest.raises(BackendError, match="torch is not installed; add it with: pip install torch"):
        Orchestrator.open(tiny.bundle, backend="torch")


def test_threads_are_those_of_the_process():
    before = torch.get_num_threads()
    try:
        assert TorchBackend(threads=1).threads == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# --- what it refuses --------------------------------------------------------------------------------------------------


def _part(n_inputs=1):
    tensors = tuple(TensorSpec(name=f"x{i}", shape=("N", 2, 4, 4)) for i in range(n_inputs))
    y = TensorSpec(name="y", shape=("N", 2, 4, 4))
    reads = ("x",) * n_inputs
    return PartSpec(name="p", kind="block", index=0, reads=reads, writes=("x",), inputs=tensors, outputs=(y,), flops=0)


def _model(*nodes, n_inputs=1, weights=()):
    inputs = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["N", 2, 4, 4]) for i in range(n_inputs)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2, 4, 4])]
    graph = helper.make_graph(list(nodes), "p", inputs, outputs, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("Selu", ["x0"], ["y"], name="n"), r"node 'n' \(Selu\); it knows Conv, Relu"),
        (helper.make_node("MaxPool", ["x0"], ["y"], ceil_mode=1, **POOL), "attribute ceil_mode is 1"),
        (helper.make_node("MaxPool", ["x0"], ["y"], pads=[0, 0, 1, 1], **POOL), "not equal on both sides"),
        (helper.make_node("AveragePool", ["x0"], ["y"], auto_pad="SAME_UPPER", **POOL), "attribute auto_pad"),
        (helper.make_node("Cast", ["x0"], ["y"], to=TensorProto.INT8), "Cast"),
        (helper.make_node("Conv", ["x0", "x0"], ["y"]), "weights are not constants"),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_node(backend, node, message):
    with pytest.raises(EngineError, match=message):
        backend.load(_part(), _model(node), layout="NCHW")


def test_part_with_two_inputs_is_refused(backend):
    model = _model(helper.make_node("Add", ["x0", "x1"], ["y"]), n_inputs=2)
    with pytest.raises(EngineError, match="one input and one output"):
        backend.load(_part(2), model, layout="NCHW")


def test_damaged_engine_names_its_part(backend):
    with pytest.raises(EngineError, match="part 'p': its engine is no ONNX model"):
        backend.load(_part(), b"\xff\xff garbage", layout="NCHW")


def test_engine_that_differs_from_its_onnx_is_not_taken(backend, tiny_bundle, monkeypatch):
    from engines import torch_onnx

    monkeypatch.setitem(torch_onnx._OPERATORS, "Relu", lambda *arguments: lambda x: x)
    part = tiny_bundle.network.part("block_00")
    with pytest.raises(EngineError, match=r"part 'block_00': its engine differs from its ONNX by"):
        backend.build(part, tiny_bundle.part_path(part).read_bytes(), layout="NCHW")


def test_half_engine_that_is_a_little_off_is_not_taken(backend, tiny_bundle, monkeypatch):
    from engines import torch_onnx

    monkeypatch.setitem(torch_onnx._OPERATORS, "Relu", lambda *arguments: lambda x: 1.007 * torch.relu(x))
    part = tiny_bundle.network.part("stem")
    model = half_from_fp32(tiny_bundle.part_path(part).read_bytes(), part, "fp16")
    with pytest.raises(EngineError, match=r"by 0\.00[67][0-9]* of the output's range, allowed is 0\.005"):
        backend.build(part.with_activation("float16"), model, layout="NCHW")


def test_wrong_shape_is_an_engine_error(backend, tiny_bundle):
    part = tiny_bundle.network.part("block_00")
    engine = backend.load(part, tiny_bundle.part_path(part).read_bytes(), layout="NCHW")
    with pytest.raises(EngineError, match="part 'block_00': PyTorch failed to run it"):
        engine.run({"x": np.zeros((1, 3, 32, 32), np.float32)})
