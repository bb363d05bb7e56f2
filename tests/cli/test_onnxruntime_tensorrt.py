"""The commands with ONNX Runtime's TensorRT provider, against a stand-in for its sessions."""

import pytest

from tests.fake_onnxruntime import install_onnxruntime

PLACE = ("--backend", "onnxruntime-tensorrt", "--device", "cuda:0")


@pytest.fixture
def ort(monkeypatch, tmp_path):
    return install_onnxruntime(monkeypatch, tmp_path / "cache")


def test_build_asks_for_the_profile_and_half_precision(ort, bdtool_json, bundle_copy):
    words = ("--precision", "fp16", "--max-batch", "8", "--opt-batch", "2", "--builder-optimization-level", "5")
    result = bdtool_json("build", bundle_copy, *PLACE, *words)
    assert {part["status"] for part in result["parts"].values()} == {"built"}
    assert max(part["error"] for part in result["parts"].values()) <= 0.005
    asked = [session["TensorrtExecutionProvider"] for session in ort.sessions]
    assert {options["trt_builder_optimization_level"] for options in asked} == {"5"}
    assert "image:8x32x32x3" in {options["trt_profile_max_shapes"] for options in asked}
    assert "image:2x32x32x3" in {options["trt_profile_opt_shapes"] for options in asked}
    assert any("trt_fp16_enable" in options for options in asked)
    again = bdtool_json("build", bundle_copy, *PLACE, *words)
    assert all(part["cached"] for part in again["parts"].values())


def test_verify_compares_the_half_parts_that_it_makes(ort, bdtool_json, bundle_copy, npz):
    verified = bdtool_json("verify", bundle_copy, "--data", npz, *PLACE, "--precision", "fp16")
    assert verified["ok"] is True
    assert verified["rungs"]["logits"]["worst"] > 1e-5  # further from PyTorch than FP32 parts are


def test_evaluate_gives_the_accuracy_of_the_cpu(ort, bdtool_json, bundle_copy, npz):
    on_cpu = bdtool_json("evaluate", bundle_copy, "--data", npz, "--policy", "101")
    assert not ort.sessions
    on_gpu = bdtool_json("evaluate", bundle_copy, "--data", npz, "--policy", "101", *PLACE)
    assert ort.sessions
    assert on_gpu["accuracy"] == on_cpu["accuracy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backend", "onnxruntime-tensorrt"), "give --device cuda:0"),
        ((*PLACE, "--strip-weights"), "--strip-weights: ONNX Runtime's TensorRT provider has no such option"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_written(bdtool, bundle_copy, words, message):
    assert message in bdtool("build", bundle_copy, *words, status=2).stderr
    assert not (bundle_copy / "engines").exists()
