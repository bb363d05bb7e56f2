"""What `bdtool pack --triton` writes, and the Python that Triton runs of it: in a real server where there is one."""

import json
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.data.synthetic import synthetic_images
from bdtool.errors import BackendError, PolicyError, UsageError
from bdtool.packing import pack
from bdtool.serving import triton
from bdtool.serving.triton import TritonPythonModel
from export.bundle import Bundle
from tests.triton_server import Connection, TritonServer, why_not

_PIXELS = synthetic_images(7, height=32, width=32)
_LABELS = ["ant", "two  words", "line\nbreak", *"defghij"]


@pytest.fixture
def model(bundle_copy, tmp_path):
    """A directory of a model called `small`, with labels, in a repository of its own."""
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest | {"labels": _LABELS}))
    pack(Bundle.open(bundle_copy), tmp_path / "models" / "small", for_triton=True)
    return tmp_path / "models" / "small"


def _expected(bundle, pixels=_PIXELS, **options):
    with Orchestrator.open(bundle, **options) as runtime:
        return runtime.run(pixels)


def test_directory_has_what_triton_looks_for(model):
    config = (model / "config.pbtxt").read_text()
    assert 'input [ { name: "image", data_type: TYPE_UINT8, dims: [ 32, 32, 3 ] } ]' in config
    assert '{ name: "logits", data_type: TYPE_FP32, dims: [ 10 ], label_filename: "labels.txt" }' in config
    assert '{ name: "keep", data_type: TYPE_UINT8, dims: [ 3 ] }' in config
    assert "instance_group [ { kind: KIND_CPU, count: 1 } ]" in config
    assert '{ key: "backend", value: { string_value: "onnxruntime" } }' in config
    assert runpy.run_path(str(model / "1" / "model.py"))["TritonPythonModel"] is TritonPythonModel
    assert (model / "labels.txt").read_text().splitlines() == ["ant", "two words", "line break", *"defghij"]
    packed = Bundle.open(model / "1" / "bundle")
    assert "onnx/full.onnx" in packed.manifest.left_out
    assert not list(model.rglob("weights.safetensors"))


@pytest.mark.parametrize(
    ("targets", "kind"), [(["cpu"], "KIND_CPU"), (["cuda0"], "KIND_GPU"), (["cpu", "cuda0"], "KIND_GPU")]
)
def test_engines_are_served_where_they_run(bundle_copy, tmp_path, targets, kind):
    Orchestrator.open(bundle_copy, backend="torch", precision="fp16").close()
    [built] = (bundle_copy / "engines").iterdir()
    if "cuda0" in targets:
        shutil.copytree(built, built.with_name(built.name.replace("-cpu-", "-cuda0-")))
    if "cpu" not in targets:
        shutil.rmtree(built)
    pack(Bundle.open(bundle_copy), tmp_path / "models" / "small", precision="fp16", engines="torch", for_triton=True)
    config = (tmp_path / "models" / "small" / "config.pbtxt").read_text()
    assert f"kind: {kind}" in config
    assert '{ key: "backend", value: { string_value: "torch" } }' in config
    assert '{ key: "precision", value: { string_value: "fp16" } }' in config
    assert "label_filename" not in config, "the network has no labels"


def test_precision_that_the_served_backend_lacks_is_refused(bundle_copy, tmp_path):
    with pytest.raises(UsageError, match=r"has no fp16 parts, and onnxruntime, which would serve them, makes none"):
        pack(Bundle.open(bundle_copy), tmp_path / "models" / "small", precision="fp16", for_triton=True)
    assert not (tmp_path / "models").exists()


class _Tensor:
    """A tensor as Triton's Python backend has it: memory that others see by DLPack."""

    def __init__(self, name, values):
        self.name, self.values = name, values

    @classmethod
    def from_dlpack(cls, name, capsule):
        whole = SimpleNamespace(__dlpack__=lambda **options: capsule, __dlpack_device__=lambda: (1, 0))
        return cls(name, np.from_dlpack(whole))

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


class _Response:
    def __init__(self, tensors=(), error=None):
        self.tensors, self.error = {tensor.name: tensor.values for tensor in tensors}, error


@pytest.fixture
def utilities(monkeypatch):
    """Stand-ins for what only the server has."""
    module = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = _Tensor, _Response, str
    module.get_input_tensor_by_name = lambda request, name: request[name]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def _opened(model, kind="CPU", **parameters):
    served = TritonPythonModel()
    given = {name: {"string_value": value} for name, value in parameters.items()}
    served.initialize(
        {
            "model_config": json.dumps({"parameters": given}),
            "model_instance_kind": kind,
            "model_instance_device_id": "3",
            "model_repository": str(model),
            "model_version": "1",
        }
    )
    return served


