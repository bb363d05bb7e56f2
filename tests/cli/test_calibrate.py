"""`bdtool calibrate`: parts of other precisions beside the fp32 ones, or the bundle as it was."""

import errno
import os
from contextlib import ExitStack

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.calibrating.trial import Trial
from bdtool.data.sources import open_data
from bdtool.data.synthetic import synthetic_images
from bdtool.errors import EngineError
from bdtool.models.store import save_model
from bdtool.runtime.policies import parse_policy
from bdtool.torch_classifier import TorchClassifier
from engines.registry import identify_backend
from export.bundle import Bundle
from export.files import export_lock, sha256_of_file
from tests.fake_onnxruntime import install_onnxruntime


def _digests(directory):
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): sha256_of_file(path) for path in files}


def test_int8_runs_through_every_command(calibrate, bdtool, bdtool_json, bundle_copy, labelled, picture):
    found = calibrate()
    assert found["ok"] is True
    assert found["obtained"]["block_00"] == "int8"
    assert found["obtained"]["policy"] == found["obtained"]["head"] == "fp32"
    assert found["gates"]["policy_flips"] == 0  # the policy network is the same
    assert 0 < found["gates"]["logits_error"] < 0.2
    common = ("--precision", "int8")
    evaluated = bdtool_json("evaluate", bundle_copy, "--data", labelled, *common)
    assert evaluated["accuracy"] == found["gates"]["accuracy"]
    verified = bdtool_json("verify", bundle_copy, "--data", labelled, *common)
    assert verified["ok"] is True
    assert "strategies chain, path, fused" in verified["rungs"]["logits"]["detail"]
    assert 0 < verified["rungs"]["logits"]["worst"] <= verified["rungs"]["logits"]["bound"]
    assert verified["rungs"]["logits"]["unit"] == "rms, of logits"
    assert len(bdtool_json("run", bundle_copy, picture, *common)["images"]) == 1
    assert bdtool_json("inspect", bundle_copy)["precisions"]["int8"]["gates"] == found["gates"]
    assert f"\n  int8:         policy learned, accuracy {100 * evaluated['accuracy']:.2f} %, fp32 100.00 %" in (
        bdtool("inspect", bundle_copy).stdout
    )
    bdtool("profile", bundle_copy, *common, "--duration", 0.01, "--strategy", "chain,path,fused")


def test_strategies_agree_in_int8(calibrate, bundle_copy):
    calibrate()
    images = synthetic_images(6, height=32, width=32)
    logits = {}
    for strategy in ("chain", "path", "fused"):
        with Orchestrator.open(bundle_copy, strategy=strategy, precision="int8") as runtime:
            logits[strategy] = runtime.run(images).logits
    assert np.array_equal(logits["chain"], logits["path"])
    assert np.array_equal(logits["chain"], logits["fused"])


def test_a_drop_beyond_the_bound_leaves_the_bundle_as_it_was(bdtool, bundle_copy, save_labelled, tmp_path):
    save_labelled(bundle_copy, tmp_path / "data.npz", 40)
    before = _digests(bundle_copy)
    words = ("--data", tmp_path / "data.npz", "--method", "percentile", "--percentile", 60)
    result = bdtool("calibrate", bundle_copy, *words, "--max-accuracy-drop", 0, status=1)
    assert "allowed is" in result.stderr
    assert f"{bundle_copy} is as it was" in result.stderr
    assert _digests(bundle_copy) == before


def test_a_bound_on_the_accuracy_needs_labels(bdtool, bundle_copy, tmp_path):
    np.savez(tmp_path / "data.npz", x=synthetic_images(8, height=32, width=32))
    before = _digests(bundle_copy)
    words = ("calibrate", bundle_copy, "--data", tmp_path / "data.npz", "--limit", 8)
    message = bdtool(*words, "--max-accuracy-drop", 0.5, status=2).stderr
    assert "--max-accuracy-drop needs labels, and " in message
    assert _digests(bundle_copy) == before
    assert "the accuracy is not measured" in bdtool(*words).stderr


