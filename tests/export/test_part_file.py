"""Parts that others made or edited, with their digests in the manifest: refused with a reason where they do not fit."""

import json
import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.bundle import Bundle, UnfitPartError
from export.files import sha256_of_bytes

PART = "block_00"


def _bytes_of(bundle, model):
    """Return the part as a bundle reads it that lists `model` as its file."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    (bundle / "onnx" / f"{PART}.onnx").write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_text())
    next(part for part in manifest["parts"] if part["name"] == PART)["sha256"] = sha256_of_bytes(data)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    opened = Bundle.open(bundle)
    return opened.part_bytes(opened.network.part(PART))


@pytest.fixture
def model(bundle_copy):
    return onnx.load(bundle_copy / "onnx" / f"{PART}.onnx")


def _rename_input(model):
    model.graph.input[0].name = model.graph.node[0].input[0] = "foo"
    model.graph.node[-2].input[:] = ["foo" if name == "x" else name for name in model.graph.node[-2].input]


def _fix_batch(model):
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 1


def _add_output(model):
    info = helper.make_tensor_value_info(model.graph.node[0].output[0], TensorProto.FLOAT, ["N", 16, 32, 32])
    model.graph.output.append(info)


def _list_weights_as_inputs(model):
    weights = model.graph.initializer
    model.graph.input.extend(helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in weights)


def _take_half(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def _add_function(model):
    last = model.graph.node[-1]
    opset = helper.make_opsetid("", 20)
    body = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("local", "Same", ["a"], ["b"], [body], [opset]))
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("Same", ["before"], [last.output[0]], domain="local"))
    last.output[0] = "before"


def _keep_weights_in(location):
    def edit(model):
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=str(location))

    return edit


def _give_a_sequence(model):
    last = model.graph.output[0]
    model.graph.node.append(helper.make_node("SequenceConstruct", [last.name], ["several"]))
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 16, 32, 32])
    model.graph.output[0].CopyFrom(helper.make_value_info("several", helper.make_sequence_type_proto(kind)))


_SHAPE = "float32 [N, 16, 32, 32]"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_rename_input, f"has inputs foo {_SHAPE}, expected x {_SHAPE}. Mend the file and put its SHA-256 in"),
        (_fix_batch, f"has inputs x float32 [1, 16, 32, 32], expected x {_SHAPE}"),
        (_add_output, f"expected y {_SHAPE}"),
        (_list_weights_as_inputs, "weight float32 [16, 16, 3, 3]"),
        (_give_a_sequence, f"has outputs several sequence_type [], expected y {_SHAPE}"),
        (_take_half, "is no valid ONNX model ([ShapeInferenceError]"),
        (_add_function, "has functions of its own, expected nodes alone: onnx.inliner.inline_local_functions"),
        (_keep_weights_in("../secret"), "keeps weights in another file (../secret), expected all in one: onnx.save("),
    ],
)
def test_edited_part_that_does_not_fit_is_refused(bundle_copy, model, edit, message):
    edit(model)
    with pytest.raises(UnfitPartError, match=re.escape(message)) as error:
        _bytes_of(bundle_copy, model)
    assert f"part '{PART}', onnx/{PART}.onnx, " in str(error.value)


@pytest.mark.parametrize(("data", "message"), [(b"hello", "is no ONNX file ("), (b"", "is no valid ONNX model (")])
def test_file_that_is_no_model_is_refused(bundle_copy, data, message):
    with pytest.raises(UnfitPartError, match=re.escape(message)):
        _bytes_of(bundle_copy, data)


@pytest.mark.parametrize("where", ["graph", "node", "branch"])
def test_weights_in_the_current_directory_are_not_taken(bundle_copy, model, tmp_path, monkeypatch, where):
    """No digest holds for them, and a library that is given the model's bytes looks for them there."""
    weight = model.graph.initializer[0]
    (tmp_path / "weights").write_bytes(weight.raw_data)
    monkeypatch.chdir(tmp_path)
    _keep_weights_in("weights")(model)
    if where == "node":
        model.graph.node.insert(0, helper.make_node("Constant", [], [weight.name], value=weight))
        model.graph.initializer.remove(weight)
    if where == "branch":
        names = {"inputs": [], "outputs": [helper.make_tensor_value_info(weight.name, TensorProto.FLOAT, None)]}
        branch = helper.make_graph([], "branch", **names, initializer=[weight])
        choice = helper.make_node("If", ["always"], [weight.name], then_branch=branch, else_branch=branch)
        model.graph.node.insert(0, choice)
        model.graph.initializer.remove(weight)
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    with pytest.raises(UnfitPartError, match=r"keeps weights in another file \(weights\)"):
        _bytes_of(bundle_copy, model)


def test_edited_part_that_fits_is_taken(bundle_copy, model):
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(2 * np.asarray(numpy_helper.to_array(weight)), weight.name))
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[2].dim_param = "height"  # left open
    assert _bytes_of(bundle_copy, model) == model.SerializeToString()
