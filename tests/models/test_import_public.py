"""Importing checkpoints of akamaster and torchvision, and what is refused."""

import hashlib
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from bdtool.errors import CheckpointError, UsageError
from bdtool.models import checkpoints
from bdtool.models.checkpoint_entries import entries_with_networks
from bdtool.models.checkpoints import import_checkpoint
from bdtool.models.store import read_spec, save_model
from bdtool.specs import dict_from_preprocessing


def _accuracy(model, sample):
    images, labels = sample
    p = model.spec.preprocessing
    x = torch.from_numpy(images.copy()).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(p.std).view(3, 1, 1)
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == torch.from_numpy(labels)).float().mean())


@pytest.mark.parametrize(("file", "arch"), [("resnet20-12fca82f.th", "resnet20"), ("resnet32-d509ac18.th", "resnet32")])
def test_public_cifar_checkpoints_classify_real_images(public_checkpoints, cifar_sample, file, arch):
    model = import_checkpoint(public_checkpoints / file, arch=arch)
    assert model.spec.shortcut == "option-a"
    assert model.spec.labels[:2] == ("airplane", "automobile")
    assert _accuracy(model, cifar_sample) > 0.87  # 91.7 % and 92.6 % on all 10,000; 200 images scatter by 2 % (1 sigma)


def test_project_checkpoint_needs_average_pool_shortcuts(public_checkpoints, cifar_sample):
    options = {"arch": "resnet32", "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    path = public_checkpoints / "r32-cifar10-base.pt"
    right = _accuracy(import_checkpoint(path, shortcut="average-pool", **options), cifar_sample)
    assert right > 0.87  # 91.8 % on all 10,000
    assert _accuracy(import_checkpoint(path, **options), cifar_sample) < right


@pytest.mark.parametrize(
    "arch", ["resnet18", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_64x4d", "wide_resnet50_2"]
)
def test_imported_torchvision_network_gives_torchvisions_logits(stir, tmp_path, arch):
    oracle = getattr(torchvision.models, arch)().eval()
    stir(oracle)
    torch.save(oracle.state_dict(), tmp_path / "net.pth")
    model = import_checkpoint(tmp_path / "net.pth", arch=arch)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images), oracle(images), atol=1e-4, rtol=1e-4)
    assert model.spec.preprocessing.resize == 256
    assert model.spec.labels[0] == "tench"


@pytest.mark.parametrize(
    ("arch", "digits", "weights", "resize"),
    [
        ("resnet50", "0676ba61", "ResNet50_Weights.IMAGENET1K_V1", 256),
        ("resnet50", "11ad3fa6", "ResNet50_Weights.IMAGENET1K_V2", 232),
        ("resnext50_32x4d", "1a0047aa", "ResNeXt50_32X4D_Weights.IMAGENET1K_V2", 232),
        ("resnet50", "00000000", None, 256),
    ],
)
def test_torchvisions_weights_are_known_by_their_digests(tmp_path, monkeypatch, arch, digits, weights, resize):
    """Their accuracy is published for pictures that are scaled so."""
    path = _saved(tmp_path, getattr(torchvision.models, arch)().state_dict())
    monkeypatch.setattr(checkpoints, "sha256_of_file", lambda path: digits + 56 * "0")
    spec = import_checkpoint(path, arch=arch).spec
    assert spec.preprocessing.resize == resize
    assert spec.provenance.get("weights") == weights
    assert import_checkpoint(path, arch=arch, resize=240).spec.preprocessing.resize == 240
    assert import_checkpoint(path, arch=arch, size=224).spec.preprocessing.resize == resize
    assert import_checkpoint(path, arch=arch, size=288).spec.preprocessing.resize == round(resize * 288 / 224)


