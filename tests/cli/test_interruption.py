"""Ctrl-C and kill, on real processes in the middle of their work."""

import json
import os
import re
import shutil
import signal
import time

import pytest

from export.bundle import Bundle
from export.files import sha256_of_file


@pytest.fixture(scope="module")
def resnet32(export_random):
    return export_random("resnet32", has_policy=False)


def _digests(directory):
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): sha256_of_file(path) for path in files}


def _wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, f"the command ended first: {process.communicate()}"
        time.sleep(0.001)


def _stop(process, how):
    os.kill(process.pid, how)
    stdout, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    return stdout, stderr


@pytest.mark.slow
def test_ctrl_c_in_export_leaves_the_bundle_and_the_rerun_goes_on(resnet32, bundle_copy, start_bdtool):
    before = _digests(bundle_copy)
    process = start_bdtool("export", resnet32.path, "-o", bundle_copy, "--force")
    _wait_for(bundle_copy.with_name(".bundle.partial") / "records" / "block_00.json", process)
    _, stderr = _stop(process, signal.SIGINT)
    assert process.returncode == 1
    told, aborted = stderr.split("\n")[1:3]
    assert re.fullmatch(r"finished: [1-9]\d* of 20 parts; the same command goes on from there", told)
    assert aborted == "Aborted!"
    assert _digests(bundle_copy) == before
    Bundle.open(bundle_copy)

    process = start_bdtool("export", resnet32.path, "-o", bundle_copy, "--force")
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (0, "")
    assert "taken up from an interrupted run" in stdout
    assert Bundle.open(bundle_copy).network.arch == "resnet32"
    assert sorted(path.name for path in bundle_copy.parent.iterdir()) == ["bundle"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_build_keeps_what_is_finished(resnet32, tmp_path, start_bdtool, how):
    bundle = shutil.copytree(resnet32.bundle, tmp_path / "b", ignore=shutil.ignore_patterns("engines"))
    before = _digests(bundle)
    process = start_bdtool("build", bundle)
    while not list(bundle.glob("engines/*/block_00.engine.json")):
        assert process.poll() is None
        time.sleep(0.001)
    _, stderr = _stop(process, how)
    told = r"\nfinished: [1-9]\d* of 20 engines; the same command goes on from there\nAborted!\n"
    assert re.fullmatch(told if how == signal.SIGINT else "", stderr)
    assert process.returncode == (1 if how == signal.SIGINT else -signal.SIGKILL)
    finished = len(list(bundle.glob("engines/*/*.engine.json")))
    assert 0 < finished < len(Bundle.open(bundle).network.parts)
    assert {name: digest for name, digest in _digests(bundle).items() if not name.startswith("engines")} == before

    stdout, stderr = start_bdtool("build", bundle, "--json", "-").communicate(timeout=300)
    parts = json.loads(stdout)["parts"]
    assert stderr == ""
    assert sum(part["cached"] for part in parts.values()) == finished
    assert {part["status"] for part in parts.values()} == {"built", "cached"}


def test_ctrl_c_in_calibrate_says_what_is_kept(bdtool, bundle_copy, npz, digests, monkeypatch):
    from calibration.paths import PathWalker

    monkeypatch.setattr("bdtool.specs._BULK_IMAGES", 5)
    real, calls = PathWalker.add, []

    def add(self, batch, collector):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, batch, collector)

    monkeypatch.setattr(PathWalker, "add", add)
    before = digests(bundle_copy / "onnx")
    words = ("calibrate", bundle_copy, "--data", npz, "--policy", "all", "--limit", 20, "--max-accuracy-drop", 100)
    told = "finished: the ranges of 50 % of the images; the same command goes on from there, or a few batches earlier"
    assert bdtool(*words, status=1).stderr.endswith(f"\n\n{told}\nAborted!\n")
    assert digests(bundle_copy / "onnx") == before
    bdtool(*words)


def test_ctrl_c_in_imitate_saves_and_the_same_command_goes_on(tiny, npz, tmp_path, start_bdtool):
    model = tmp_path / "policy.safetensors"
    command = ["train", "imitate", tiny.path, "--epochs", 3000, "--batch", 20, "--judges", 20, "--data", npz]
    command += ["--threads", 1, "-o", model]
    process = start_bdtool(*command, "--save-every", 0)
    _wait_for(tmp_path / "policy.safetensors.checkpoint", process)
    stdout, stderr = _stop(process, signal.SIGINT)
    assert (process.returncode, stdout) == (1, "")
    said = re.search(r"Error: stopped after (.*); the same command with --resume goes on", " ".join(stderr.split()))
    assert said
    assert not model.exists()

    process = start_bdtool(*command, "--resume")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0
    assert f"going on from {said[1]}" in stderr
    assert stdout.strip() == f"{model}: resnet8, 3000 epochs"
    assert sorted(path.name for path in tmp_path.glob("policy.safetensors*")) == ["policy.safetensors"]
