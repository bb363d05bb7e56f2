"""ONNX Runtime's engines compute what their ONNX parts compute, in either layout, and share one thread pool."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from bdtool.errors import BackendError, EngineError, UsageError
from bdtool.specs import NetworkSpec, PartSpec, Preprocessing, TensorSpec
from engines.base import LayoutError
from engines.layouts import pack, run_plain, unpack
from engines.libcuda import Driver
from engines.onnxrt import OnnxRuntimeBackend
from engines.onnxrt_providers import CudaProvider
from engines.registry import identify_backend, open_backend
from engines.shared_weights import SharedWeights
from engines.torchrt import TorchBackend
from export import ort_threads
from export.bundle import Bundle
from export.check import OnnxReference
from export.ort_threads import checked_threads

REPOSITORY = Path(__file__).parents[2]


def _engine(backend, bundle, part, layout):
    built = backend.build(part, bundle.part_path(part).read_bytes(), layout=layout)
    assert built.layout == layout
    assert 0 <= built.error <= 1e-4
    return backend.load(part, built.data, layout=layout)


def _feeds(part, n_images, seed=0):
    rng = np.random.default_rng(seed)
    return {t.name: rng.normal(size=t.shape_for(n_images)).astype(np.float32) for t in part.inputs}


@pytest.fixture(params=["plain", "native"])
def layout(request):
    return "NCHW" if request.param == "plain" else request.getfixturevalue("native")


@pytest.mark.parametrize("n_images", [1, 3])
def test_engines_equal_their_onnx_parts(cpu, tiny_bundle, layout, n_images):
    for part in tiny_bundle.network.parts:
        engine, feeds = _engine(cpu, tiny_bundle, part, layout), _feeds(part, n_images)
        expected = OnnxReference(tiny_bundle.part_path(part).read_bytes()).run(feeds)
        actual = run_plain(engine, part, feeds)
        assert list(actual) == list(expected) == [tensor.name for tensor in part.outputs]
        for name, values in expected.items():
            np.testing.assert_allclose(actual[name], values, atol=1e-4, rtol=1e-4, err_msg=part.name)


def test_option_a_shortcuts_equal_their_onnx_parts(cpu, export_random, layout):
    bundle = Bundle.open(export_random("resnet8", shortcut="option-a").bundle)
    for part in bundle.network.parts:
        if part.kind in ("block", "shortcut"):
            feeds = _feeds(part, 2)
            expected = OnnxReference(bundle.part_path(part).read_bytes()).run(feeds)["y"]
            actual = run_plain(_engine(cpu, bundle, part, layout), part, feeds)["y"]
            np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4, err_msg=part.name)


def test_bound_call_reads_and_writes_its_buffers(cpu, tiny_bundle, layout):
    part = tiny_bundle.network.part("block_01")
    engine = _engine(cpu, tiny_bundle, part, layout)
    x, y = (cpu.allocate(t.shape_for(2), t.dtype) for t in (part.inputs[0], part.outputs[0]))
    call = engine.bind({"x": x}, {"y": y})
    reference = OnnxReference(tiny_bundle.part_path(part).read_bytes())
    for seed in (1, 2):  # the same buffers again: nothing of the first call may stay
        feeds = _feeds(part, 2, seed)
        x.write(pack(feeds["x"], layout))
        call()
        np.testing.assert_allclose(unpack(y.read(), layout), reference.run(feeds)["y"], atol=1e-4, rtol=1e-4)
        np.testing.assert_array_equal(x.read(), pack(feeds["x"], layout))


def test_bound_call_outlives_the_names_it_was_made_of(cpu, tiny_bundle):
    part = tiny_bundle.network.part("head")
    x, logits = (cpu.allocate(t.shape_for(1), t.dtype) for t in (part.inputs[0], part.outputs[0]))
    call = _engine(cpu, tiny_bundle, part, "NCHW").bind({"x": x}, {"logits": logits})
    x.write(np.ones((1, 64, 8, 8), np.float32))
    for _ in range(50):
        np.empty(1 << 16)
        call()
    expected = OnnxReference(tiny_bundle.part_path(part).read_bytes()).run({"x": x.read()})["logits"]
    np.testing.assert_allclose(logits.read(), expected, atol=1e-5)


def _nodes(backend, bundle, part, layout):
    data = backend.build(part, bundle.part_path(part).read_bytes(), layout=layout).data
    return [node.op_type for node in onnx.ModelProto.FromString(data).graph.node]


def test_native_blocks_inside_a_stage_neither_reorder_nor_add(cpu, export_random, native):
    bundle = Bundle.open(export_random("resnet14", shortcut="average-pool").bundle)
    inside = [part for part in bundle.network.blocks if part.inputs[0].shape == part.outputs[0].shape]
    assert len(inside) == 4
    for part in inside:  # the add and both ReLUs are fused into the two convolutions
        assert _nodes(cpu, bundle, part, native) == ["Conv", "Conv"], part.name


@pytest.mark.parametrize("shortcut", ["option-a", "average-pool"])
def test_native_stage_changes_neither_reorder_nor_add(cpu, export_random, native, shortcut):
    bundle = Bundle.open(export_random("resnet8", shortcut=shortcut).bundle)
    pooling = ["AveragePool"] if shortcut == "average-pool" else []
    for k in (1, 2):
        block, passed = bundle.network.blocks[k], bundle.network.shortcut(k)
        assert sorted(_nodes(cpu, bundle, block, native)) == sorted([*pooling, *["Conv"] * 3]), block.name
        assert _nodes(cpu, bundle, passed, native) == [*pooling, "Conv"], passed.name


@pytest.mark.parametrize("shortcut", ["option-a", "average-pool"])
def test_the_baseline_is_helped_as_much_as_the_blocks(cpu, export_random, native, shortcut):
    """A rival that ONNX Runtime was left alone with would flatter us: a user could have the faster one, too."""
    bundle = Bundle.open(export_random("resnet8", shortcut=shortcut).bundle)
    nodes = _nodes(cpu, bundle, bundle.network.require("full"), native)
    assert not {"Pad", "Slice", "Add", "Relu"} & set(nodes)


def test_plain_blocks_do_reorder(cpu, tiny_bundle, native):
    """What the native layout is for: should this fail, ONNX Runtime has learned to do without it."""
    assert {"ReorderInput", "ReorderOutput"} <= set(_nodes(cpu, tiny_bundle, tiny_bundle.network.blocks[0], "NCHW"))


def test_part_that_cannot_be_cut_raises_layout_error(cpu, tiny_bundle, native, monkeypatch):
    monkeypatch.setattr("engines.onnxrt.add_guards", lambda model, part: None)
    part = tiny_bundle.network.part("block_01")
    with pytest.raises(LayoutError, match=r"part 'block_01': expected one com.microsoft.nchwc.\w+ at its border"):
        cpu.build(part, tiny_bundle.part_path(part).read_bytes(), layout=native)


def test_engine_that_computes_something_else_is_refused(cpu, tiny_bundle, native, monkeypatch):
    part = tiny_bundle.network.part("block_00")
    model = tiny_bundle.part_path(part).read_bytes()
    other = onnx.ModelProto.FromString(model)
    weight = next(tensor for tensor in other.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
    monkeypatch.setattr("engines.onnxrt._optimise", lambda part, model, layout: other.SerializeToString())
    with pytest.raises(EngineError, match=r"part 'block_00': its engine differs from its ONNX by") as plain:
        cpu.build(part, model, layout="NCHW")
    assert not isinstance(plain.value, LayoutError)
    with pytest.raises(LayoutError):
        cpu.build(part, model, layout=native)


def _network_of_width(channels):
    image = TensorSpec(name="image", shape=("N", 3, 8, 8))
    x, y = (TensorSpec(name=name, shape=("N", channels, 8, 8)) for name in "xy")
    logits = TensorSpec(name="logits", shape=("N", 2))
    common = {"flops": 0}
    return NetworkSpec(
        arch="hand-made",
        n_classes=2,
        labels=None,
        preprocessing=Preprocessing(height=8, width=8, mean=(0, 0, 0), std=(1, 1, 1)),
        stages=(1,),
        parts=(
            PartSpec(
                name="stem", kind="stem", reads=("image",), writes=("x",), inputs=(image,), outputs=(y,), **common
            ),
            PartSpec(
                name="block_00", kind="block", index=0, reads=("x",), writes=("x",), inputs=(x,), outputs=(y,), **common
            ),
            PartSpec(
                name="head", kind="head", reads=("x",), writes=("logits",), inputs=(x,), outputs=(logits,), **common
            ),
        ),
    )


def test_joined_engines_count_weights_that_they_share_once(tiny_bundle):
    backend, files, n_bytes = OnnxRuntimeBackend(), {}, {}
    for name in ("stem", "block_00", "head"):
        part = tiny_bundle.network.part(name)
        files[name] = part, backend.build(part, tiny_bundle.part_path(part).read_bytes(), layout="NCHW").data
        weights = onnx.ModelProto.FromString(files[name][1]).graph.initializer
        n_bytes[name] = sum(numpy_helper.to_array(weight).nbytes for weight in weights)

    def join(*names):
        return backend.join(tiny_bundle.network.whole("path", flops=0), [files[name] for name in names])

    first, same, longer = join("stem", "head"), join("stem", "head"), join("stem", "block_00", "head")
    assert first.shared_bytes == n_bytes["stem"] + n_bytes["head"]
    assert (same.shared_bytes, longer.shared_bytes) == (0, n_bytes["block_00"])
    assert 0 < first.own_bytes == same.own_bytes < longer.own_bytes


def test_joined_graph_is_without_weights_and_looks_for_no_file(tiny_bundle, tmp_path, monkeypatch):
    """Paths of a large network would else be copied again and again."""
    backend, network = OnnxRuntimeBackend(), tiny_bundle.network
    parts = [network.part(name) for name in ("stem", "block_00", "block_01", "shortcut_02", "head")]
    pieces = [
        (part, backend.build(part, tiny_bundle.part_path(part).read_bytes(), layout="NCHW").data) for part in parts
    ]
    joined = network.whole("path", flops=0)
    graph = SharedWeights().join(joined.name, pieces)
    assert graph.added_bytes > 20_000
    assert len(graph.model) < sum(len(data) for _, data in pieces) - 0.9 * graph.added_bytes
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    expected = images
    for part, data in pieces:
        [expected] = backend.load(part, data, layout="NCHW").run({part.inputs[0].name: expected}).values()
    (tmp_path / "weights").write_bytes(bytes(graph.added_bytes))  # what the graph would read, if it did
    monkeypatch.chdir(tmp_path)
    engine = backend.join(joined, pieces).engine
    [logits] = engine.run({joined.inputs[0].name: images}).values()
    assert np.abs(logits - expected).max() < 1e-5


def test_building_takes_no_room_for_temporary_files(cpu, tiny_bundle, native, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))  # as bad as a full one
    for layout in ("NCHW", native):
        _engine(cpu, tiny_bundle, tiny_bundle.network.part("block_01"), layout)


def test_channels_that_do_not_fill_blocks_stay_plain(cpu, native):
    assert cpu.activation_layout(_network_of_width(64)) == native
    assert cpu.activation_layout(_network_of_width(10)) == "NCHW"


def test_unreadable_engine_asks_for_a_new_build(cpu, tiny_bundle):
    with pytest.raises(EngineError, match=r"part 'stem': ONNX Runtime cannot load its engine .*build it again"):
        cpu.load(tiny_bundle.network.part("stem"), b"garbage", layout="NCHW")


def test_unreadable_onnx_part_fails_to_build(cpu, tiny_bundle):
    with pytest.raises(EngineError, match=r"part 'stem': ONNX Runtime refuses its model"):
        cpu.build(tiny_bundle.network.part("stem"), b"garbage", layout="NCHW")


def test_wrong_input_names_the_part(cpu, tiny_bundle):
    engine = _engine(cpu, tiny_bundle, tiny_bundle.network.part("stem"), "NCHW")
    with pytest.raises(EngineError, match=r"part 'stem': ONNX Runtime failed to run it"):
        engine.run({"image": np.zeros((1, 4, 32, 32), np.float32)})


def test_buffer_of_another_backend_is_refused(cpu, tiny_bundle):
    from engines.fake import FakeBackend

    part = tiny_bundle.network.part("head")
    foreign = FakeBackend().allocate((1, 64, 8, 8), "float32")
    with pytest.raises(TypeError, match="expected a buffer of this backend, got _FakeBuffer"):
        _engine(cpu, tiny_bundle, part, "NCHW").bind({"x": foreign}, {})


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:", "cuda:x", "cuda:-1", "CPU", "cpu:0", ""])
def test_unknown_device_is_wrong_usage(device):
    with pytest.raises(UsageError, match=rf"unknown device '{device}'; expected cpu or cuda:N"):
        open_backend("onnxruntime", device)


def test_unknown_backend_lists_the_known():
    for function in (open_backend, identify_backend):
        with pytest.raises(
            UsageError, match="unknown backend 'openvino'; this version has onnxruntime, torch, tensorrt"
        ):
            function("openvino", "cpu")


def _has_cuda():
    options = ort.SessionOptions()
    options.log_severity_level = 4
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1])],
        [onnx.helper.make_tensor_value_info("y", 1, [1])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CUDAExecutionProvider"])
    except Exception:
        return False
    return session.get_providers()[0] == "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(Driver(installed=False, error="no driver"), "no driver"), (Driver((13, 0)), "the CUDA provider cannot")],
)
def test_cuda_without_a_gpu_is_refused_with_the_reason(capfd, monkeypatch, driver, reason):
    if "CUDAExecutionProvider" in ort.get_available_providers() and _has_cuda():
        pytest.skip("this machine has CUDA")
    monkeypatch.setattr("engines.onnxrt_providers.driver_from_libcuda", lambda: driver)
    capfd.readouterr()
    with pytest.raises(BackendError, match=rf"device 'cuda:0': (this onnxruntime has no CUDA|{reason})"):
        open_backend("onnxruntime", "cuda:0")
    assert capfd.readouterr() == ("", "")


def test_silent_fallback_to_the_cpu_is_an_error(tiny_bundle):
    """Should ONNX Runtime choose another provider than the one asked for, nobody may run on it unawares."""
    backend = OnnxRuntimeBackend()
    backend._provider = CudaProvider("cuda:0")  # asks for CUDA, and its sessions come up on the CPU
    part = tiny_bundle.network.part("head")
    with pytest.raises(BackendError, match=r"part 'head': asked for CUDAExecutionProvider, ONNX Runtime chose"):
        backend.load(part, tiny_bundle.part_path(part).read_bytes(), layout="NCHW")


@pytest.mark.parametrize("threads", [0, -1, "2", 2.0, True])
def test_threads_must_be_a_whole_number_from_one(threads):
    for backend in (OnnxRuntimeBackend, TorchBackend):
        with pytest.raises(UsageError, match=rf"threads: got {threads!r}, expected a whole number from 1"):
            backend(threads=threads)


def test_more_threads_than_processors_are_warned_of(monkeypatch, caplog):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    ort_threads._warn_of_more.cache_clear()
    assert checked_threads(np.int64(2)) == 2
    assert caplog.messages == []
    for _ in range(2):  # a command opens several backends
        assert checked_threads(3) == 3
    assert caplog.messages == ["3 threads share 2 processors and wait for each other; fewer are faster"]


def test_more_threads_than_can_be_served_are_refused(monkeypatch):
    """A thousand on two processors did not answer within minutes."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    for backend in (OnnxRuntimeBackend, TorchBackend):
        with pytest.raises(UsageError, match="threads: got 65, expected at most 64 on 2 processors"):
            backend(threads=65)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(128)))
    assert checked_threads(100) == 100