def test_what_the_gates_lack_is_said_before_the_first_image_is_read(bdtool, bundle_copy, tmp_path, monkeypatch):
    np.savez(tmp_path / "data.npz", x=synthetic_images(8, height=32, width=32))

    def stop(*_):
        raise EngineError("no image was read")

    monkeypatch.setattr("bdtool.data.batches.ImageSource.batches", stop)
    told = bdtool("calibrate", bundle_copy, "--data", tmp_path / "data.npz", status=1).stderr.splitlines()
    assert told[0].startswith(f"warning: no labels in {tmp_path / 'data.npz'}: the accuracy is not measured")
    assert told[1].startswith("warning: the gates are measured on images that int8 is calibrated on")
    assert told[2:] == ["Error: no image was read"]


def test_gates_leave_the_calibration_images_out(bdtool_json, bundle_copy, save_labelled, tmp_path):
    data = save_labelled(bundle_copy, tmp_path / "data.npz", 130)
    words = ("calibrate", bundle_copy, "--data", data, "--max-accuracy-drop", 100)
    found = bdtool_json(*words, "--limit", 30)
    assert found["evaluated_on_calibration_images"] is False
    assert (found["images"], found["gates"]["n_images"]) == (30, 100)
    assert found["gates"]["input_source"] == f"{data}, without the 30 images calibrated on"
    assert bdtool_json(*words, "--limit", 30, "--eval", data)["gates"] == found["gates"]
    assert bdtool_json(*words, "--limit", 31)["gates"]["n_images"] == 130


def test_gates_on_calibration_images_are_named_so(bdtool, bundle_copy, labelled):
    words = ("calibrate", bundle_copy, "--data", labelled, "--max-accuracy-drop", 100)
    told = bdtool(*words)
    assert f"40 images of {labelled}, calibration images among them" in told.stdout
    assert f"on images that int8 is calibrated on, as {labelled} has too few others" in told.stderr
    assert Bundle.open(bundle_copy).manifest.variants["int8"].calibration["evaluated_on_calibration_images"] is True
    assert f"on 40 images of {labelled}, calibration images among them" in bdtool("inspect", bundle_copy).stdout
    assert "calibrated on" not in bdtool(*words, "--precision", "fp16").stderr  # which learns nothing from images


def test_parts_in_the_place_of_others_are_named(calibrate, bdtool, bundle_copy, labelled):
    """Their ranges hold for the paths of one policy."""
    assert calibrate("--precision", "fp16", "--policy", "first:2")["replaced"] is None
    words = ("calibrate", bundle_copy, "--data", labelled, "--precision", "fp16", "--policy", "all")
    assert "replaces the fp16 parts that were calibrated for policy first:2" in bdtool(*words).stdout
    assert calibrate("--precision", "fp16")["replaced"] == "all"
    assert "replaced" not in Bundle.open(bundle_copy).manifest.variants["fp16"].calibration


def test_precisions_live_side_by_side(calibrate, bundle_copy):
    for precision in ("int8", "fp16", "bf16"):
        assert calibrate("--precision", precision)["ok"] is True
    bundle = Bundle.open(bundle_copy)
    assert bundle.precisions == ("fp32", "bf16", "fp16", "int8")
    assert bundle.network_at("fp16").part("block_00").inputs[0].dtype == "float16"
    assert bundle.network_at("bf16").part("head").outputs[0].dtype == "float32"
    assert bundle.files_at("int8")["policy"] == bundle.manifest.files["policy"]
    images = synthetic_images(4, height=32, width=32)
    logits = {}
    for precision in ("fp32", "fp16"):
        with Orchestrator.open(bundle_copy, precision=precision) as runtime:
            logits[precision] = runtime.run(images, policy="all").logits
    assert 0 < np.abs(logits["fp32"] - logits["fp16"]).max() < 0.02 * np.abs(logits["fp32"]).max()


def test_what_killed_calibrations_left_is_removed(calibrate, bundle_copy):
    left = bundle_copy.with_name(f".{bundle_copy.name}.calibration") / "candidate-killed" / "onnx"
    left.mkdir(parents=True)
    calibrate("--precision", "fp16")
    assert not left.parent.exists()


@pytest.mark.parametrize(
    ("gives_none", "rungs"), [("run", ["logits", "top1"]), ("decide", ["policy", "logits", "top1"])]
)
def test_rungs_fail_that_pytorch_has_no_numbers_for(
    calibrate, bdtool_json, bundle_copy, labelled, monkeypatch, gives_none, rungs
):
    calibrate("--precision", "fp16")

    def fail(*_):
        raise EngineError("the logits of image 0 are not finite")

    monkeypatch.setattr(TorchClassifier, gives_none, fail)
    found = bdtool_json("verify", bundle_copy, "--data", labelled, "--precision", "fp16", status=1)["rungs"]
    assert [name for name, rung in found.items() if not rung["ok"]] == rungs
    assert found["logits"]["detail"] == "the logits of image 0 are not finite"


