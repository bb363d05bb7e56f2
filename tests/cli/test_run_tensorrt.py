"""The commands that run a bundle, on TensorRT: against stand-ins, and what they say on a machine without a GPU."""

import pytest

from engines.libcuda import Driver
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
    assert (row["label"], row["policy"]) == (expected["label"], expected["policy"])
    assert row["probability"] == pytest.approx(expected["probability"], abs=1e-4)
    quick = ("--data", npz, "--duration", "0.01", "--warmup", "0")
    profile = bdtool_json("profile", bundle_copy, *quick, *TENSORRT)
    assert profile["environment"]["backend"] == "tensorrt 10.14.1"
    assert set(profile["strategies"]) == {"full", "chain"}


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