def _requests(*sizes):
    ends = np.cumsum(sizes)[:-1]
    return [{"image": _Tensor("image", pixels)} for pixels in np.split(_PIXELS[: sum(sizes)], ends)]


@pytest.mark.parametrize("sizes", [(1,), (7,), (2, 1, 4)])
def test_requests_are_answered_as_by_the_runtime(model, utilities, sizes):
    served = _opened(model)
    responses = served.execute(_requests(*sizes))
    expected = _expected(model / "1" / "bundle", _PIXELS[: sum(sizes)])
    assert [len(response.tensors["logits"]) for response in responses] == list(sizes)
    assert np.array_equal(np.concatenate([one.tensors["logits"] for one in responses]), expected.logits)
    keep = np.concatenate([one.tensors["keep"] for one in responses])
    assert keep.dtype == np.uint8
    assert np.array_equal(keep, expected.policy)
    served.finalize()
    with pytest.raises(ValueError, match="closed"):
        served.execute(_requests(1))


def test_failure_is_the_answer_to_every_request(model, utilities, monkeypatch):
    served = _opened(model)

    def fail(images):
        raise PolicyError("no such thing")

    monkeypatch.setattr(served._runtime, "run", fail)
    assert [response.error for response in served.execute(_requests(2, 3))] == ["no such thing"] * 2


def test_parameters_are_arguments_of_the_runtime(model, monkeypatch):
    opened = {}
    monkeypatch.setattr(triton.Orchestrator, "open", lambda bundle, **options: opened.update(options, bundle=bundle))
    words = {"backend": "torch", "precision": "fp16", "strategy": "path", "cuda_graph": "per-part"}
    _opened(model, kind="GPU", threads="1", threshold="0.7", FORCE_CPU_ONLY_INPUT_TENSORS="yes", **words)
    assert opened == words | {"threads": 1, "threshold": 0.7, "device": "cuda:3", "bundle": model / "1" / "bundle"}


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"stratgy": "path"}, UsageError, r"config\.pbtxt: unknown parameter 'stratgy'; known: backend, precision"),
        ({"threshold": "high"}, UsageError, r"config\.pbtxt: threshold is 'high', expected a number"),
        ({"threads": "1.5"}, UsageError, r"config\.pbtxt: threads is '1\.5', expected a number"),
        ({"threshold": "2"}, PolicyError, r"2"),
        ({"kind": "GPU"}, BackendError, r"cuda:3"),
    ],
)
def test_configuration_that_does_not_fit_is_refused(model, parameters, error, message):
    with pytest.raises(error, match=message):
        _opened(model, **parameters)


@pytest.fixture
def serve(tmp_path):
    """Return a function that starts Triton on the repository of a model."""
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        yield lambda model: stack.enter_context(TritonServer(model.parent, tmp_path / "server"))


def test_real_server_answers_as_the_runtime(model, serve):
    server = serve(model)
    expected = _expected(model / "1" / "bundle")
    assert server.is_ready(), server.log

    def infer(pixels, **output):
        with Connection(server.port) as client:
            return client.infer("small", pixels, **output)

    answer = infer(_PIXELS)
    assert np.array_equal(answer["logits"].astype(np.float32), expected.logits)
    assert np.array_equal(answer["keep"], expected.policy)
    with ThreadPoolExecutor(7) as pool:  # requests that wait for one another become a batch
        answers = list(pool.map(lambda n: infer(_PIXELS[n : n + 1])["logits"][0], range(7)))
    np.testing.assert_allclose(np.array(answers), expected.logits, rtol=1e-4, atol=1e-4)
    best = infer(_PIXELS[:1], name="logits", parameters={"classification": 1})["logits"]
    labels = (model / "labels.txt").read_text().splitlines()
    assert best[0][0].split(":")[1:] == [str(expected.classes[0]), labels[expected.classes[0]]]
    assert "Traceback" not in server.log


def test_real_server_shows_why_it_does_not_serve(model, serve):
    config = model / "config.pbtxt"
    config.write_text(config.read_text().replace('"chain"', '"train"'))
    server = serve(model)
    assert not server.is_ready()
    assert "UsageError" in server.log
    assert "train" in server.log
