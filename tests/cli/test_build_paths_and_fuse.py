"""`build --paths` and `fuse`: what strategy `path` starts with, and a bundle as one file."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from bdtool import Orchestrator
from export.compose import compose_parts
from export.fused import fuse_parts


def _noted(bundle):
    (file,) = bundle.glob("engines/*/paths.json")
    return json.loads(file.read_text())


def test_paths_notes_the_most_frequent_masks(bdtool_json, bundle_copy, npz):
    result = bdtool_json("build", bundle_copy, "--paths", "2", "--data", npz)
    noted = _noted(bundle_copy)
    assert result["paths"]["noted"] == len(noted["masks"]) == 2
    assert noted["policy"] == "learned"
    assert noted["masks"][0]["share"] >= noted["masks"][1]["share"]


def test_coverage_notes_enough_masks(bdtool_json, bundle_copy, npz):
    result = bdtool_json("build", bundle_copy, "--coverage", "1", "--data", npz)
    assert result["paths"]["noted"] == result["paths"]["unique"]
    assert result["paths"]["coverage"] == pytest.approx(1)


def test_noted_masks_hit_from_the_first_image(bdtool, bundle_copy, npz):
    bdtool("build", bundle_copy, "--coverage", "1", "--data", npz)
    images = np.load(npz)["x"]
    with Orchestrator.open(bundle_copy, strategy="path") as runtime:
        result = runtime.run(images)
        assert result.hits.all()
        assert runtime.path_stats.hit_rate == 1


def test_paths_need_data(bdtool, bundle_copy):
    assert "--data" in bdtool("build", bundle_copy, "--paths", "2", status=2).output


def test_paths_and_coverage_exclude_each_other(bdtool, bundle_copy, npz):
    bdtool("build", bundle_copy, "--paths", "2", "--coverage", "0.5", "--data", npz, status=2)


def test_damaged_list_of_masks_is_refused_by_name(bdtool, bundle_copy, npz):
    bdtool("build", bundle_copy, "--paths", "1", "--data", npz)
    (file,) = bundle_copy.glob("engines/*/paths.json")
    file.write_text(file.read_text()[:20])
    output = bdtool("profile", bundle_copy, "--strategy", "path", "--duration", "0.1", status=1).output
    assert "paths.json" in output
    assert "bdtool build BUNDLE --coverage" in output


def test_fuse_writes_one_file_that_runs_alone(bdtool, bundle_copy, tmp_path):
    file = tmp_path / "model.onnx"
    assert "worst difference" in bdtool("fuse", bundle_copy, "-o", file).output
    session = onnxruntime.InferenceSession(file.read_bytes(), _options(), providers=["CPUExecutionProvider"])
    with Orchestrator.open(bundle_copy) as runtime:
        pixels = np.zeros((1, 3, 32, 32), np.float32)
        expected = runtime.run(pixels)
    logits, keep = session.run(["logits", "keep"], {"image": pixels})
    np.testing.assert_array_equal(keep, expected.policy[0])
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4)


def test_fused_file_names_preprocessing_and_classes(bdtool, bdtool_json, bundle_copy, tmp_path):
    bdtool("fuse", bundle_copy, "-o", tmp_path / "model.onnx")
    facts = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    bundle = bdtool_json("inspect", bundle_copy)
    assert facts == {"threshold": 0.5, **{name: bundle[name] for name in ("preprocessing", "labels")}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda network, pieces: (replace(network, threshold=2.0), pieces), "keeps other blocks than its parts do"),
        (lambda network, pieces: (network, pieces | {"head": _doubled(pieces["head"])}), "of the logits' range"),
    ],
)
def test_fuse_writes_no_model_that_differs_from_the_parts(monkeypatch, bdtool, bundle_copy, tmp_path, wrong, message):
    monkeypatch.setattr("bdtool.fusing.fuse_parts", lambda network, pieces: fuse_parts(*wrong(network, pieces)))
    assert message in bdtool("fuse", bundle_copy, "-o", tmp_path / "model.onnx", status=1).stderr
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(("policy", "bits"), [("101", "101"), ("first:1", "100"), ("all", "111"), ("none", "000")])
def test_one_path_is_a_static_model_for_batches(bdtool, bundle_copy, tmp_path, policy, bits):
    file = tmp_path / "model.onnx"
    assert "worst difference" in bdtool("fuse", bundle_copy, "-o", file, "--policy", policy).output
    model = onnx.load(file)
    assert "If" not in {node.op_type for node in model.graph.node}
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["policy"]) == bits
    session = onnxruntime.InferenceSession(file.read_bytes(), _options(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    with Orchestrator.open(bundle_copy) as runtime:
        expected = runtime.run(images, policy=policy)
    [logits] = session.run(None, {"image": images})
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize(("precision", "apart"), [("int8", 0.1), ("fp16", 0.02)])
@pytest.mark.parametrize("policy", [[], ["--policy", "101"]])
def test_parts_of_another_precision_are_fused(bdtool, calibrate, bundle_copy, tmp_path, precision, apart, policy):
    calibrate("--precision", precision)
    bdtool("fuse", bundle_copy, "-o", tmp_path / "model.onnx", "--precision", precision, *policy)
    session = onnxruntime.InferenceSession(
        (tmp_path / "model.onnx").read_bytes(), _options(), providers=["CPUExecutionProvider"]
    )
    image = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    with Orchestrator.open(bundle_copy, precision=precision) as runtime:
        expected = runtime.run(image, policy=policy[-1] if policy else None).logits
    [logits] = session.run(["logits"], {"image": image})
    np.testing.assert_allclose(logits, expected, atol=apart * np.abs(expected).max())
    whole = bundle_copy.parent / "fp32.onnx"
    bdtool("fuse", bundle_copy, "-o", whole, *policy)
    assert (tmp_path / "model.onnx").stat().st_size < 0.8 * whole.stat().st_size


# of the stem, of blocks and of the shortcuts behind which averages are convolutions
@pytest.mark.parametrize(("policy", "n_convolutions"), [([], 11), (["--policy", "101"], 7)])
@pytest.mark.parametrize(
    ("form", "in_integers", "said"),
    [
        ("cpu", True, "on x86 with VNNI or on ARM; TensorRT takes what --for tensorrt writes"),
        ("cpu-without-vnni", True, "on x86 without VNNI"),
        ("tensorrt", False, "for TensorRT; ONNX Runtime's CPU provider is slow with it"),
    ],
)
def test_int8_file_runs_in_integers_where_it_is_for(
    bdtool, calibrate, bundle_copy, tmp_path, policy, n_convolutions, form, in_integers, said
):
    calibrate("--precision", "int8")
    words = ("--precision", "int8", "--for", form)
    assert said in bdtool("fuse", bundle_copy, "-o", tmp_path / "model.onnx", *words, *policy).stdout
    options = _options()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    text = str(onnx.load(tmp_path / "optimised.onnx"))  # branches of If, too
    assert text.count('op_type: "QLinearConv"') == (n_convolutions if in_integers else 0)
    image = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    with Orchestrator.open(bundle_copy, precision="int8") as runtime:
        expected = runtime.run(image, policy=policy[-1] if policy else None).logits
    [logits] = session.run(["logits"], {"image": image})
    np.testing.assert_allclose(logits, expected, atol=0.1 * np.abs(expected).max())


def test_form_of_integers_is_refused_where_there_are_none(bdtool, bundle_copy, tmp_path):
    words = ("fuse", bundle_copy, "-o", tmp_path / "model.onnx", "--for", "tensorrt")
    assert "--for is about integers, and precision fp32 has none" in bdtool(*words, status=2).stderr


def test_precision_that_cannot_be_compared_is_refused(bdtool, calibrate, bundle_copy, tmp_path):
    calibrate("--precision", "bf16")
    words = ("fuse", bundle_copy, "-o", tmp_path / "model.onnx", "--precision", "bf16")
    for policy in ([], ["--policy", "101"]):
        assert "ONNX Runtime's CPU provider has none" in bdtool(*words, *policy, status=2).stderr


def test_no_path_that_differs_from_its_parts_is_written(monkeypatch, bdtool, bundle_copy, tmp_path):
    def wrong(name, pieces):
        head, weights = pieces[-1]
        return compose_parts(name, [*pieces[:-1], (head, _doubled(weights))])

    monkeypatch.setattr("bdtool.fusing.compose_parts", wrong)
    message = bdtool("fuse", bundle_copy, "-o", tmp_path / "model.onnx", "--policy", "101", status=1).stderr
    assert "of the logits' range" in message
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--policy", "learned"), "learned keeps other blocks of each image. Give K bits, or leave --policy out"),
        (("--policy", "learned:0.7"), "Give K bits, or --threshold 0.7 in place of --policy"),
        (("--policy", "random:2"), "random:2:0 keeps other blocks of each image"),
        (("--policy", "101", "--threshold", "0.7"), "--threshold is of the policy network, which --policy leaves out"),
    ],
)
def test_what_is_not_one_path_is_refused(bdtool, bundle_copy, tmp_path, words, says):
    output = bdtool("fuse", bundle_copy, "-o", tmp_path / "model.onnx", *words, status=2).output
    assert says in " ".join(output.split())


def test_fuse_into_a_missing_directory_says_so(bdtool, bundle_copy, tmp_path):
    result = bdtool("fuse", bundle_copy, "-o", tmp_path / "no" / "model.onnx", status=2)
    assert "no" in result.output


def _doubled(part):
    model = onnx.ModelProto.FromString(part)
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))
    return model.SerializeToString()


def _options():
    from export.ort_threads import any_threads_options

    return any_threads_options()
