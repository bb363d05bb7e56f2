"""`bdtool build` for TensorRT: what it prints and refuses."""

import json
from types import SimpleNamespace

import pytest

from bdtool.cli.tensorrt import details_lines

pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra 'rtx'")


def test_build_prints_the_precision_obtained(bdtool, bundle_copy):
    text = bdtool(
        "build", bundle_copy, "--backend", "tensorrt-rtx", "--sm", "8.6,sm89", "--precision", "fp16", "--max-batch", "1"
    ).stdout
    assert "sm86-sm89-fp16" in text
    assert "9 built" in text
    assert "precision fp16, activations NHWC; not compared with ONNX" in text
    assert "convolutions by the type of their operands: half 20, float 9" in text  # the policy network stays in fp32
    assert "TF32 off" in text
    assert "CUDA graph" not in text  # static engines can all be captured


def test_engines_that_no_cuda_graph_can_hold_are_named():
    def record(part, capturable):
        details = {"convolutions": {"half": 1}, "kernels": ["a", "b"], "kernel_types": {"half": 2}}
        return SimpleNamespace(part=part, details={**details, "tf32": False, "capturable": capturable})

    assert details_lines([record("stem", True), record("head", False)]) == [
        "convolutions by the type of their operands: half 2",
        "4 kernels, writing half 4; TF32 off",
        "cannot be captured in a CUDA graph: head",
    ]


def test_json_has_the_kernels_of_each_part(bdtool_json, bundle_copy):
    result = bdtool_json("build", bundle_copy, "--backend", "tensorrt-rtx", "--sm", "89", "--max-batch", "1")
    block = result["parts"]["block_00"]
    assert block["error"] is None
    assert block["details"]["kernels"] == ["node_conv_0: float", "node_conv_1: float"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_fused_path_of_one_mask_is_built_without_bdtool(bdtool, calibrate, bundle_copy, tmp_path, precision):
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    integers = ()
    if precision == "int8":
        calibrate("--precision", precision)
        integers = ("--for", "tensorrt")
    words = ("--policy", "101", "--precision", precision, *integers)
    bdtool("fuse", bundle_copy, "-o", tmp_path / "model.onnx", *words)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse((tmp_path / "model.onnx").read_bytes())
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("image", (1, 3, 32, 32), (1, 3, 32, 32), (8, 3, 32, 32))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None


def test_masks_are_counted_on_the_cpu_where_there_is_no_gpu(bdtool_json, bundle_copy, npz):
    words = ("build", bundle_copy, "--backend", "tensorrt-rtx", "--sm", "89", "--precision", "fp16")
    found = bdtool_json(*words, "--coverage", 1, "--data", npz)
    assert found["paths"]["noted"] >= 1
    [masks] = bundle_copy.glob("engines/tensorrt-rtx-*-sm89-fp16/paths.json")
    assert masks.is_file()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--backend", "tensorrt-rtx"], 2, "--sm 86,89,120"),
        (["--backend", "tensorrt-rtx", "--sm", "90"], 2, "not for 90"),
        (["--backend", "tensorrt-rtx", "--sm", "x"], 2, "expected compute capabilities"),
        (["--backend", "tensorrt-rtx", "--sm", "89", "--min-batch", "8", "--opt-batch", "4"], 2, "min <= opt <= max"),
        (["--backend", "tensorrt-rtx", "--sm", "89", "--version-compatible"], 2, "no version-compatible"),
        (["--sm", "89"], 2, "--sm is for --backend tensorrt-rtx, not onnxruntime"),
        (["--tf32"], 2, "--tf32 is for --backend tensorrt or tensorrt-rtx, not onnxruntime"),
        (
            ["--max-batch", "1"],
            2,
            "--max-batch is for --backend tensorrt or tensorrt-rtx or onnxruntime-tensorrt, not onnxruntime",
        ),
        (["--version-compatible"], 2, "--version-compatible is for --backend tensorrt, not onnxruntime"),
        (["--builder-optimization-level", "3"], 2, "--builder-optimization-level is for"),
        (["--precision", "fp16"], 1, "no fp16 parts"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(bdtool, bundle_copy, options, status, message):
    assert message in bdtool("build", bundle_copy, *options, status=status).stderr
    assert not (bundle_copy / "engines").exists()


def test_int8_engines_of_rtx_take_one_batch_size(calibrate, bdtool, bundle_copy):
    """TensorRT-RTX 1.7.1 makes no execution context for INT8 convolutions of several."""
    calibrate()
    words = ("build", bundle_copy, "--backend", "tensorrt-rtx", "--sm", 89, "--precision", "int8")

    def profile():
        [directory] = (bundle_copy / "engines").glob("tensorrt-rtx-*-int8")
        settings = [json.loads(json.loads(file.read_text())["settings"]) for file in directory.glob("*.engine.json")]
        [found] = {tuple(each[name] for name in ("min_batch", "opt_batch", "max_batch")) for each in settings}
        return found

    message = bdtool(*words, "--max-batch", 8, status=2).stderr
    assert "TensorRT-RTX runs INT8 convolutions of one batch size only; got 1 to 8. Leave --max-batch out" in message
    bdtool(*words)
    assert profile() == (1, 1, 1)
    bdtool(*words, "--min-batch", 2, "--opt-batch", 2, "--max-batch", 2)
    assert profile() == (2, 2, 2)
