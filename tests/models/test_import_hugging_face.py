"""Importing what timm and transformers write: keys of transformers' ResNets, and directories of both libraries."""

import json
import re

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from bdtool.errors import CheckpointError, UsageError
from bdtool.models.checkpoints import import_checkpoint

_NAMES = {"conv": "convolution", "bn": "normalization"}


def _as_transformers(state):
    """Rename torchvision's tensors to what `ResNetForImageClassification.state_dict()` calls them."""
    return {_transformers_key(key): value for key, value in state.items()}


def _transformers_key(key):
    if key.startswith("fc."):
        return key.replace("fc", "classifier.1")
    if match := re.fullmatch(r"(conv|bn)1\.(\w+)", key):
        return f"resnet.embedder.embedder.{_NAMES[match[1]]}.{match[2]}"
    stage, i, rest = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", key).groups()
    place = f"resnet.encoder.stages.{int(stage) - 1}.layers.{i}"
    if match := re.fullmatch(r"downsample\.([01])\.(\w+)", rest):
        return f"{place}.shortcut.{'normalization' if match[1] == '1' else 'convolution'}.{match[2]}"
    kind, n, tensor = re.fullmatch(r"(conv|bn)(\d)\.(\w+)", rest).groups()
    return f"{place}.layer.{int(n) - 1}.{_NAMES[kind]}.{tensor}"


@pytest.fixture(scope="module")
def resnet18():
    return torchvision.models.resnet18(num_classes=3).state_dict()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_transformers_network_gives_the_logits_of_the_same_network(stir, tmp_path, arch):
    oracle = getattr(torchvision.models, arch)(num_classes=7).eval()
    stir(oracle)
    state = _as_transformers(oracle.state_dict())
    assert "resnet.encoder.stages.3.layers.1.layer.1.normalization.running_var" in state  # as the library has them
    assert "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight" in state
    save_file(state, tmp_path / "model.safetensors")
    model = import_checkpoint(tmp_path / "model.safetensors", arch=arch)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images), oracle(images), atol=1e-4, rtol=1e-4)
    assert model.spec.provenance["format"] == "transformers"
    assert model.spec.n_classes == 7


@pytest.mark.parametrize("wrapper", ["model.", "module.", "net.", "model.net."])
def test_transformers_network_may_be_wrapped(tmp_path, resnet18, wrapper):
    state = {f"{wrapper}{key}": value for key, value in _as_transformers(resnet18).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "net.ckpt")
    assert import_checkpoint(tmp_path / "net.ckpt", arch="resnet18").spec.provenance["format"] == "transformers"


def test_transformers_network_of_another_depth_is_told(tmp_path, resnet18):
    save_file(_as_transformers(resnet18), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit --arch resnet34 .*; it looks like --arch resnet18"):
        import_checkpoint(tmp_path / "model.safetensors", arch="resnet34")


CONVNEXT = {  # as the library writes it
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_processor_type": "ConvNextImageProcessor",
    "image_std": [0.2, 0.2, 0.1],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}
SQUEEZED = CONVNEXT | {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}}
del SQUEEZED["crop_pct"]
CUT = SQUEEZED | {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 192, "width": 192}}
TRANSFORMERS = {
    "model_type": "resnet",
    "hidden_act": "relu",
    "downsample_in_bottleneck": False,
    "downsample_in_first_stage": False,
    "id2label": {"0": "ant", "10": "cow", "1": "bee"},
}
TIMM = {
    "architecture": "resnet18",
    "num_classes": 3,
    "global_pool": "avg",
    "model_args": {"in_chans": 3, "num_classes": 3, "global_pool": "avg"},
    "label_names": ["ant", "bee", "cow"],
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "test_input_size": [3, 288, 288],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "crop_mode": "center",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1],
    },
}