def test_input_of_another_size(tmp_path, resnet18_state, make_model):
    large = import_checkpoint(_saved(tmp_path, resnet18_state), arch="resnet18", size=288).spec.preprocessing
    assert (large.height, large.width, large.resize) == (288, 288, 329)  # as 256 to 224
    assert "interpolation" not in dict_from_preprocessing(large), "older versions know one"
    bicubic = import_checkpoint(_saved(tmp_path, resnet18_state), arch="resnet18", interpolation="bicubic")
    save_model(bicubic, tmp_path / "model.safetensors")
    assert read_spec(tmp_path / "model.safetensors").preprocessing.interpolation == "bicubic"
    state = _akamaster_state(make_model("resnet8", shortcut="option-a", has_policy=False), blocks_per_stage=1)
    model = import_checkpoint(_saved(tmp_path, state), arch="resnet8", size=64)
    assert (model.spec.preprocessing.height, model.spec.preprocessing.resize) == (64, None)
    with pytest.raises(UsageError, match=r"base\.blocks\.1\.shortcut: an average-pool shortcut halves 33 x 33 pixels"):
        import_checkpoint(tmp_path / "net.pth", arch="resnet8", size=33, shortcut="average-pool")


def test_pictures_scaled_to_less_than_the_input_are_refused(tmp_path, resnet18_state):
    path = _saved(tmp_path, resnet18_state)
    with pytest.raises(UsageError, match=r"--resize-to 223: .* 224 x 224 pixels; give 224 or more, or a --size of 223"):
        import_checkpoint(path, arch="resnet18", resize=223)
    assert import_checkpoint(path, arch="resnet18", resize=160, size=160).spec.preprocessing.resize == 160


@pytest.fixture
def resnet18_state():
    return torchvision.models.resnet18(num_classes=7).state_dict()


def _saved(tmp_path, content, name="net.pth", **options):
    torch.save(content, tmp_path / name, **options)
    return tmp_path / name


def test_safetensors_and_data_parallel_checkpoints_are_read_alike(tmp_path, resnet18_state):
    save_file(resnet18_state, tmp_path / "net.safetensors")
    wrapped = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in resnet18_state.items()}}
    first = import_checkpoint(tmp_path / "net.safetensors", arch="resnet18")
    second = import_checkpoint(_saved(tmp_path, wrapped), arch="resnet18", format="torchvision")
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert first.spec.n_classes == 7
    assert first.spec.labels is None


PREFIXES = ["", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "net.", "net._orig_mod."]


@pytest.mark.parametrize("entry", ["model", "model_state_dict", "state_dict", "net", None])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrapped_networks_are_found(tmp_path, resnet18_state, entry, prefix):
    """As training loops save them: beside their optimizer, after torch.compile, from a field of a larger module."""
    state = {f"{prefix}{key}": value for key, value in resnet18_state.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    content = {entry: state, "optimizer": optimizer, "epoch": 3} if entry else state
    model = import_checkpoint(_saved(tmp_path, content), arch="resnet18")
    assert torch.equal(model.base.state_dict()["stem.conv.weight"], resnet18_state["conv1.weight"])


def test_averaged_weights_are_imported_without_their_counter(tmp_path, resnet18_state):
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in resnet18_state.items()}}
    for content in (averaged, {"state_dict": averaged}, {"model": averaged, "epoch": 3}):
        model = import_checkpoint(_saved(tmp_path, content), arch="resnet18")
        assert torch.equal(model.base.state_dict()["stem.conv.weight"], resnet18_state["conv1.weight"])


def test_two_networks_in_a_file_are_not_chosen_from(tmp_path, resnet18_state):
    settings = {"model": {"name": "resnet18"}, "model_state_dict": resnet18_state}
    assert import_checkpoint(_saved(tmp_path, settings), arch="resnet18").spec.arch == "resnet18"
    policy = {"agent": {"features.conv1.weight": resnet18_state["conv1.weight"]}, "model": resnet18_state}
    with pytest.raises(CheckpointError):  # the policy network would be lost
        import_checkpoint(_saved(tmp_path, policy), arch="resnet18")
    two = {"model": resnet18_state, "model_state_dict": resnet18_state}
    with pytest.raises(CheckpointError, match=r"looks like none of .*: it holds model, model_state_dict"):
        import_checkpoint(_saved(tmp_path, two), arch="resnet18")


