"""The commands that run a bundle, on TensorRT: against stand-ins, and what they say on a machine without a GPU."""

import numpy as np
import pytest

from bdtool.data.synthetic import synthetic_images
from bdtool.profiling.opening import STORED, prepared
from bdtool.profiling.workload import Workload
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.place import Place
from bdtool.runtime.preprocess import preprocess
from engines.libcuda import Driver
from export.bundle import Bundle
from tests.fake_tensorrt import install_gpu

TENSORRT = ("--backend", "tensorrt", "--device", "cuda:0")


def test_run_evaluate_and_profile_use_the_gpu(monkeypatch, tmp_path, bdtool, bdtool_json, bundle_copy, npz, picture):
    driver = install_gpu(monkeypatch, tmp_path / "cache")
    on_cpu = bdtool_json("evaluate", bundle_copy, "--data", npz, "--policy", "101")
    assert not driver.copies
    on_gpu = bdtool_json("evaluate", bundle_copy, "--data", npz, "--policy", "101", *TENSORRT)
    assert driver.copies
    assert on_gpu["accuracy"] == on_cpu["accuracy"]
    [row] = bdtool_json("run", bundle_copy, picture, "--policy", "101", *TENSORRT)["images"]
    [expected] = bdtool_json("run", bundle_copy, picture, "--policy", "101")["images"]
    full = bdtool_json("run", bundle_copy, picture, "--strategy", "full", *TENSORRT)
    assert full["cuda_graph"]["mode"] == "replay"
    assert (
        "CUDA graph: off (asked for)"
        in bdtool("run", bundle_copy, picture, "--strategy", "full", "--cuda-graph", "off", *TENSORRT).stdout
    )
    assert (row["label"], row["policy"]) == (expected["label"], expected["policy"])
    assert row["probability"] == pytest.approx(expected["probability"], abs=1e-4)


def test_profile_times_parts_on_the_device(monkeypatch, tmp_path, bdtool, bdtool_json, bundle_copy, npz):
    install_gpu(monkeypatch, tmp_path / "cache")  # each engine call takes a millisecond of its device's time
    quick = ("--data", npz, "--policy", "101", "--duration", "0.01", "--warmup", "0", *TENSORRT)
    profile = bdtool_json("profile", bundle_copy, *quick, "--strategy", "auto")
    assert set(profile["strategies"]) == {"full", "chain", "graph"}
    assert profile["strategies"]["full"]["cuda_graph"]["mode"] == "replay"
    graph = profile["strategies"]["graph"]
    assert set(graph["cuda_graph"]["measured_ms"]) == {"policy-cache", "switch", "path-cache", "off"}
    assert graph["hit_rate"] == 1  # the one mask of the images is counted before
    plain = bdtool("profile", bundle_copy, *quick, "--cuda-graph", "off")
    assert "warning: full runs without a CUDA graph (asked for): a weaker baseline" in plain.stderr
    environment = profile["environment"]
    assert environment["backend"] == "tensorrt 10.14.1"
    assert (environment["gpu"], environment["gpu_compute_capability"]) == ("NVIDIA H200", "9.0")
    parts = {part["name"]: part for part in profile["parts"]}
    assert {part["mean_ms"] for part in parts.values()} == {1.0}
    assert all(part["enqueue_ms"] > 0 for part in parts.values())
    assert "events on the device's stream" in profile["parts_pass"]
    split = profile["split"]
    assert split["device_thresholds"]["enqueue_to_compute"] == 0.8
    device = split["strategies"]["chain"]["device"]
    assert device["compute_ms"]["median"] == 6  # policy, stem, three blocks or shortcuts, head
    assert device["enqueue_ms"]["median"] > 0
    assert set(split["strategies"]["full"]["components"]) == {"preprocess", "one_engine", "h2d", "d2h", "dispatch"}
    text = bdtool("profile", bundle_copy, *quick).stdout
    assert "full: CUDA graph replay (one static engine: nothing to decide)" in text
    assert "On the device, median milliseconds a request" in text
    assert "GPU: NVIDIA H200, compute capability 9.0" in text
    assert "us to enqueue" in text


