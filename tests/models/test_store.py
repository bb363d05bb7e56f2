import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bdtool.errors import CheckpointError, PolicyError
from bdtool.models.store import load_model, read_spec, save_model


@pytest.fixture
def saved(make_model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(make_model("resnet8"), path)
    return path


def _rewrite(path, *, header=None, **tensors):
    """Change header fields or tensors of a MODEL file; None removes a tensor."""
    state = load_file(path)
    with safe_open(path, framework="numpy") as file:
        fields = json.loads(file.metadata()["bdtool"])
    state.update({name: tensor for name, tensor in tensors.items() if tensor is not None})
    for name in [name for name, tensor in tensors.items() if tensor is None]:
        del state[name]
    save_file(state, path, metadata={"bdtool": json.dumps(fields | (header or {}))})


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_others_may_read_it_where_they_may_read_other_files(make_model, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_model(make_model("resnet8"), tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("has_policy", [True, False])
def test_round_trip_gives_the_same_model_in_eval_mode(make_model, tmp_path, has_policy):
    model = make_model("resnet14", has_policy=has_policy)
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded.spec == model.spec == read_spec(tmp_path / "m.safetensors")
    assert not loaded.training


@pytest.mark.parametrize(
    ("arch", "fields", "version"),
    [
        ("resnet8", {}, 1),
        ("resnet8", {"policy_hidden": 16}, 2),
        ("resnet8", {"policy_hidden": 16, "policy_downscale": 2}, 3),
        ("resnet8", {"downscale": 2}, 3),
        ("resnet18", {"policy_downscale": 1}, 3),
        ("resnet8", {"has_policy": False, "mask": "101"}, 5),
    ],
)
def test_what_older_versions_do_not_know_is_stored_where_it_is_used(make_model, tmp_path, arch, fields, version):
    """A file that uses none of it can still be read by them."""
    model = make_model(arch, **fields)
    path = tmp_path / "m.safetensors"
    save_model(model, path)
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["bdtool"])
    assert header["format_version"] == version
    newer = ("policy_hidden", "downscale", "policy_downscale", "mask")
    assert {name: header[name] for name in newer if name in header} == {n: fields[n] for n in newer if n in fields}
    loaded = load_model(path)
    assert loaded.spec == model.spec
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        if loaded.policy is not None:
            assert torch.equal(loaded.keep_probability(images), model.keep_probability(images))
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    ("arch", "interpolation", "version"),
    [("resnet18", "bilinear", 1), ("resnet18", "bicubic", 4), ("resnext50_32x4d", "bilinear", 4)],
)
def test_architectures_and_scaling_that_older_versions_do_not_know_have_a_newer_format(
    make_model, tmp_path, arch, interpolation, version
):
    """These say that bdtool is to be upgraded, instead of calling the file damaged."""
    model = make_model(arch, has_policy=False)
    scaled = replace(model.spec.preprocessing, interpolation=interpolation)
    model.spec = replace(model.spec, preprocessing=scaled)
    save_model(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["bdtool"])["format_version"] == version
    assert read_spec(tmp_path / "m.safetensors") == model.spec


@pytest.mark.parametrize("name", ["downscale", "policy_downscale"])
def test_impossible_downscale_is_a_damaged_header(saved, name):
    _rewrite(saved, header={name: -1})
    with pytest.raises(CheckpointError, match=f"its header is damaged .*{name} -1; give 1 for whole images"):
        read_spec(saved)


def test_equal_models_give_equal_bytes(make_model, saved, tmp_path):
    save_model(make_model("resnet8"), tmp_path / "again.safetensors")
    save_model(load_model(saved), tmp_path / "reloaded.safetensors")
    assert saved.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert saved.read_bytes() == (tmp_path / "reloaded.safetensors").read_bytes()


def test_nan_weights_are_not_written_and_the_old_file_stays(make_model, saved):
    before = saved.read_bytes()
    model = make_model("resnet8")
    model.base.blocks[1].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"base\.blocks\.1\.conv1\.weight"):
        save_model(model, saved)
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 1


