"""Bad input on the command line: the exit status, what the message names, and that nothing is lost or half-written.

Each form of damage has its own tests beside the code that finds it; here it goes through the commands.
"""

import os
import shutil

import numpy as np
import pytest

from bdtool.errors import BundleError
from engines.libcuda import Driver
from export.bundle import Bundle
from export.files import sha256_of_file

# checkpoints


def _import(bdtool, checkpoint, target, *words, status=1, arch="resnet8"):
    message = bdtool("import", checkpoint, "--arch", arch, *words, "-o", target, status=status).stderr
    assert not target.exists()
    return message


def test_truncated_checkpoint(bdtool, blockdrop_checkpoint, tmp_path):
    data = blockdrop_checkpoint.read_bytes()
    (tmp_path / "half.t7").write_bytes(data[: len(data) // 2])
    message = _import(bdtool, tmp_path / "half.t7", tmp_path / "m")
    assert "half.t7 is truncated, or not a checkpoint by torch.save" in message
    assert "download it again" in message


def test_wrong_arch_names_the_right_one(bdtool, blockdrop_checkpoint, tmp_path):
    message = _import(bdtool, blockdrop_checkpoint, tmp_path / "m", arch="resnet20")
    assert "does not fit --arch resnet20" in message
    assert "missing: resnet.blocks.0.1." in message
    assert "it looks like --arch resnet8" in message


def test_unknown_arch_lists_the_known(bdtool, blockdrop_checkpoint, tmp_path):
    message = _import(bdtool, blockdrop_checkpoint, tmp_path / "m", arch="resnext50", status=2)
    assert "unknown architecture 'resnext50'; known: resnet20, resnet32" in message


def test_wrong_number_of_classes(bdtool, blockdrop_checkpoint, tmp_path):
    message = _import(bdtool, blockdrop_checkpoint, tmp_path / "m", "--classes", 100)
    assert "its head has 10 classes, not the 100 asked for by --classes" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mean", "0.5,0.5"), "got 2 numbers, expected 3"),
        (("--mean", "a,b,c"), "expected numbers separated by commas"),
        (("--std", "nan,1,1"), "expected finite numbers"),
        (("--std", "0,1,1"), "std above 0"),
        (("--mean", "1,1,inf"), "expected finite numbers"),
        (("--labels", "absent.txt"), "absent.txt: cannot be read"),
        (("--labels", "cifar10", "--format", "akamster"), "'akamster' is not one of"),
    ],
)
def test_wrong_options_of_import(bdtool, blockdrop_checkpoint, tmp_path, words, message):
    assert message in _import(bdtool, blockdrop_checkpoint, tmp_path / "m", *words, status=2)


class _RunsAProgram:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_malicious_pickle_does_not_run(bdtool, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _RunsAProgram()}, "evil.th")
    message = _import(bdtool, "evil.th", tmp_path / "m")
    assert "evil.th needs more than weights (it asks for posix.system) and is not loaded" in message
    assert not (tmp_path / "ran").exists()


def test_nan_weights_are_named(bdtool, blockdrop_checkpoint, tmp_path):
    import torch

    content = torch.load(blockdrop_checkpoint, weights_only=True)
    content["resnet"]["fc.bias"] = torch.full((10,), float("nan"))
    torch.save(content, tmp_path / "nan.t7")
    assert "NaN or infinite weights in resnet.fc.bias" in _import(bdtool, tmp_path / "nan.t7", tmp_path / "m")


def test_absent_directory_for_the_model(bdtool, blockdrop_checkpoint, tmp_path):
    message = _import(bdtool, blockdrop_checkpoint, tmp_path / "absent" / "m", status=2)
    assert "absent does not exist. Make it, or choose another place" in message


def test_failed_import_leaves_the_earlier_model(bdtool, blockdrop_checkpoint, tiny, tmp_path):
    model = shutil.copy(tiny.path, tmp_path / "m")
    bdtool("import", blockdrop_checkpoint, "--arch", "resnet20", "-o", model, status=1)
    assert sha256_of_file(model) == sha256_of_file(tiny.path)