def test_default_threads_keep_to_the_quota_of_a_container(monkeypatch):
    monkeypatch.setattr(ort_threads, "_pool_threads", None)
    for quota, threads in ((0.5, 1), (1.5, 1), (3, 3), (64, 4)):
        monkeypatch.setattr(ort_threads, "n_processors", lambda quota=quota: quota)
        assert checked_threads(None) == threads


def test_identity_names_version_and_instruction_set():
    identity = identify_backend("onnxruntime", "cpu")
    assert identity.version == ort.__version__
    assert re.fullmatch(r"cpu-\w+(-avx(512|2)?)?(-vnni)?", identity.target)
    assert identify_backend("onnxruntime", "cuda:1").target == "cuda1"


_COUNT_THREADS = """
import os, sys
from engines.onnxrt import OnnxRuntimeBackend
from export.bundle import Bundle
bundle = Bundle.open(sys.argv[1])
backend = OnnxRuntimeBackend(threads=int(sys.argv[2]))
layout = backend.activation_layout(bundle.network)
before = len(os.listdir("/proc/self/task"))
part = bundle.network.part("block_00")
data = backend.build(part, bundle.part_path(part).read_bytes(), layout=layout).data
engines = [backend.load(part, data, layout=layout) for _ in range(30)]
x, y = (backend.allocate(t.shape_for(4), t.dtype) for t in (part.inputs[0], part.outputs[0]))
for engine in engines:
    engine.bind({"x": x}, {"y": y})()
print(len(os.listdir("/proc/self/task")) - before)
"""


def _python(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\n")


@pytest.mark.parametrize("threads", [1, 2])
def test_thirty_engines_start_no_threads_beyond_the_shared_pool(tiny, threads):
    """The pool itself exists before the engines do: with two threads, the caller's and one more."""
    assert int(_python(_COUNT_THREADS, tiny.bundle, threads)[0]) <= threads - 1


_CHANGE_THREADS = """
from bdtool.errors import BackendError
from engines.registry import open_backend
open_backend("onnxruntime", "cpu", threads=1)
open_backend("onnxruntime", "cpu", threads=2)
assert open_backend("onnxruntime", "cpu").threads == 2
for threads in (1, 3):
    try:
        open_backend("onnxruntime", "cpu", threads=threads)
    except BackendError as error:
        print(error)
"""


def test_another_number_of_threads_in_one_process_is_refused_with_advice():
    for threads, message in zip((1, 3), _python(_CHANGE_THREADS), strict=False):
        assert f"already runs ONNX Runtime on 2 threads, which cannot change to {threads}" in message
        assert "use threads=2, or start another process" in message