def test_calibrated_half_parts_go_before_those_that_a_backend_makes(calibrate, bdtool_json, bundle_copy, labelled):
    words = ("verify", bundle_copy, "--data", labelled, "--precision", "fp16", "--backend", "torch")
    rungs = bdtool_json(*words)["rungs"]
    assert rungs["accuracy"]["detail"].startswith("policy learned; ")
    assert "; bound 0.5 points and noise" in rungs["accuracy"]["detail"]
    calibrate("--precision", "fp16", "--policy", "first:2")
    verified = bdtool_json(*words)
    assert verified["ok"] is True
    assert verified["rungs"]["accuracy"]["detail"].startswith("policy first:2; ")
    assert "; bound 20 points and noise" in verified["rungs"]["accuracy"]["detail"]


def test_file_that_cannot_be_removed_is_no_failure(calibrate, bundle_copy, caplog):
    """The parts are in the bundle by then, so that nothing may say that it is as it was."""
    in_the_way = bundle_copy / "onnx" / "fp16" / "head-of-an-earlier-run.onnx"
    in_the_way.mkdir(parents=True)
    assert calibrate("--precision", "fp16")["ok"] is True
    assert f"{in_the_way} belongs to no part any more and cannot be removed" in caplog.text
    assert Bundle.open(bundle_copy).precisions == ("fp32", "fp16")


def test_engines_that_cannot_be_kept_are_no_failure(calibrate, bundle_copy, caplog):
    """They are a cache: the parts are in the bundle by then."""
    (bundle_copy / "engines").mkdir()
    identity = identify_backend("onnxruntime", "cpu")
    (bundle_copy / "engines" / f"onnxruntime-{identity.version}-{identity.target}-fp16").write_text("in the way")
    assert calibrate("--precision", "fp16")["ok"] is True
    assert "its fp16 engines could not be kept (File exists)" in caplog.text
    assert Bundle.open(bundle_copy).precisions == ("fp32", "fp16")


def test_parts_that_cannot_be_written_leave_the_manifest_as_it_was(bdtool, bundle_copy, labelled):
    (bundle_copy / "onnx" / "fp16").write_text("a file in the way")
    before = _digests(bundle_copy)
    result = bdtool("calibrate", bundle_copy, "--data", labelled, "--precision", "fp16", status=1)
    assert "fp16 parts cannot be written" in result.stderr
    assert "Its manifest and the parts that it names are as they were; clear the way" in result.stderr
    assert _digests(bundle_copy) == before


@pytest.mark.parametrize("writer", ["calibration.cache.write_bytes", "calibration.variant.write_bytes"])
def test_full_disk_is_told_with_the_place_and_what_to_do(bdtool, bundle_copy, labelled, monkeypatch, writer):
    before = _digests(bundle_copy)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, full)
    result = bdtool("calibrate", bundle_copy, "--data", labelled, "--max-accuracy-drop", 20, status=1)
    place = bundle_copy.with_name(f".{bundle_copy.name}.calibration")
    assert f"{place}: what the calibration measures cannot be written (No space left on device)" in result.stderr
    assert f"{bundle_copy} is as it was; make room and run the same command again" in result.stderr
    assert _digests(bundle_copy) == before


def _meanwhile(monkeypatch, change):
    """Let something happen to the bundle between what `calibrate` measured and what it writes."""
    from bdtool.calibrating import calibrate as calibrating

    commit = calibrating.commit_candidate

    def late(candidate, *words):
        change()
        return commit(candidate, *words)

    monkeypatch.setattr(calibrating, "commit_candidate", late)


def test_bundle_that_was_exported_anew_meanwhile_is_left_alone(
    calibrate, bdtool, bundle_copy, monkeypatch, labelled, random_model, tmp_path
):
    save_model(random_model("resnet8", seed=1), tmp_path / "other.safetensors")
    words = ("export", tmp_path / "other.safetensors", "-o", bundle_copy, "--force")
    _meanwhile(monkeypatch, lambda: bdtool(*words))
    options = ("--data", labelled, "--max-accuracy-drop", 20, "--at-least", 8)
    result = bdtool("calibrate", bundle_copy, *options, status=1)
    assert "was exported anew while the int8 parts were made" in result.stderr
    assert Bundle.open(bundle_copy).precisions == ("fp32",)