# MODEL files


def test_tampered_model_is_refused_by_every_reader(bdtool, tiny, npz, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(tiny.path.read_bytes()[:-100])
    for words in (("inspect",), ("export", "-o", tmp_path / "bundle"), ("evaluate", "--data", npz)):
        message = bdtool(words[0], tmp_path / "m.safetensors", *words[1:], status=1).stderr
        assert "m.safetensors is no MODEL, or not a whole one" in message
    assert not (tmp_path / "bundle").exists()


def test_checkpoint_instead_of_a_model_is_named(bdtool, blockdrop_checkpoint, tmp_path):
    message = bdtool("export", blockdrop_checkpoint, "-o", tmp_path / "bundle", status=1).stderr
    assert "ckpt_E_730.t7 is a file by torch.save, not a MODEL; make one of it: bdtool import" in message


def test_model_instead_of_a_checkpoint_or_bundle_is_named(bdtool, tiny, picture, tmp_path):
    model = shutil.copy(tiny.path, tmp_path / "m.safetensors")
    message = bdtool("import", model, "--arch", "resnet8", "-o", tmp_path / "n", status=1).stderr
    assert "m.safetensors is a MODEL already. Go on with it: bdtool export" in message
    for given, what in ((model, "is a file"), ("r32-cifar10", "is a MODEL that ships with bdtool")):
        message = bdtool("run", given, picture, status=2).stderr
        assert f"{what}, expected the directory of a BUNDLE. Make one of a MODEL: bdtool export {given}" in message
    with pytest.raises(
        BundleError, match=r"m\.safetensors is a file, not a bundle. Make one of a MODEL: bdtool export"
    ):
        Bundle.open(model)


@pytest.mark.parametrize("words", [("--device", "cuda:0"), ("--precision", "int8"), ("--backend", "fake")])
def test_model_runs_in_pytorch_on_the_cpu_only(bdtool, tiny, npz, words):
    message = bdtool("evaluate", tiny.path, "--data", npz, *words, status=2).stderr
    assert f"{words[0]} {words[1]} needs a BUNDLE. Make one: bdtool export" in message


# export


def test_existing_bundle_needs_force(bdtool, tiny, bundle_copy, digests):
    before = digests(bundle_copy)
    message = bdtool("export", tiny.path, "-o", bundle_copy, status=1).stderr
    assert "already holds a bundle; pass --force to replace it" in message
    assert digests(bundle_copy) == before


def test_directory_that_is_no_bundle_is_left_alone(bdtool, tiny, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("precious")
    message = bdtool("export", tiny.path, "-o", tmp_path / "photos", "--force", status=1).stderr
    assert "is not a bundle: it has no manifest.json; it is left alone. Choose another -o BUNDLE" in message
    assert (tmp_path / "photos" / "cat.txt").read_text() == "precious"


def test_place_that_cannot_be_written(bdtool, tiny, tmp_path):
    (tmp_path / "file").write_text("precious")
    for words in (("export", tiny.path), ("demo",)):
        message = bdtool(*words, "-o", tmp_path / "file" / "bundle", status=2).stderr
        assert f"file/bundle': {tmp_path}/file is a file, no directory. Choose another place" in message
        message = bdtool(*words, "-o", tmp_path / "file", status=2).stderr
        assert f"'{tmp_path}/file' is a file, expected a directory to make; choose another name" in message
        assert "'' is no name of a directory; give one" in bdtool(*words, "-o", "", status=2).stderr
    message = bdtool("models", "--json", tmp_path / "file" / "f.json", status=2).stderr
    assert f"f.json': {tmp_path}/file is a file, no directory" in message
    assert (tmp_path / "file").read_text() == "precious"


def test_dash_is_stdout_for_json_alone(bdtool, tiny, npz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (("fuse", tiny.bundle), ("report", tiny.bundle, "--data", npz)):
        message = bdtool(*words, "-o", "-", status=2).stderr
        assert "'-' is no name of a file: only --json writes to stdout; give one" in message
    for words in (("export", tiny.path), ("pack", tiny.bundle)):
        message = bdtool(*words, "-o", "-", status=2).stderr
        assert "'-' is no name of a directory: only --json writes to stdout; give one" in message


def test_directory_that_cannot_be_written_to_is_refused_at_the_door(bdtool, tiny, tmp_path, monkeypatch):
    real = os.access  # for root every place is writable, whatever its mode
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and real(path, mode))
    message = bdtool("export", tiny.path, "-o", tmp_path / "a" / "b", status=2).stderr
    assert f"the directory {tmp_path} cannot be written to. Choose another place" in message


def test_link_that_leads_to_itself_is_no_place(bdtool, tiny, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for words in (("export", tiny.path, "-o"), ("fuse", tiny.bundle, "-o"), ("models", "--json")):
        message = bdtool(*words, tmp_path / "loop", status=2).stderr
        assert f"'{tmp_path}/loop': a symbolic link that leads to itself. Choose another name" in message


# policies


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("1010", "got 4 bits, the model has 3 blocks"),
        ("first:4", "got K = 4, the model has 3 blocks"),
        ("12x", "not a form of POLICY. POLICY is one of: learned[:THRESHOLD], all, none"),
        ("absent.npy", "no such file"),
    ],
)
def test_policy_that_does_not_fit(bdtool, tiny, npz, picture, policy, message):
    for words in (("run", tiny.bundle, picture), ("evaluate", tiny.path, "--data", npz), ("profile", tiny.bundle)):
        assert message in bdtool(*words, "--policy", policy, status=2).stderr


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ([1, 0], "got shape [2], expected [3] or [N, 3]"),
        ([1, 0, 2], "got the value 2, expected only 0 (drop) and 1 (keep)"),
        ([[1, 0, 1]] * 5, "has 5 rows"),
    ],
)
def test_policy_file_that_does_not_fit(bdtool, tiny, npz, tmp_path, bits, message):
    np.save(tmp_path / "p.npy", bits)
    words = ("evaluate", tiny.bundle, "--data", npz, "--policy", tmp_path / "p.npy")
    assert message in bdtool(*words, status=2).stderr