@pytest.mark.parametrize("batches", [("--max-batch", 2), ("--min-batch", 8, "--opt-batch", 8, "--max-batch", 8)])
@pytest.mark.parametrize(("precision", "calibrated"), [("fp32", False), ("fp16", False), ("fp16", True)])
def test_verify_holds_on_engines_of_any_batch(
    monkeypatch, tmp_path, bdtool, bdtool_json, bundle_copy, npz, precision, calibrated, batches
):
    """Of fewer images than single parts are compared on, and than PyTorch runs at a time; or of more."""
    if calibrated:
        bdtool("calibrate", bundle_copy, "--data", npz, "--precision", "fp16", "--max-accuracy-drop", 100)
    install_gpu(monkeypatch, tmp_path / "cache")
    words = (*TENSORRT, "--precision", precision)
    bdtool("build", bundle_copy, *words, *batches)
    verified = bdtool_json("verify", bundle_copy, "--data", npz, *words)
    assert verified["n_images"] == 20
    assert [name for name, rung in verified["rungs"].items() if not rung["ok"]] == []


def test_profile_refuses_a_batch_above_the_engines(monkeypatch, tmp_path, bdtool, bundle_copy, npz):
    install_gpu(monkeypatch, tmp_path / "cache")
    bdtool("build", bundle_copy, *TENSORRT, "--max-batch", 4)
    quick = ("--data", npz, "--policy", "101", "--duration", "0.01", "--warmup", "0", *TENSORRT)
    message = bdtool("profile", bundle_copy, *quick, "--batch", 5, status=2).stderr
    assert "--batch 5: the engines were built for at most 4 images" in message
    assert "Give --batch 4 or less, or build again with --max-batch 5" in message


def test_profile_refuses_a_batch_below_the_engines(monkeypatch, tmp_path, bdtool, bdtool_json, bundle_copy, npz):
    install_gpu(monkeypatch, tmp_path / "cache")
    bdtool("build", bundle_copy, *TENSORRT, "--min-batch", 8, "--opt-batch", 8, "--max-batch", 16)
    quick = ("--data", npz, "--policy", "101", "--duration", "0.01", "--warmup", "0", *TENSORRT)
    message = bdtool("profile", bundle_copy, *quick, status=2).stderr
    assert "--batch 1: the engines were built for 8 images at least" in message
    assert "Give --batch 8, or build again with --min-batch 1" in message
    profile = bdtool_json("profile", bundle_copy, *quick, "--batch", 8, "--sweep")
    assert list(profile["sweep"]) == ["8"]
    left_out = [warning for warning in profile["warnings"] if "left out" in warning]
    assert len(left_out) == 2
    assert left_out[1] == "batch 1 left out of the sweep: engines were built with --min-batch 8"


@pytest.mark.parametrize("batches", [(1, 1, 1), (4, 4, 8)])
def test_engines_are_compared_on_a_batch_of_theirs(monkeypatch, tmp_path, bdtool_json, bundle_copy, batches):
    install_gpu(monkeypatch, tmp_path / "cache")
    profile = zip(("--min-batch", "--opt-batch", "--max-batch"), batches, strict=True)
    parts = bdtool_json("build", bundle_copy, *TENSORRT, *(word for pair in profile for word in pair))["parts"]
    assert {(part["status"], part["error"] is None) for part in parts.values()} == {("built", False)}


def test_engines_built_on_opening_are_those_that_build_makes(monkeypatch, tmp_path, bdtool_json, bundle_copy):
    install_gpu(monkeypatch, tmp_path / "cache")
    Orchestrator.open(bundle_copy, backend="tensorrt", device="cuda:0").close()
    assert all(part["cached"] for part in bdtool_json("build", bundle_copy, *TENSORRT)["parts"].values())


def test_engines_of_an_earlier_export_run_batches_that_they_take(monkeypatch, tmp_path, bdtool, tiny):
    install_gpu(monkeypatch, tmp_path / "cache")
    bundle, pixels = tmp_path / "bundle", synthetic_images(8, height=32, width=32)
    prepared = preprocess(pixels, tiny.model.spec.preprocessing)

    def run(images):
        with Orchestrator.open(bundle, backend="tensorrt", device="cuda:0") as runtime:
            return runtime.max_batch, runtime.run(images, policy="101").logits

    bdtool("export", tiny.path, "-o", bundle, "--max-batch", 2)
    assert run(prepared)[0] == 2
    bdtool("export", tiny.path, "-o", bundle, "--max-batch", 8, "--force")
    max_batch, expected = run(pixels)
    assert max_batch == 2
    bdtool("build", bundle, *TENSORRT)
    max_batch, logits = run(prepared)  # the parts that read such images were built for 2 of them
    assert max_batch == 8
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_profile_takes_masks_from_where_the_engines_are(monkeypatch, tmp_path, bdtool, bundle_copy, npz):
    install_gpu(monkeypatch, tmp_path / "cache")
    wide = ("--hardware-compatibility-level", "ampere-plus")
    bdtool("build", bundle_copy, *TENSORRT, *wide, "--coverage", 1, "--data", npz, "--policy", "random:2")
    place = Place(backend="tensorrt", device="cuda:0")
    workload = Workload(images=np.zeros((1, 32, 32, 3), np.uint8), keep=np.ones((1, 3), bool))
    found = prepared(Bundle.open(bundle_copy), workload, place)
    assert found.source == STORED
    assert len(found.options.ahead) > 1
    options = {"backend": "tensorrt", "device": "cuda:0", "strategy": "graph", "cuda_graph": "policy-cache"}
    Orchestrator.open(bundle_copy, **options).close()  # it would refuse a mode that knows no masks