def test_prefix_of_some_keys_is_no_wrapper(tmp_path, resnet18_state):
    state = {key if key == "fc.bias" else f"model.{key}": value for key, value in resnet18_state.items()}
    with pytest.raises(CheckpointError, match=r"looks like none of .*: it holds fc\.bias, model"):
        import_checkpoint(_saved(tmp_path, state), arch="resnet18")


NETWORK_ELSEWHERE = {
    "averaged weights alone": ("state_dict_ema", lambda state: {"state_dict_ema": state, "epoch": 3}),
    "averaged weights beside others": ("model_ema", lambda state: {"model": _zeros(state), "model_ema": state}),
    "beside a loss with weights": (
        "state_dict.model",
        lambda state: {"state_dict": {**_prefixed(state, "model."), "criterion.weight": torch.ones(7)}, "epoch": 3},
    ),
    "one of two": ("student", lambda state: {**_prefixed(state, "student.module."), **_prefixed(state, "teacher.")}),
    "deep within": ("trainer.model", lambda state: {"trainer": {"model": {"state_dict": state}, "step": 3}}),
}


def _zeros(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


def _prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize("case", NETWORK_ELSEWHERE)
def test_entry_names_the_network_in_a_file(tmp_path, resnet18_state, case):
    entry, content_of = NETWORK_ELSEWHERE[case]
    path = _saved(tmp_path, content_of(resnet18_state))
    model = import_checkpoint(path, arch="resnet18", entry=entry)
    assert torch.equal(model.base.state_dict()["stem.conv.weight"], resnet18_state["conv1.weight"])
    assert model.spec.provenance["entry"] == entry


@pytest.mark.parametrize(
    ("case", "advice"),
    [
        ("averaged weights alone", "--entry state_dict_ema"),
        ("beside a loss with weights", "--entry state_dict.model"),
        ("one of two", "--entry student.module or --entry teacher"),
        ("deep within", "--entry trainer.model.state_dict"),
    ],
)
def test_networks_elsewhere_are_named(tmp_path, resnet18_state, case, advice):
    path = _saved(tmp_path, NETWORK_ELSEWHERE[case][1](resnet18_state))
    with pytest.raises(CheckpointError, match=rf"looks like none .*; name the network to import: {advice}$"):
        import_checkpoint(path, arch="resnet18")
    with pytest.raises(CheckpointError, match=rf"nothing lies in --entry nowhere; it holds .*; {advice}$"):
        import_checkpoint(path, arch="resnet18", entry="nowhere")
    with pytest.raises(CheckpointError, match=r"nothing lies in --entry epoch"):
        import_checkpoint(path, arch="resnet18", entry="epoch")


def test_entry_of_a_file_without_any(tmp_path, resnet18_state):
    with pytest.raises(CheckpointError, match=r"nothing lies in --entry model; it holds .*; leave --entry out$"):
        import_checkpoint(_saved(tmp_path, resnet18_state), arch="resnet18", entry="model")


def test_networks_are_not_looked_for_without_end():
    nested = {"layer1": torch.ones(1), "fc": torch.ones(1)}
    assert entries_with_networks({"model": nested}) == ["model"]
    for _ in range(5000):  # too deep for a search that calls itself for each dict
        nested = {"model": nested}
    assert entries_with_networks(nested) == []


def test_provenance_names_the_file_by_its_digest_and_no_time(tmp_path, resnet18_state):
    path = _saved(tmp_path, resnet18_state)
    assert import_checkpoint(path, arch="resnet18").spec.provenance == {
        "source": "net.pth",
        "format": "torchvision",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "created_by": "bdtool import",
    }


def test_all_wrong_keys_are_listed_by_the_files_own_names(tmp_path, resnet18_state):
    del resnet18_state["layer2.0.downsample.0.weight"]
    resnet18_state["layer9.0.conv1.weight"] = torch.zeros(1)
    resnet18_state["bn1.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(_saved(tmp_path, resnet18_state), arch="resnet18")
    assert "1 missing: layer2.0.downsample.0.weight" in str(caught.value)
    assert "1 unexpected: layer9.0.conv1.weight" in str(caught.value)
    assert "1 mis-shaped: bn1.bias got [3], needs [64]" in str(caught.value)


@pytest.mark.parametrize("arch", ["resnet34", "resnet50", "resnet20"])
def test_wrong_depth_names_the_likely_arch_and_caps_the_list(tmp_path, resnet18_state, arch):
    with pytest.raises(CheckpointError, match=r"it looks like --arch resnet18$") as caught:
        import_checkpoint(_saved(tmp_path, resnet18_state), arch=arch)
    assert len(str(caught.value)) < 1500


def test_unlisted_cifar_depth_is_recognised(tmp_path, make_model):
    state = _akamaster_state(make_model("resnet14", shortcut="option-a", has_policy=False), blocks_per_stage=2)
    with pytest.raises(CheckpointError, match=r"and 22 more.*it looks like --arch resnet14$"):
        import_checkpoint(_saved(tmp_path, state), arch="resnet20")


def _akamaster_state(model, *, blocks_per_stage):
    state = {}
    for name, tensor in model.base.state_dict().items():
        if name.startswith("blocks."):
            _, k, rest = name.split(".", 2)
            name = f"layer{int(k) // blocks_per_stage + 1}.{int(k) % blocks_per_stage}.{rest}"
        state[name.replace("stem.conv", "conv1").replace("stem.bn", "bn1").replace("head.linear", "linear")] = tensor
    return state


def test_classes_that_differ_from_the_head_are_refused(tmp_path, resnet18_state):
    path = _saved(tmp_path, resnet18_state)
    with pytest.raises(CheckpointError, match="head has 7 classes, not the 1000"):
        import_checkpoint(path, arch="resnet18", classes=1000)
    assert import_checkpoint(path, arch="resnet18", classes=7, labels=tuple("abcdefg")).spec.labels[6] == "g"
    with pytest.raises(UsageError, match="2 labels for 7 classes"):
        import_checkpoint(path, arch="resnet18", labels=("a", "b"))


def test_nan_weights_are_named(tmp_path, resnet18_state):
    resnet18_state["layer3.1.bn2.running_var"][5] = float("nan")
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in layer3\.1\.bn2\.running_var"):
        import_checkpoint(_saved(tmp_path, resnet18_state), arch="resnet18")


def test_negative_variances_are_named(tmp_path, resnet18_state):
    """Their square root makes the logits NaN, which argmax calls class 0."""
    resnet18_state["layer3.1.bn2.running_var"][5] = -1
    with pytest.raises(CheckpointError, match=r"negative variances in layer3\.1\.bn2\.running_var, expected 0 or more"):
        import_checkpoint(_saved(tmp_path, resnet18_state), arch="resnet18")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_of_another_type_are_named(tmp_path, resnet18_state, dtype):
    path = tmp_path / "net.safetensors"
    save_file({key: value.to(dtype) for key, value in resnet18_state.items()}, path)
    with pytest.raises(
        CheckpointError, match=rf"no plain tensor of 16 to 64-bit floats: bn1\.bias \({dtype}\), .* save"
    ):
        import_checkpoint(path, arch="resnet18")


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d", "wide_resnet50_2"])
def test_architecture_that_the_tensors_fit_is_taken(tmp_path, arch):
    path = _saved(tmp_path, getattr(torchvision.models, arch)(num_classes=7).state_dict())
    assert import_checkpoint(path).spec.arch == arch


def test_depth_that_nobody_lists_is_found_too(tmp_path, make_model):
    state = _akamaster_state(make_model("resnet26", shortcut="option-a", has_policy=False), blocks_per_stage=4)
    assert import_checkpoint(_saved(tmp_path, state)).spec.arch == "resnet26"


def test_tensors_that_fit_no_architecture_ask_for_one(tmp_path, resnet18_state):
    del resnet18_state["bn1.weight"]
    path = _saved(tmp_path, resnet18_state)
    with pytest.raises(CheckpointError, match=r"\(format torchvision\) fits no architecture .* Name the nearest with"):
        import_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"does not fit --arch resnet18 \(1 missing: bn1\.weight\)"):
        import_checkpoint(path, arch="resnet18")


def test_unknown_format_and_unrecognised_keys_list_the_known_formats(tmp_path):
    path = _saved(tmp_path, {"weights": torch.zeros(3)})
    with pytest.raises(UsageError, match="known: auto, akamaster, torchvision, transformers, blockdrop"):
        import_checkpoint(path, arch="resnet18", format="caffe")
    with pytest.raises(CheckpointError, match=r"none of akamaster, .*, blockdrop: it holds weights"):
        import_checkpoint(path, arch="resnet18")


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_checkpoint_is_named(tmp_path, resnet18_state, legacy):
    path = _saved(tmp_path, resnet18_state, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for n_bytes in (0, 10, 1000, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(CheckpointError, match=r"net\.pth is truncated"):
            import_checkpoint(path, arch="resnet18")


class _RunsACommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_pickle_is_refused_and_does_not_run(tmp_path, resnet18_state, legacy):
    resnet18_state["conv1.weight"] = _RunsACommand(f"touch {tmp_path / 'ran'}")
    path = _saved(tmp_path, resnet18_state, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"needs more than weights \(it asks for posix\.system\).*state_dict"):
        import_checkpoint(path, arch="resnet18")
    path.write_bytes(pickle.dumps(resnet18_state["conv1.weight"], protocol=2))
    with pytest.raises(CheckpointError, match=r"net\.pth"):
        import_checkpoint(path, arch="resnet18")
    assert not (tmp_path / "ran").exists()


def test_whole_pickled_model_is_refused_with_what_to_do(tmp_path):
    path = _saved(tmp_path, torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match=r"asks for torch\.nn\..*Sequential.*save model\.state_dict"):
        import_checkpoint(path, arch="resnet18")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {}, {"state_dict": {}}, {"layer1.x": 3, "fc.weight": "y"}])
def test_files_without_weights_are_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"net\.pth"):
        import_checkpoint(_saved(tmp_path, content), arch="resnet18")


def test_absent_file_is_named(tmp_path):
    for name in ("none.pth", "none.safetensors"):
        with pytest.raises(CheckpointError, match="No such file"):
            import_checkpoint(tmp_path / name, arch="resnet18")


class _Python2Pickler(pickle._Pickler):
    """Writes str as Python 2 did: SHORT_BINSTRING."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, text):
        self.write(pickle.SHORT_BINSTRING + bytes([len(text)]) + text.encode())
        self.memoize(text)

    dispatch[str] = save_str


def test_checkpoint_written_by_python_2_is_read(tmp_path, make_model):
    def dump(value, file, protocol):
        _Python2Pickler(file, protocol=protocol).dump(value)

    python2 = SimpleNamespace(Pickler=_Python2Pickler, dump=dump, __name__="pickle")
    model = make_model("resnet8", shortcut="option-a", has_policy=False)
    state = _akamaster_state(model, blocks_per_stage=1)
    path = _saved(tmp_path, dict(state), pickle_module=python2, _use_new_zipfile_serialization=False)
    assert b"U\x0cconv1.weight" in path.read_bytes()
    imported = import_checkpoint(path, arch="resnet8")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(imported(images), model(images))