def test_learned_needs_a_policy_network(bdtool, export_random, picture):
    plain = export_random("resnet8", shortcut="average-pool", has_policy=False)
    message = bdtool("run", plain.bundle, picture, "--policy", "learned", status=2).stderr
    assert "policy 'learned': the model has no policy network. Train one (`bdtool train imitate`" in message


# data sets


def test_empty_data_sets(bdtool, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    message = bdtool("evaluate", tiny.bundle, "--data", tmp_path / "empty", status=1).stderr
    assert "empty: no images in it, expected files named" in message
    np.savez(tmp_path / "empty.npz", x=np.zeros((0, 32, 32, 3), np.uint8), y=np.zeros(0, int))
    message = bdtool("evaluate", tiny.bundle, "--data", tmp_path / "empty.npz", status=1).stderr
    assert "empty.npz: no images, expected at least one" in message


def test_data_without_labels_cannot_be_evaluated(bdtool, tiny, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 32, 32, 3), np.uint8))
    message = bdtool("evaluate", tiny.bundle, "--data", tmp_path / "x.npz", status=1).stderr
    assert "x.npz; evaluate needs them: an .npz with y, or one folder a class" in message
    message = bdtool("evaluate", tiny.bundle, "--data", "synthetic:2", status=1).stderr
    assert "no labels in 2 synthetic pictures (seed 0), not real images; evaluate needs them" in message


def test_labels_outside_the_classes_are_named(bdtool, tiny, tmp_path):
    np.savez(tmp_path / "y.npz", x=np.zeros((2, 32, 32, 3), np.uint8), y=np.array([3, 10]))
    message = bdtool("evaluate", tiny.bundle, "--data", tmp_path / "y.npz", status=1).stderr
    assert "label 10 of image 1 is not in 0 to 9" in message


def test_unknown_data_lists_the_forms(bdtool, tiny):
    message = bdtool("evaluate", tiny.bundle, "--data", "mnist:there", status=2).stderr
    assert "DATA is one of: FILE.npz" in message


