"""`bdtool build` for TensorRT: what it prints and refuses."""

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
    assert "convolutions by the type of their operands: half 14, float 7" in text  # the policy network stays in fp32
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
    assert block["details"]["kernels"] == ["node_conv2d: float", "node_conv2d_1: float"]


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