def test_profile_measures_graph_modes_side_by_side(monkeypatch, tmp_path, bdtool, bdtool_json, bundle_copy, npz):
    driver = install_gpu(monkeypatch, tmp_path / "cache")
    driver.launch_ms = 10
    quick = ("--data", npz, "--policy", "101", "--duration", "0.01", "--warmup", "0", *TENSORRT)
    names = ["full@off", "graph", "graph@switch", "graph@path-cache", "graph@off"]
    profile = bdtool_json("profile", bundle_copy, *quick, "--strategy", ",".join(names))
    rows = profile["strategies"]
    modes = {name: row["cuda_graph"]["mode"] for name, row in rows.items()}
    assert list(modes) == ["full", *names]
    assert modes.pop("graph") in ("policy-cache", "switch")
    assert list(modes.values()) == ["replay", "off", "switch", "path-cache", "off"]
    split = profile["split"]["strategies"]
    assert {name: split[name]["device"]["compute_ms"]["median"] for name in ("graph@switch", "graph@off")} == {
        "graph@switch": 10 + 5,  # one launch of policy beside stem, three blocks or shortcuts, head
        "graph@off": 6 * (10 + 1),
    }
    assert set(profile["latency_against_blocks"]) == set(names) - {"full@off"}
    assert (rows["full@off"]["blocks_mean"], rows["full@off"]["flops_ratio_to_full"]) == (3, 1)
    assert rows["graph@path-cache"]["hit_rate"] == 1
    assert not [text for text in profile["warnings"] if "weaker baseline" in text]


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("chain@off", "strategy 'chain@off': CUDA graph modes are of full and graph, not of 'chain'"),
        ("full@fast", "strategy 'full@fast': 'fast' is neither a precision (fp32, int8, fp16, bf16, mixed) nor a CUDA"),
        ("full@", "strategy 'full@': '' is neither a precision (fp32, int8, fp16, bf16, mixed) nor a CUDA graph mode"),
        ("full@off@switch", "expected at most one precision and one CUDA graph mode behind it"),
    ],
)
def test_profile_refuses_a_graph_mode_that_there_is_not(monkeypatch, tmp_path, bdtool, bundle_copy, strategy, message):
    install_gpu(monkeypatch, tmp_path / "cache")
    assert message in bdtool("profile", bundle_copy, "--strategy", strategy, *TENSORRT, status=2).stderr


def test_profile_on_the_cpu_has_no_graph_modes(bdtool, bundle_copy):
    text = bdtool("profile", bundle_copy, "--strategy", "full@switch", status=2).stderr
    assert "CUDA graph mode 'switch' runs on --backend torch, tensorrt, tensorrt-rtx with --device cuda:N" in text


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_without_a_gpu_the_cause_and_the_remedy_are_named(monkeypatch, bdtool, bundle_copy, picture, backend):
    monkeypatch.setattr("engines.trt_identity.installed_version", lambda backend: "10.14.1")
    no_driver = Driver(installed=False, error="no NVIDIA driver (libcuda not found)")
    monkeypatch.setattr("engines.registry.driver_from_libcuda", lambda: no_driver)
    words = ("run", bundle_copy, picture, "--backend", backend)
    text = bdtool(*words, "--device", "cuda:0", status=1).stderr
    assert "no NVIDIA driver (libcuda not found). See `bdtool doctor`" in text
    assert "give --device cuda:0" in bdtool(*words, status=2).stderr
    assert not (bundle_copy / "engines").exists()
