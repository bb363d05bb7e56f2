"""Exported parts compute what PyTorch computes, and say nothing of the machine that exported them."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bdtool.errors import CheckpointError, ExportError
from bdtool.models.parts import network_spec, part_modules
from bdtool.models.store import load_model, save_model
from bdtool.pipeline import export_model
from export.bundle import Bundle
from export.check import OnnxReference
from export.exporter import export_bundle
from export.onnx_model import OnnxExporter, fold_batch_norm
from export.tracing import OPSET


@pytest.fixture(scope="module", params=["average-pool", "option-a"])
def exported(request, export_random):
    return export_random("resnet8", shortcut=request.param)


def _onnx_files(exported):
    bundle = Bundle.open(exported.bundle)
    return {part.name: onnx.load(bundle.part_path(part)) for part in bundle.network.parts}


def _run_onnx(bundle, part, values):
    reference = OnnxReference(bundle.part_path(part).read_bytes())
    return reference.run({part.inputs[0].name: values})[part.outputs[0].name]


@pytest.mark.parametrize("n_images", [1, 2, 5])
def test_chain_of_onnx_parts_equals_pytorch_at_any_batch_size(exported, preprocessed, torch_logits, n_images):
    bundle = Bundle.open(exported.bundle)
    images = x = preprocessed(exported.model, n_images)
    for part in bundle.network.parts:
        if part.kind in ("stem", "block", "head"):
            x = _run_onnx(bundle, part, x)
    np.testing.assert_allclose(x, torch_logits(exported.model, images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_images", [1, 2, 5])
def test_chain_of_onnx_shortcuts_equals_pytorch_with_all_blocks_dropped(exported, preprocessed, torch_logits, n_images):
    bundle = Bundle.open(exported.bundle)
    images = x = preprocessed(exported.model, n_images)
    for part in bundle.network.parts:
        if part.kind in ("stem", "shortcut", "head"):
            x = _run_onnx(bundle, part, x)
    keep = np.zeros((n_images, bundle.network.n_blocks), dtype=bool)
    np.testing.assert_allclose(x, torch_logits(exported.model, images, keep), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_images", [1, 2, 5])
def test_full_and_policy_equal_pytorch(exported, preprocessed, torch_logits, n_images):
    bundle = Bundle.open(exported.bundle)
    images = preprocessed(exported.model, n_images)
    logits = _run_onnx(bundle, bundle.network.require("full"), images)
    np.testing.assert_allclose(logits, torch_logits(exported.model, images), atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        expected = exported.model.keep_probability(torch.from_numpy(images)).numpy()
    policy = _run_onnx(bundle, bundle.network.require("policy"), images)
    np.testing.assert_allclose(policy, expected, atol=1e-5)
    if n_images > 1:
        assert expected.std(axis=0).min() > 0  # a constant policy would hide mistakes


def test_no_batch_norm_is_left(exported):
    operators = {node.op_type for model in _onnx_files(exported).values() for node in model.graph.node}
    assert "Conv" in operators
    assert "BatchNormalization" not in operators


def test_opset_is_pinned_and_weights_are_inside(exported):
    for name, model in _onnx_files(exported).items():
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)], name
        assert not any(onnx.external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer)
    assert not list(exported.bundle.rglob("*.data"))


def test_batch_axis_is_dynamic_and_the_others_are_not(exported):
    bundle = Bundle.open(exported.bundle)
    for part in bundle.network.parts:
        graph = onnx.load(bundle.part_path(part)).graph
        for info, tensor in zip((*graph.input, *graph.output), (*part.inputs, *part.outputs), strict=True):
            shape = tuple(axis.dim_param or axis.dim_value for axis in info.type.tensor_type.shape.dim)
            assert (info.name, shape) == (tensor.name, tensor.shape)


def test_onnx_files_hold_no_paths_and_no_traces(exported):
    secrets = [str(Path(__file__).parents[2]), sys.prefix, str(Path.home()), "site-packages", ".py", "Traceback"]
    for path in (exported.bundle / "onnx").iterdir():
        data = path.read_bytes()
        assert [text for text in secrets if text.encode() in data] == []
        model = onnx.ModelProto.FromString(data)
        entries = (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.initializer)
        assert not any(entry.metadata_props or entry.doc_string for entry in entries)


def test_manifest_records_error_and_tolerance_of_every_part(exported):
    files = Bundle.open(exported.bundle).manifest.files
    assert set(files) == {
        "policy",
        "stem",
        "block_00",
        "block_01",
        "shortcut_01",
        "block_02",
        "shortcut_02",
        "head",
        "full",
    }
    assert all(0 <= file.error <= file.tolerance == 1e-5 for file in files.values())
    assert files["full"].error > 0  # a comparison took place: folding leaves rounding


_EXPORT = """
import sys
from pathlib import Path
from bdtool.pipeline import export_model
export_model(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_export_is_silent_and_deterministic(tiny, tmp_path, start_python, digests):
    process = start_python(_EXPORT, tiny.path, tmp_path / "again")
    assert process.communicate() == ("", "")
    assert process.returncode == 0
    assert digests(tmp_path / "again" / "onnx") == digests(tiny.bundle / "onnx")
    first, second = Bundle.open(tiny.bundle).manifest, Bundle.open(tmp_path / "again").manifest
    assert first.files == second.files
    assert first.weights_sha256 == second.weights_sha256


def test_blocks_of_one_structure_get_their_own_weights(random_model, shared_traces):
    model = random_model("resnet20", has_policy=False)
    network, modules = network_spec(model), part_modules(model)
    for name in ("block_00", "block_01"):  # equal weights, such as zeros, must not be merged for the third block
        for norm in (modules[name].bn1, modules[name].bn2):
            norm.bias.data.zero_()
            norm.running_mean.zero_()
    exporter = OnnxExporter()
    x = np.random.default_rng(0).normal(size=(3, 16, 32, 32)).astype(np.float32)
    for name in ("block_00", "block_01", "block_02"):
        data = exporter.onnx_from_module(fold_batch_norm(modules[name]), network.part(name))
        with torch.inference_mode():
            expected = modules[name](torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(OnnxReference(data).run({"x": x})["y"], expected, atol=1e-5, rtol=1e-5)


def test_folding_changes_nothing_in_the_module_itself(random_model):
    block = random_model("resnet8", has_policy=False).base.blocks[1]
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    fold_batch_norm(block)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_batch_norm_that_follows_no_convolution_is_refused():
    module = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm2d(3)).eval()
    with pytest.raises(ExportError, match="batch-norm 1 does not follow a convolution"):
        fold_batch_norm(module)


def _export_in_memory(model, target, images, model_path):
    return export_bundle(
        network_spec(model),
        part_modules(model),
        weights_path=model_path,
        target=target,
        images=images,
        max_batch=4,
        provenance={},
    )


def test_part_with_wrong_weights_is_caught(tiny, tmp_path, preprocessed, monkeypatch):
    right = OnnxExporter.onnx_from_module

    def wrong(self, folded, part):
        model = onnx.ModelProto.FromString(right(self, folded, part))
        if part.name == "block_01":
            weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
            values = onnx.numpy_helper.to_array(weight).copy()
            # A channel that the next ReLU silences shows nothing on these images: change one that passes it.
            values[1, 0, 1, 1] += 0.5
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return model.SerializeToString()

    monkeypatch.setattr(OnnxExporter, "onnx_from_module", wrong)
    with pytest.raises(ExportError, match=r"part 'block_01': its ONNX differs from PyTorch by .* fp32 allows 1e-05"):
        _export_in_memory(tiny.model, tmp_path / "bundle", preprocessed(tiny.model, 2), tiny.path)
    assert not (tmp_path / "bundle").exists()


def test_weights_that_the_exporter_left_out_are_an_error(tiny, shared_traces, monkeypatch):
    monkeypatch.setattr("export.onnx_model.traced", lambda modules: [onnx.ModelProto() for _ in modules])
    part = network_spec(tiny.model).part("head")
    with pytest.raises(ExportError, match=r"part 'head': the exporter left out the weights linear.bias, linear.weight"):
        OnnxExporter().onnx_from_module(fold_batch_norm(part_modules(tiny.model)["head"]), part)


def test_nan_in_a_module_is_caught_at_its_part(tiny, random_model, tmp_path, preprocessed, shared_traces):
    model = random_model("resnet8", shortcut="average-pool")
    model.base.blocks[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"part 'block_00'.*very large or non-finite"):
        _export_in_memory(model, tmp_path / "bundle", preprocessed(model, 2), tiny.path)


def test_model_file_with_nan_is_refused_before_the_export(tiny, tmp_path):
    model = load_model(tiny.path)
    model.base.head.linear.bias.data[0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        save_model(model, tmp_path / "nan.safetensors")
    data = bytearray(tiny.path.read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    (tmp_path / "nan.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="NaN"):
        export_model(tmp_path / "nan.safetensors", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [tmp_path / "nan.safetensors"]