@pytest.fixture
def directory(tmp_path, resnet18):
    """Return a function that makes a directory of a ResNet-18 with three classes and these JSON files."""

    def make(config=None, processor=None, *, keys="transformers", weights="model.safetensors"):
        state = _as_transformers(resnet18) if keys == "transformers" else resnet18
        where = tmp_path / "downloaded"
        where.mkdir()
        (save_file if weights.endswith(".safetensors") else torch.save)(state, where / weights)
        for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
            if content is not None:
                (where / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return where

    return make


def _input(path, **given):
    pre = import_checkpoint(path, arch="resnet18", **given).spec.preprocessing
    return pre.height, pre.width, pre.resize, pre.interpolation


def test_directory_of_transformers_says_labels_and_input(directory):
    labels = {"0": "ant", "2": "cow", "1": "bee"}
    spec = import_checkpoint(directory(TRANSFORMERS | {"id2label": labels}, CONVNEXT), arch="resnet18").spec
    assert spec.labels == ("ant", "bee", "cow")
    pre = spec.preprocessing
    assert (pre.mean, pre.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert (pre.height, pre.width, pre.resize, pre.interpolation) == (224, 224, 256, "bicubic")
    assert spec.provenance["source"] == "downloaded/model.safetensors"
    assert spec.provenance["input"] == "preprocessor_config.json"


def test_directory_of_timm_says_labels_and_input(directory):
    path = directory(TIMM, keys="torchvision", weights="pytorch_model.bin")
    spec = import_checkpoint(path).spec  # it is told apart from other architectures by its tensors
    assert (spec.arch, spec.labels) == ("resnet18", ("ant", "bee", "cow"))
    assert (spec.preprocessing.mean, spec.preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert _input(path) == (224, 224, 235, "bicubic")
    assert spec.provenance["source"] == "downloaded/pytorch_model.bin"
    assert spec.provenance["input"] == "config.json"


def test_timm_may_name_the_classes_beside_what_it_says_of_the_input(directory):
    settings = TIMM["pretrained_cfg"] | {"label_names": ["ant", "bee", "cow"]}
    config = {key: value for key, value in TIMM.items() if key != "label_names"} | {"pretrained_cfg": settings}
    assert import_checkpoint(directory(config, keys="torchvision")).spec.labels == ("ant", "bee", "cow")


def test_older_directory_of_timm_says_all_beside_the_architecture(directory):
    config = TIMM["pretrained_cfg"] | {"architecture": "resnet18", "num_classes": 3, "labels": ["ant", "bee", "cow"]}
    path = directory(config, keys="torchvision")
    spec = import_checkpoint(path).spec
    assert spec.labels == ("ant", "bee", "cow")
    assert (spec.preprocessing.mean, spec.preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert _input(path) == (224, 224, 235, "bicubic")


def test_timm_scales_bicubically_where_its_file_does_not_say_how(directory):
    settings = {key: value for key, value in TIMM["pretrained_cfg"].items() if key != "interpolation"}
    path = directory(TIMM | {"pretrained_cfg": settings}, keys="torchvision")
    assert _input(path) == (224, 224, 235, "bicubic")
    assert _input(path, interpolation="bilinear") == (224, 224, 235, "bilinear")


def test_timm_scales_to_an_eighth_more_where_its_file_does_not_say_how_far(directory):
    path = directory(TIMM | {"pretrained_cfg": {"input_size": [3, 224, 224]}}, keys="torchvision")
    assert _input(path) == (224, 224, 256, "bicubic")


def test_arguments_that_only_training_looks_at_are_harmless(directory):
    arguments = {"drop_rate": 0.1, "drop_path_rate": 0.1, "drop_block_rate": 0.1, "num_classes": 3}
    assert import_checkpoint(directory(TIMM | {"model_args": arguments}, keys="torchvision")).spec.arch == "resnet18"


def test_what_a_user_gives_wins_over_the_directory(directory):
    path = directory(TIMM, keys="torchvision")
    assert _input(path, size=288) == (288, 288, 302, "bicubic")  # 235 of 224, as of 288
    assert _input(path, size=288, resize=288) == (288, 288, 288, "bicubic")
    assert _input(path, interpolation="bilinear") == (224, 224, 235, "bilinear")
    spec = import_checkpoint(path, arch="resnet18", mean=(0.0, 0.0, 0.0), labels=("x", "y", "z")).spec
    assert (spec.preprocessing.mean, spec.preprocessing.std) == ((0.0, 0.0, 0.0), (0.2, 0.2, 0.1))
    assert import_checkpoint(path, std=(1.0, 1.0, 1.0)).spec.preprocessing.std == (1.0, 1.0, 1.0)
    assert spec.labels == ("x", "y", "z")


def test_what_a_user_gives_holds_where_the_directory_says_nothing(directory):
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "size": 64, "resize": 80, "interpolation": "bicubic"}
    pre = import_checkpoint(directory(), arch="resnet18", **given).spec.preprocessing
    assert (pre.mean, pre.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (pre.height, pre.width, pre.resize, pre.interpolation) == (64, 64, 80, "bicubic")


def test_resize_of_pictures_that_timm_does_not_cut_is_as_given_at_any_size(directory):
    path = directory(TIMM | {"pretrained_cfg": {"crop_mode": "border"}}, keys="torchvision")
    assert _input(path, size=64, resize=80) == (64, 64, 80, "bicubic")


def test_directory_of_transformers_around_timm(tmp_path, resnet18):
    save_file({f"timm_model.{key}": value for key, value in resnet18.items()}, tmp_path / "model.safetensors")
    config = TIMM | {"model_type": "timm_wrapper", "model_args": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert import_checkpoint(tmp_path).spec.labels == ("ant", "bee", "cow")
    assert _input(tmp_path) == (224, 224, 235, "bicubic")


def test_newer_weights_are_taken_where_there_are_both(directory):
    path = directory(weights="pytorch_model.bin")
    assert import_checkpoint(path, arch="resnet18").spec.provenance["source"] == "downloaded/pytorch_model.bin"
    state = torch.load(path / "pytorch_model.bin", weights_only=True)
    save_file(state, path / "model.safetensors")
    assert import_checkpoint(path, arch="resnet18").spec.provenance["source"] == "downloaded/model.safetensors"


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (CONVNEXT | {"size": 160, "resample": 2}, (160, 160, 182, "bilinear")),  # older files: a number
        ({"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224}, (224, 224, 256, "bilinear")),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 224}, (224, 224, 256, "bilinear")),
        (CONVNEXT | {"crop_pct": 1}, (224, 224, 224, "bicubic")),
        (CUT, (192, 192, 256, "bicubic")),
        (CUT | {"crop_size": 192}, (192, 192, 256, "bicubic")),
        (CONVNEXT | {"do_resize": False, "size": 160}, (224, 224, 256, "bicubic")),  # as where nothing is said
        ({}, (224, 224, 256, "bilinear")),
    ],
)
def test_image_processors(directory, processor, expected):
    assert _input(directory(TRANSFORMERS | {"id2label": {}}, processor)) == expected


@pytest.mark.parametrize("missing", ["image_mean", "image_std", "resample", "size"])
def test_processor_that_says_less_than_all_is_not_said_to_say_it(directory, missing):
    path = directory(None, {key: value for key, value in CONVNEXT.items() if key != missing})
    assert "input" not in import_checkpoint(path, arch="resnet18").spec.provenance


def test_processor_without_normalization(directory):
    pre = import_checkpoint(directory(None, CONVNEXT | {"do_normalize": False}), arch="resnet18").spec.preprocessing
    assert (pre.mean, pre.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("processor", "side"),
    [
        (SQUEEZED, 224),
        (SQUEEZED | {"size": 224}, 224),  # of most processors a number is a square
        (SQUEEZED | {"size": {"shortest_edge": 224}}, 224),  # not cut at all
        (CONVNEXT | {"size": {"shortest_edge": 384}}, 384),  # it squeezes what is that large
        (CUT | {"size": {"height": 256, "width": 256}}, 192),
        (CUT | {"size": 256}, 192),  # squeezed to a square, whose middle is taken
    ],
)
def test_pictures_scaled_in_another_way_need_a_word(directory, processor, side):
    path = directory(None, processor)
    message = rf"preprocessor_config\.json: size is .*: pictures are not scaled by .* Give --resize-to {side} to have"
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(path, arch="resnet18")
    assert _input(path, resize=side + 10) == (side, side, side + 10, "bicubic")


def test_interpolation_that_is_not_ours_needs_a_word(directory):
    path = directory(None, CONVNEXT | {"resample": 1})
    with pytest.raises(CheckpointError, match=r"resample is 1, .*; give --interpolation"):
        import_checkpoint(path, arch="resnet18")
    assert _input(path, interpolation="bilinear") == (224, 224, 256, "bilinear")


def test_names_of_classes_may_be_numbers(directory):
    path = directory(TRANSFORMERS | {"id2label": {"0": 7, "1": 8.5, "2": "nine"}})
    assert import_checkpoint(path, arch="resnet18").spec.labels == ("7", "8.5", "nine")


def test_classes_that_nobody_named_have_no_labels(directory):
    path = directory(TRANSFORMERS | {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}})
    assert import_checkpoint(path, arch="resnet18").spec.labels is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"config\.json is not JSON .*; download it again"),
        ("[]", r"config\.json holds a list, expected an object"),
        (TRANSFORMERS, r"id2label has the keys 0, 10, 1, expected 0 to 2"),
        (TRANSFORMERS | {"hidden_act": "silu"}, r"hidden_act is 'silu', expected 'relu'"),
        (TRANSFORMERS | {"downsample_in_bottleneck": True}, r"downsample_in_bottleneck is True, expected False"),
        (TRANSFORMERS | {"downsample_in_first_stage": True}, r"downsample_in_first_stage is True, expected False"),
        (TRANSFORMERS | {"model_type": "regnet"}, r"model_type is 'regnet', expected 'resnet'"),
        (TIMM | {"architecture": "resnetaa50"}, r"architecture is 'resnetaa50', which is another network"),
        (TIMM | {"global_pool": "max"}, r"global_pool is 'max', expected 'avg'"),
        (
            TIMM | {"model_args": {"act_layer": "silu"}},
            r"model_args has act_layer, which may change what the layers do",
        ),
        (
            TIMM | {"pretrained_cfg": {"input_size": [3, 224, 192]}},
            r"input_size is \[3, 224, 192\], expected 3 channels",
        ),
        (TIMM | {"pretrained_cfg": {"input_size": [1, 28, 28]}}, r"input_size is \[1, 28, 28\], expected 3 channels"),
        (TIMM | {"pretrained_cfg": {"input_size": [3, 0, 0]}}, r"input_size is \[3, 0, 0\], expected 3 channels"),
        (TIMM | {"pretrained_cfg": {"crop_pct": 0, "input_size": [3, 224, 224]}}, r"crop_pct is 0, expected a number"),
        (TIMM | {"pretrained_cfg": {"crop_mode": "border"}}, r"crop_mode is 'border': .* Give --resize-to N to have"),
        (TIMM | {"pretrained_cfg": {"mean": [0.5]}}, r"mean is \[0\.5\], expected three numbers"),
        (TIMM | {"pretrained_cfg": {"interpolation": "lanczos"}}, r"'lanczos', expected .*; give --interpolation"),
    ],
)
def test_configurations_of_other_networks_or_pictures_are_refused(directory, config, message):
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(directory(config, keys="torchvision"), arch="resnet18")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"do_rescale": False}, r"preprocessor_config\.json: do_rescale is False, expected True"),
        ({"rescale_factor": 1.0}, r"rescale_factor is 1\.0, expected 0\.0039"),
        ({"rescale_offset": True}, r"rescale_offset is True, expected False"),
        ({"resample": 1}, r"resample is 1, expected 2 \(bilinear\) or 3 \(bicubic\); give --interpolation"),
        ({"resample": [3]}, r"resample is \[3\], expected 2 \(bilinear\)"),
        ({"crop_pct": "x"}, r"crop_pct is 'x', expected a number from 0\.01 to 1"),
        ({"crop_pct": 1e-310}, r"crop_pct is 1e-310, expected a number from 0\.01 to 1"),
        ({"crop_pct": 1.25}, r"crop_pct is 1\.25, expected a number from 0\.01 to 1"),
        ({"size": {"longest_edge": 224}}, r"size is .*Give --resize-to N to have"),
        ({"size": {"shortest_edge": 0}}, r"size is .*Give --resize-to N to have"),
        ({"image_std": [0, 1, 1]}, r"mean and std need three values each, std above 0"),
    ],
)
def test_processors_of_other_pictures_are_refused(directory, processor, message):
    with pytest.raises((CheckpointError, UsageError), match=message):
        import_checkpoint(directory(None, CONVNEXT | processor), arch="resnet18")


def test_configuration_that_cannot_be_read_is_named(directory):
    path = directory()
    (path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: Is a directory"):
        import_checkpoint(path, arch="resnet18")


def test_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"is a directory without model\.safetensors or pytorch_model\.bin"):
        import_checkpoint(tmp_path, arch="resnet18")