@pytest.mark.parametrize("read", [load_model, read_spec])
def test_empty_file_arrays_and_others_are_told_from_a_model(tmp_path, read):
    (tmp_path / "m.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"m\.safetensors is empty, expected a MODEL"):
        read(tmp_path / "m.safetensors")
    np.savez(tmp_path / "test.npz", x=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"test\.npz is a file of arrays, as --data takes them, expected a MODEL"):
        read(tmp_path / "test.npz")
    (tmp_path / "block.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    with pytest.raises(CheckpointError, match=r"block\.onnx is no safetensors file, expected a MODEL"):
        read(tmp_path / "block.onnx")


@pytest.mark.parametrize("n_bytes", [5, 100, 3000, -1])
def test_truncated_file_is_refused_by_name(saved, n_bytes):
    saved.write_bytes(saved.read_bytes()[:n_bytes])
    for read in (load_model, read_spec):
        with pytest.raises(CheckpointError, match=r"m\.safetensors is no MODEL, or not a whole one"):
            read(saved)


def test_absent_file_and_absent_folder_are_named(make_model, tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors cannot be read: No such file"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be written: No such file.*; clear the way"):
        save_model(make_model("resnet8"), tmp_path / "folder" / "m.safetensors")


def test_foreign_safetensors_file_is_refused(saved):
    save_file(load_file(saved), saved, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is a safetensors file, not a MODEL; make one of it: bdtool import"):
        load_model(saved)


def test_newer_format_is_refused(saved):
    _rewrite(saved, header={"format_version": 6})
    with pytest.raises(CheckpointError, match="format_version 6, this bdtool reads up to 5"):
        load_model(saved)


@pytest.mark.parametrize(
    "header",
    [
        {"arch": "resnet33"},
        {"arch": None},
        {"n_classes": "many"},
        {"n_classes": 0},
        {"n_classes": float("inf")},
        {"labels": ["one"]},
        {"labels": 3},
        {"preprocessing": {}},
        {"preprocessing": None},
        {"stages": [9, 9, 9]},
        {"shortcut": "bridge"},
        {"shortcut": []},
        {"provenance": 1},
        {"provenance": {"seed": float("nan")}},
        {"format_version": None},
        {"mask": "101"},  # beside a policy network
        {"has_policy": False, "mask": "10"},
        {"has_policy": False, "mask": "121"},
        {"has_policy": False, "mask": [1, 0, 1]},
    ],
)
def test_damaged_header_is_refused_with_a_reason(saved, header):
    _rewrite(saved, header=header)
    with pytest.raises(CheckpointError, match="its header is damaged"):
        read_spec(saved)


def test_tampered_tensors_are_refused_by_name(saved):
    _rewrite(saved, **{"base.stem.conv.weight": None, "extra": torch.zeros(1), "policy.logit.bias": torch.zeros(9)})
    with pytest.raises(CheckpointError) as caught:
        load_model(saved)
    assert "1 missing: base.stem.conv.weight" in str(caught.value)
    assert "1 unexpected: extra" in str(caught.value)
    assert "policy.logit.bias got [9], needs [3]" in str(caught.value)


def test_non_finite_or_integer_weights_are_refused_on_loading(saved):
    _rewrite(saved, **{"policy.logit.bias": torch.tensor([0.0, float("inf"), 0.0])})
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in policy\.logit\.bias"):
        load_model(saved)
    _rewrite(saved, **{"policy.logit.bias": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match=r"policy\.logit\.bias I64"):
        load_model(saved)


def test_reading_a_header_loads_no_torch(saved):
    code = (
        "import sys; from pathlib import Path; from bdtool.models.store import read_spec;"
        "print(read_spec(Path(sys.argv[1])).arch, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["resnet8", "False"]


def test_model_without_policy_says_so_when_asked_for_probabilities(make_model):
    with pytest.raises(PolicyError, match="resnet8 has no policy network"):
        make_model("resnet8", has_policy=False).keep_probability(torch.zeros(1, 3, 32, 32))


def test_model_goes_through_a_symbolic_link_and_into_no_device(random_model, tmp_path):
    model = random_model("resnet8")
    (tmp_path / "link").symlink_to(tmp_path / "model.safetensors")
    save_model(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_model(tmp_path / "model.safetensors").spec == model.spec
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"pipe is no regular file, and a MODEL needs one; choose another place"):
        save_model(model, tmp_path / "pipe")


_SAVE_ON_A_SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from bdtool.models.store import load_model, save_model

model = load_model(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
save_model(model, Path(sys.argv[2]))
"""


def test_disk_that_is_full_is_named(saved, tmp_path):
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-c", _SAVE_ON_A_SMALL_DISK, str(saved), str(tmp_path / "new.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"CheckpointError: .*new\.safetensors cannot be written: .*File too large", done.stderr)
    assert sorted(tmp_path.iterdir()) == before