def test_bundle_that_is_being_exported_to_is_left_alone(bdtool, bundle_copy, labelled, monkeypatch):
    exporting = ExitStack()
    _meanwhile(monkeypatch, lambda: exporting.enter_context(export_lock(bundle_copy)))
    with exporting:
        result = bdtool("calibrate", bundle_copy, "--data", labelled, "--precision", "fp16", status=1)
    assert f"an export or a pack to {bundle_copy}, or a calibration of it, is already running" in result.stderr
    assert Bundle.open(bundle_copy).precisions == ("fp32",)


def test_export_over_calibrated_parts_says_that_they_are_gone(calibrate, bdtool, tiny, bundle_copy):
    calibrate()
    told = bdtool("export", tiny.path, "-o", bundle_copy, "--force").stderr
    assert "the int8 parts of the earlier" in told
    assert "are gone; `bdtool calibrate` makes new ones" in told
    assert [name for name in (bundle_copy / "engines").iterdir() if name.name.endswith("-int8")] == []
    assert "are gone" not in bdtool("export", tiny.path, "-o", bundle_copy, "--force").stderr


def test_what_candidates_are_judged_on_has_a_digest(tmp_path, bundle_copy):
    network, images = Bundle.open(bundle_copy).network, synthetic_images(4, height=32, width=32)

    def digest(labels, policy="all", limit=None):
        np.savez(tmp_path / "data.npz", x=images, y=np.array(labels))
        request = parse_policy(policy, n_blocks=3, has_policy_network=True)
        source = open_data(str(tmp_path / "data.npz"), network=network, resize=False).drawn(limit)
        return Trial(**{**dict.fromkeys(Trial.__dataclass_fields__), "evaluation": source, "policy": request}).digest()

    first = digest([0, 1, 2, 3])
    assert first == digest([0, 1, 2, 3])
    assert len({first, digest([0, 1, 2, 4]), digest([0, 1, 2, 3], "110"), digest([0, 1, 2, 3], limit=3)}) == 4


def test_policy_engine_that_fails_does_not_end_the_ladder(calibrate, bdtool_json, bundle_copy, labelled, monkeypatch):
    def fail(runtime, images):
        raise EngineError("part 'policy': out of memory")

    calibrate("--precision", "fp16")
    monkeypatch.setattr(Orchestrator, "decide", fail)
    words = ("verify", bundle_copy, "--data", labelled, "--precision", "fp16")
    rungs = bdtool_json(*words, status=1)["rungs"]
    assert rungs["policy"]["detail"] == "part 'policy': out of memory"
    assert [name for name, rung in rungs.items() if not rung["ok"]] == ["policy"]
    assert list(rungs)[-1] == "accuracy"


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_calibrated_parts_take_pixels_on_a_gpu(
    calibrate, bdtool_json, bundle_copy, labelled, monkeypatch, tmp_path, precision
):
    """Against a stand-in for ONNX Runtime's sessions on CUDA."""
    calibrate("--precision", precision)
    ort = install_onnxruntime(monkeypatch, tmp_path)
    words = ("verify", bundle_copy, "--data", labelled, "--precision", precision, "--device", "cuda:0")
    assert bdtool_json(*words)["ok"] is True
    assert ort.sessions
    [stem] = (bundle_copy / "engines").glob(f"onnxruntime-*-cuda0-{precision}/stem.*.onnx")
    assert stem.name == "stem.pixels.onnx"


def test_bfloat16_on_the_cpu_says_what_to_do(bdtool, bundle_copy, labelled):
    words = ("calibrate", bundle_copy, "--data", labelled, "--precision", "bf16")
    assert "were not measured: no engine on this CPU computes in bfloat16" in bdtool(*words).stdout
    words = ("evaluate", bundle_copy, "--data", labelled, "--precision", "bf16")
    assert "has no bfloat16 kernels" in bdtool(*words, status=1).stderr


def test_policy_network_and_head_are_quantized_when_asked(calibrate, bundle_copy, bdtool_json, labelled):
    found = calibrate("--include", "policy", "--include", "head")
    assert (found["obtained"]["policy"], found["obtained"]["head"]) == ("int8", "int8")
    assert 0 <= found["gates"]["policy_flips"] < 0.2
    verified = bdtool_json("verify", bundle_copy, "--data", labelled, "--precision", "int8")
    assert verified["ok"] is True
    assert verified["rungs"]["policy"]["worst"] <= verified["rungs"]["policy"]["bound"]
    assert verified["rungs"]["policy"]["bound"] > found["gates"]["policy_flips"]