# backends, devices, precisions, strategies


def test_unknown_backend_and_device_list_the_known(bdtool, tiny, picture):
    for words in (("build", tiny.bundle), ("run", tiny.bundle, picture), ("profile", tiny.bundle)):
        message = bdtool(*words, "--backend", "openvino", status=2).stderr
        assert "unknown backend 'openvino'; this version has onnxruntime" in message
        assert "fake" not in message  # it makes answers up, for tests
        assert "unknown device 'gpu'; expected cpu or cuda:N" in bdtool(*words, "--device", "gpu", status=2).stderr


@pytest.mark.parametrize("device", ["cuda:0", "cuda"])
def test_gpu_that_is_not_there_is_refused_never_replaced(bdtool, bundle_copy, picture, digests, monkeypatch, device):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    before = digests(bundle_copy)
    for words in (("build", bundle_copy), ("run", bundle_copy, picture), ("verify", bundle_copy)):
        message = bdtool(*words, "--device", device, status=1).stderr
        assert "device 'cuda:0': this onnxruntime has no CUDA provider" in message
    assert digests(bundle_copy) == before
    assert not (bundle_copy / "engines").exists()


def test_gpu_that_is_not_there_is_refused_in_our_own_words(bdtool, bundle_copy, monkeypatch):
    nothing = Driver(installed=False, error="no NVIDIA driver (libcuda not found)")
    monkeypatch.setattr("engines.onnxrt_providers.driver_from_libcuda", lambda: nothing)
    message = bdtool("build", bundle_copy, "--device", "cuda:0", status=1).stderr
    assert message.startswith("Error: device 'cuda:0': no NVIDIA driver (libcuda not found). See `bdtool doctor`")


def test_precision_that_the_bundle_lacks(bdtool, tiny, picture):
    for words in (("build", tiny.bundle), ("run", tiny.bundle, picture), ("verify", tiny.bundle)):
        message = bdtool(*words, "--precision", "int8", status=1).stderr
        assert "has no int8 parts; it has fp32. Use --precision fp32" in message


def test_unknown_strategy_lists_the_known_and_builds_nothing(bdtool, bundle_copy):
    message = bdtool("profile", bundle_copy, "--strategy", "chain,magic", status=2).stderr
    assert "'magic'" in message
    assert "chain" in message
    assert not (bundle_copy / "engines").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--duration", "nan"), "expected a finite number"),
        (("--warmup", "inf"), "expected a finite number"),
        (("--duration", "0"), "is not in the range"),
        (("--percentile", "101"), "each number must lie between 0 and 100"),
        (("--threads", "0"), "is not in the range"),
        (("--batch", "0"), "is not in the range"),
    ],
)
def test_wrong_numbers_for_profile(bdtool, tiny, words, message):
    assert message in bdtool("profile", tiny.bundle, *words, status=2).stderr


# what the messages tell to do


def test_commands_to_copy_quote_their_paths(bdtool, tiny, picture, blockdrop_checkpoint, tmp_path):
    place = tmp_path / "a b"
    place.mkdir()
    bundle, quoted = shutil.copytree(tiny.bundle, place / "bundle"), f"'{place}/"
    message = bdtool("run", bundle, picture, "--strategy", "auto", status=1).stderr
    assert f"Run `bdtool profile {quoted}bundle' --strategy auto" in message
    message = bdtool("export", shutil.copy(blockdrop_checkpoint, place / "c.t7"), "-o", place / "n", status=1).stderr
    assert f"make one of it: bdtool import {quoted}c.t7' -o imported.safetensors" in message
    message = bdtool("run", shutil.copy(tiny.path, place / "m.safetensors"), picture, status=2).stderr
    assert f"bdtool export {quoted}m.safetensors' -o bundle" in message
    (bundle / "manifest.json").write_text("")
    message = bdtool("export", tiny.path, "-o", bundle, "--force", status=1).stderr
    assert f"remove it yourself (rm -r {quoted}bundle')" in message