@pytest.mark.parametrize("precision", ["fp16", "mixed"])
def test_part_to_quantize_in_another_precision_is_refused(bdtool, bundle_copy, labelled, precision):
    words = ("calibrate", bundle_copy, "--data", labelled, "--precision", precision, "--include", "policy")
    assert f"--include policy adds a part to --precision int8, and {precision} was" in bdtool(*words, status=2).stderr


def test_corrected_biases_come_closer(calibrate, bundle_copy):
    plain = calibrate("--no-bias-correction")["gates"]
    assert Bundle.open(bundle_copy).manifest.variants["int8"].calibration["bias_correction"] is False
    corrected = calibrate()["gates"]
    assert Bundle.open(bundle_copy).manifest.variants["int8"].calibration["bias_correction"] is True
    assert 0 < corrected["logits_error"] < plain["logits_error"]


def test_bits_of_single_images_are_refused(calibrate, bdtool, bundle_copy, labelled, tmp_path):
    np.save(tmp_path / "bits.npy", np.ones((40, 3)))
    words = ("calibrate", bundle_copy, "--data", labelled, "--policy", tmp_path / "bits.npy")
    assert "has a row for each of 40 images, but calibration draws images" in bdtool(*words, status=2).stderr
    np.save(tmp_path / "bits.npy", np.array([1, 0, 1]))
    assert calibrate("--policy", tmp_path / "bits.npy")["topped_up"] == {"block_01": 8, "shortcut_02": 8}


def test_rare_blocks_are_named(calibrate):
    found = calibrate("--policy", "first:1")
    assert found["topped_up"]["block_02"] == 8
    assert "block_00" not in found["topped_up"]


def test_no_block_is_rare_where_all_images_take_one_path(bdtool, bundle_copy, labelled):
    words = ("calibrate", bundle_copy, "--data", labelled, "--max-accuracy-drop", 100, "--at-least", 20)
    assert "too few images run it" not in bdtool(*words, "--policy", "all").stdout
    assert "too few images run it" in bdtool(*words, "--policy", "random:1").stdout


def test_the_same_seed_gives_the_same_parts_and_uses_the_cache(calibrate, bundle_copy):
    calibrate("--limit", 30, "--seed", 3)
    first = {name: file.sha256 for name, file in Bundle.open(bundle_copy).files_at("int8").items()}
    [cached] = bundle_copy.with_name(".bundle.calibration").glob("ranges-*.npz")
    written = cached.stat().st_mtime_ns
    calibrate("--limit", 30, "--seed", 3)
    assert {name: file.sha256 for name, file in Bundle.open(bundle_copy).files_at("int8").items()} == first
    assert cached.stat().st_mtime_ns == written
    calibrate("--limit", 30, "--seed", 4)
    assert {name: file.sha256 for name, file in Bundle.open(bundle_copy).files_at("int8").items()} != first


def test_parts_of_an_earlier_calibration_are_removed(calibrate, bundle_copy):
    calibrate("--precision", "int8", "--method", "min-max")
    before = {path.name for path in (bundle_copy / "onnx" / "int8").iterdir()}
    calibrate("--precision", "int8", "--method", "percentile")
    after = {path.name for path in (bundle_copy / "onnx" / "int8").iterdir()}
    listed = {file.file for file in Bundle.open(bundle_copy).files_at("int8").values()}
    assert {f"onnx/int8/{name}" for name in after} == {file for file in listed if file.startswith("onnx/int8/")}
    assert before - after


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((), 2, "Missing option '--data'"),
        (("--data", "synthetic:8"), 1, "calibration needs real images: 8 synthetic pictures"),
    ],
)
def test_calibrating_without_data_is_refused(bdtool, bundle_copy, words, status, message):
    assert message in bdtool("calibrate", bundle_copy, *words, status=status).stderr


def test_a_precision_that_was_not_made_is_named(bdtool, bundle_copy, labelled):
    result = bdtool("evaluate", bundle_copy, "--data", labelled, "--precision", "int8", status=1)
    assert "has no int8 parts; it has fp32. Use --precision fp32, or make them: bdtool calibrate" in result.stderr
