"""`bdtool train` from the command line: the three stages in a row, and what users get wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image

from bdtool.data.synthetic import synthetic_images
from bdtool.errors import UsageError
from bdtool.models.checkpoint_formats import (
    CIFAR10_LABELS,
    CIFAR10_MEAN,
    CIFAR10_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
)
from bdtool.models.store import load_model, read_spec
from bdtool.training.base_spec import base_spec
from bdtool.training.options import ImitateOptions

_QUICK = ("--epochs", 1, "--batch", 20, "--amp", "off")


@pytest.fixture
def base(bdtool: Callable[..., Result], npz: Path, tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    bdtool("train", "pretrain", "--arch", "resnet8", "--data", npz, *_QUICK, "-o", path)
    return path


def test_three_stages_make_a_model_that_exports(
    bdtool: Callable[..., Result], bdtool_json: Callable[..., Any], base: Path, npz: Path, tmp_path: Path
) -> None:
    policy, model = tmp_path / "policy.safetensors", tmp_path / "model.safetensors"
    bdtool("train", "curriculum", base, "--data", npz, *_QUICK, "-o", policy)
    events = tmp_path / "events"
    result = bdtool_json(
        "train", "finetune", policy, "--data", npz, "--val", npz, *_QUICK, "-o", model, "--tensorboard", events
    )
    assert set(result["figures"]) >= {"accuracy", "blocks_mean", "blocks_std", "flops_mean"}
    assert [epoch["epoch"] for epoch in result["epochs"]] == [1]
    assert list(events.iterdir())
    provenance = read_spec(model).provenance
    assert provenance["created_by"] == "bdtool train finetune"
    assert provenance["data"]["name"] == npz.name
    assert provenance["options"]["gamma"] == 5.0
    assert provenance["figures"] == result["figures"]
    assert provenance["start"]["start"]["created_by"] == "bdtool train pretrain"
    assert str(tmp_path) not in str(provenance), "no place of the machine it was made on"
    evaluated = bdtool_json("evaluate", model, "--data", npz)
    assert evaluated["accuracy"] == result["figures"]["accuracy"]
    bdtool("export", model, "-o", tmp_path / "bundle")


def test_pictures_of_another_size_are_scaled_or_taken_as_they_are(
    bdtool: Callable[..., Result], tmp_path: Path
) -> None:
    pixels = synthetic_images(20, height=48, width=48)
    for index, picture in enumerate(pixels):
        path = tmp_path / "pictures" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    model = tmp_path / "model.safetensors"
    words = ("train", "pretrain", "--arch", "resnet8", "--data", tmp_path / "pictures", *_QUICK, "-o", model)
    assert "got 48 x 48 pixels, the model takes 32 x 32. Pass --resize" in bdtool(*words, status=1).stderr
    bdtool(*words, "--resize")
    assert read_spec(model).preprocessing.height == 32
    bdtool(*words, "--size", 48)
    assert read_spec(model).preprocessing.height == read_spec(model).preprocessing.width == 48
    bdtool(*words, "--resize-to", 40)
    assert read_spec(model).preprocessing.resize == 40


def test_deepened_base_says_where_it_comes_from_and_is_trained_on(
    bdtool: Callable[..., Result], npz: Path, tmp_path: Path
) -> None:
    source, deeper, model = (tmp_path / f"{name}.safetensors" for name in ("source", "deeper", "model"))
    bdtool("train", "pretrain", "--arch", "resnet14", "--data", npz, *_QUICK, "-o", source)
    done = bdtool("train", "deepen", source, "--arch", "resnet26", "-o", deeper)
    assert done.stdout == f"{deeper}: resnet26, 12 blocks from the 6 of source.safetensors\n"
    bdtool("train", "finetune", deeper, "--policy", "random:6", "--data", npz, *_QUICK, "-o", model)
    created_by = [line.split()[3] for line in bdtool("inspect", model).stdout.splitlines() if "bdtool train" in line]
    assert created_by == ["finetune", "deepen", "pretrain"]


def test_base_for_other_classes_is_trained_on_and_deployed(
    bdtool: Callable[..., Result], bdtool_json: Callable[..., Any], tiny: Any, tmp_path: Path
) -> None:
    for index, picture in enumerate(synthetic_images(20, height=32, width=32)):
        path = tmp_path / "pictures" / ("cat", "owl")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    start, model = tmp_path / "start.safetensors", tmp_path / "model.safetensors"
    done = bdtool("train", "transfer", tiny.path, "--data", tmp_path / "pictures", "-o", start)
    told = "2 classes (cat, owl) in place of 10; the policy network was left out"
    assert done.stdout == f"{start}: {tiny.model.spec.arch}, {told}\n"
    bdtool("train", "finetune", start, "--policy", "all", "--data", tmp_path / "pictures", *_QUICK, "-o", model)
    bdtool("export", model, "-o", tmp_path / "bundle")
    [row] = bdtool_json("run", tmp_path / "bundle", tmp_path / "pictures" / "owl" / "1.png")["images"]
    assert row["label"] in ("cat", "owl")
    created_by = [line.split()[3] for line in bdtool("inspect", model).stdout.splitlines() if "bdtool train" in line]
    assert created_by[:2] == ["finetune", "transfer"]


def test_base_that_was_trained_for_a_mask_is_deployed_with_it(
    bdtool: Callable[..., Result], bdtool_json: Callable[..., Any], base: Path, npz: Path, picture: Path, tmp_path: Path
) -> None:
    model, bundle, packed = (tmp_path / name for name in ("model.safetensors", "bundle", "packed"))
    words = ("train", "finetune", base, "--policy", "101", "--data", npz, "--val", npz, *_QUICK, "-o", model)
    trained = bdtool_json(*words)
    bdtool("export", model, "-o", bundle)
    bdtool("pack", bundle, "-o", packed)
    for place in (model, bundle, packed):
        assert bdtool_json("inspect", place)["policy"] == "101"
        measured = bdtool_json("evaluate", place, "--data", npz)
        assert (measured["policy"], measured["accuracy"]) == ("101", trained["figures"]["accuracy"])
    for place in (bundle, packed):
        assert bdtool_json("run", place, picture)["images"][0]["policy"] == "101"
    profiled = bdtool_json("profile", bundle, "--data", npz, "--strategy", "path", "--duration", 0.05, "--warmup", 0)
    assert profiled["policy"] == "101"
    assert profiled["strategies"]["path"]["blocks_mean"] == 2
    bdtool("calibrate", bundle, "--data", npz, "--precision", "fp16")
    assert bdtool_json("inspect", bundle)["precisions"]["fp16"]["policy"] == "101"


def test_base_that_was_trained_for_a_mask_is_trained_on_for_it(
    bdtool: Callable[..., Result], base: Path, npz: Path, tmp_path: Path
) -> None:
    first, second, other = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "other"))
    bdtool("train", "finetune", base, "--policy", "101", "--data", npz, *_QUICK, "-o", first)
    bdtool("train", "finetune", first, "--data", npz, *_QUICK, "-o", second)
    assert (read_spec(second).mask, read_spec(second).provenance["options"]["policy"]) == ("101", "101")
    bdtool("train", "finetune", first, "--policy", "all", "--data", npz, *_QUICK, "-o", other)
    assert read_spec(other).mask is None
    words = ("train", "finetune", other, "--data", npz, *_QUICK, "-o", tmp_path / "none.safetensors")
    assert "policy 'learned': the model has no policy network" in bdtool(*words, status=2).stderr


def test_reward_is_shown_where_there_is_a_policy_network(
    bdtool: Callable[..., Result], tiny: Any, base: Path, npz: Path, tmp_path: Path
) -> None:
    words = ("--data", npz, *_QUICK, "-o", tmp_path / "model.safetensors")
    assert ", reward " in bdtool("train", "finetune", tiny.path, *words).stderr
    assert ", reward " in bdtool("train", "curriculum", base, *words).stderr
    for without in (("finetune", base, "--policy", "random:2"), ("pretrain", "--arch", "resnet8")):
        told = bdtool("train", *without, *words).stderr
        assert "epoch 1 (" in told
        assert "reward" not in told


def test_a_policy_network_sees_what_its_trunk_learned_from(
    bdtool: Callable[..., Result], base: Path, npz: Path, tmp_path: Path
) -> None:
    trunk, policy = tmp_path / "trunk.safetensors", tmp_path / "policy.safetensors"
    bdtool("train", "pretrain", "--arch", "resnet8", "--downscale", 2, "--data", npz, *_QUICK, "-o", trunk)
    bdtool("train", "curriculum", base, "--trunk", trunk, "--data", npz, *_QUICK, "-o", policy)
    assert [read_spec(path).downscale for path in (base, trunk, policy)] == [1, 2, 1]
    assert read_spec(policy).policy_downscale == 2
    assert "downscale:      base 2\n" in bdtool("inspect", trunk).stdout
    assert "downscale:      base 1, policy 2\n" in bdtool("inspect", policy).stdout
    message = bdtool(
        "train", "pretrain", "--arch", "resnet8", "--downscale", 33, "--data", npz, *_QUICK, "-o", trunk, status=2
    ).stderr
    assert "images of 32 x 32 pixels cannot be scaled down by 33" in message


def _class_folders(root: Path, *names: str) -> Path:
    pictures = synthetic_images(4 * len(names), height=32, width=32)
    for index, picture in enumerate(pictures):
        folder = root / names[index % len(names)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{index:02}.png")
    return root


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.mark.parametrize("names", [_DIGITS, ("cat", "bear", "bird")])
def test_pretraining_on_class_folders_learns_their_names(
    names: tuple[str, ...], bdtool: Callable[..., Result], bdtool_json: Callable[..., Any], tmp_path: Path
) -> None:
    """As many as CIFAR-10 has, or names of which some are CIFAR-10's: neither makes them its classes."""
    data, val = _class_folders(tmp_path / "train", *names), _class_folders(tmp_path / "val", *names[:2])
    words = ("train", "pretrain", "--arch", "resnet8", "--data", data, *_QUICK[:2], "--batch", 12, "--val", val)
    figures = bdtool_json(*words, "-o", tmp_path / "base.safetensors")["figures"]
    spec = read_spec(tmp_path / "base.safetensors")
    assert spec.labels == tuple(sorted(names))
    assert spec.n_classes == len(names)
    assert (spec.provenance["data"]["name"], spec.provenance["val"]) == ("train", "val")
    assert figures["accuracy"] == bdtool_json("evaluate", tmp_path / "base.safetensors", "--data", val)["accuracy"]
    others = _class_folders(tmp_path / "others", *(f"the {name}" for name in names))
    refused = bdtool(*words[:-1], others, "-o", tmp_path / "other.safetensors", status=1).stderr
    assert f"{others}: no class folder (the " in refused
    assert not (tmp_path / "other.safetensors").exists()


def test_classes_without_images_are_named(
    bdtool: Callable[..., Result], npz: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten classes of an .npz are a default."""
    with np.load(npz) as data:
        np.savez(tmp_path / "few.npz", x=data["x"], y=data["y"] % 4)
    output = (*_QUICK[:2], "--batch", 8, "-o", tmp_path / "base.safetensors")
    words = ("train", "pretrain", "--arch", "resnet8", *output, "--data")
    for data, told in (
        ([tmp_path / "few.npz"], "few.npz: no image of 6 of the model's 10 classes (4, 5, 6, 7, 8, ...)"),
        ([tmp_path / "few.npz", "--classes", 4], ""),
    ):
        caplog.clear()
        bdtool(*words, *data)
        assert caplog.text.count("no image of") == bool(told)
        assert told in caplog.text


def test_classes_have_the_names_of_their_data(tmp_path: Path) -> None:
    airplane, *rest = CIFAR10_LABELS
    folders = _class_folders(tmp_path / "all", airplane.upper(), "Truck", *rest[:-1])
    assert base_spec("resnet8", data=str(folders)).labels == CIFAR10_LABELS, "not in the order of these folders"
    few = str(_class_folders(tmp_path / "few", "cat", "ship"))
    assert base_spec("resnet8", data=few, n_classes=10).labels == CIFAR10_LABELS
    assert base_spec("resnet8", data=few).labels == ("cat", "ship")
    with pytest.raises(UsageError, match="few: got 2 class folders, 7 classes were asked for"):
        base_spec("resnet8", data=few, n_classes=7)
    ids = str(_class_folders(tmp_path / "ids", "n01440764", "n01443537"))
    assert base_spec("resnet18", data=ids).labels == ("n01440764", "n01443537")
    labels = base_spec("resnet18", data=ids, n_classes=1000).labels
    assert labels is not None
    assert labels[0] == "tench", "what ImageNet's ids stand for"
    assert base_spec("resnet8", data="cifar10:data").labels == CIFAR10_LABELS
    assert base_spec("resnet8", data="train.npz").labels is None
    assert base_spec("resnet18", data="train.npz").labels is None


def test_new_base_has_the_classes_and_colours_of_its_data() -> None:
    small, large = base_spec("resnet8", data="train.npz"), base_spec("resnet18", data="train.npz")
    assert (small.n_classes, small.preprocessing.mean, small.preprocessing.std) == (10, CIFAR10_MEAN, CIFAR10_STD)
    assert (large.n_classes, large.preprocessing.mean, large.preprocessing.std) == (1000, IMAGENET_MEAN, IMAGENET_STD)
    assert (small.shortcut, large.shortcut) == ("average-pool", "projection")
    assert base_spec("resnet8", data="cifar100:data").n_classes == 100
    asked = base_spec("resnet8", data="train.npz", n_classes=7, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert (asked.n_classes, asked.preprocessing.mean) == (7, (0.1, 0.2, 0.3))
    assert asked.preprocessing.std == (0.4, 0.5, 0.6)
    with pytest.raises(UsageError, match="std"):
        base_spec("resnet8", data="train.npz", std=(0.0, 1.0, 1.0))


def test_curriculum_leaves_the_base_alone(bdtool: Callable[..., Result], base: Path, npz: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.safetensors"
    bdtool("train", "curriculum", base, "--data", npz, *_QUICK, "-o", policy)
    before, after = load_model(base).base.state_dict(), load_model(policy).base.state_dict()
    assert all(np.array_equal(before[name].numpy(), after[name].numpy()) for name in before)


def test_curriculum_learns_every_block_unless_its_stages_are_given(
    bdtool: Callable[..., Result], bdtool_json: Callable[..., Any], base: Path, npz: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.safetensors"
    words = ("train", "curriculum", base, "--data", npz, *_QUICK, "-o", policy)
    refused = bdtool(*words, "--stage-epochs", 0.6, status=2)
    assert "which learn the last 1 of 3 blocks" in " ".join(refused.stderr.split())
    assert bdtool_json(*words)["epochs"][-1]["note"] == "last 3 of 3 blocks"
    assert read_spec(policy).provenance["options"]["stage_epochs"] is None


def test_imitate_makes_a_model_that_finetune_goes_on_with(
    bdtool: Callable[..., Result], base: Path, npz: Path, tmp_path: Path
) -> None:
    policy, model, figures = (tmp_path / name for name in ("policy.safetensors", "model.safetensors", "figures.json"))
    words = ["--fewest", 1, "--most", 3, "--judges", 32, "--batch", 3, "--data", npz, "--val", npz]
    done = bdtool("train", "imitate", base, "--trunk", base, *words, "--json", figures, "-o", policy)
    first, second = done.stdout.splitlines()
    assert first.endswith(f"policy.safetensors: resnet8, {ImitateOptions().epochs:g} epochs")
    assert "blocks on" in second
    assert [line.split(maxsplit=1)[1] for line in done.stderr.splitlines()] == [
        "masks",
        "losses and features",
        "policy network",
    ]
    assert 1 <= json.loads(figures.read_text())["figures"]["blocks_mean"] <= 3
    bdtool("train", "finetune", policy, "--freeze-policy", "--data", npz, *_QUICK, "-o", model)
    assert load_model(model).spec.provenance["start"]["created_by"] == "bdtool train imitate"


def test_imitate_refuses_what_it_would_not_do(
    bdtool: Callable[..., Result], base: Path, npz: Path, tmp_path: Path
) -> None:
    words = ["--data", npz, "--tensorboard", "logs", "-o", tmp_path / "p.safetensors"]
    refused = bdtool("train", "imitate", base, *words, status=2)
    assert "No such option" in refused.stderr
    assert "--tensorboard" in refused.stderr


def test_refused_run_leaves_no_event_file(bdtool: Callable[..., Result], tiny: Any, npz: Path, tmp_path: Path) -> None:
    words = ("--data", npz, "--batch", 21, "-o", tmp_path / "p.safetensors", "--tensorboard", tmp_path / "events")
    assert "expected at most the 20 images" in bdtool("train", "finetune", tiny.path, *words, status=2).stderr
    assert not (tmp_path / "events").exists()


def test_what_would_have_no_effect_is_refused(
    bdtool: Callable[..., Result], npz: Path, tiny: Any, tmp_path: Path
) -> None:
    words = ["--data", npz, "-o", tmp_path / "p.safetensors"]
    for policy in (["--policy", "first:2"], ["--freeze-policy"], ["--freeze-policy", "--policy", "learned:0.1-0.9"]):
        refused = bdtool("train", "finetune", tiny.path, *policy, "--lr", 0.1, "--alpha", 0.9, *words, status=2)
        assert "--lr, --alpha: no effect, as the policy network does not learn" in " ".join(refused.stderr.split())
        assert "--base-lr" in refused.stderr
    refused = bdtool("train", "finetune", tiny.path, "--policy", "first:2", "--gamma", 2, *words, status=2)
    assert "--gamma: no effect" in refused.stderr
    refused = bdtool("train", "imitate", tiny.path, "--hidden", 32, *words, status=2)
    assert "--hidden: no effect" in refused.stderr
    assert "Give a --trunk" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("stage", "words"), [("finetune", []), ("curriculum", []), ("curriculum", ["--trunk"]), ("imitate", ["--trunk"])]
)
def test_the_model_to_start_from_is_not_overwritten(
    bdtool: Callable[..., Result], base: Path, npz: Path, tmp_path: Path, stage: str, words: list[str]
) -> None:
    before = base.read_bytes()
    other = tmp_path / "other.safetensors"
    other.write_bytes(before)
    words = [str(other), words[0], str(base)] if words else [str(base)]
    link = tmp_path / "link.safetensors"
    link.symlink_to(base)
    refused = bdtool("train", stage, *words, "--data", npz, "-o", link, status=2)
    name = "--trunk" if len(words) > 1 else "MODEL"
    assert f"{link} is also given as {name}, and would be overwritten; choose another name" in refused.stderr
    assert base.read_bytes() == before


@pytest.mark.parametrize(("epochs", "shown"), [(0.5, "0.5 epochs"), (1, "1 epoch"), (2, "2 epochs")])
def test_epochs_are_shown_as_asked_for(
    bdtool: Callable[..., Result], npz: Path, tmp_path: Path, epochs: float, shown: str
) -> None:
    words = ["--batch", 20, "--amp", "off", "--epochs", epochs, "-o", tmp_path / "base.safetensors"]
    done = bdtool("train", "pretrain", "--arch", "resnet8", "--data", npz, *words)
    assert done.stdout.splitlines()[0].endswith(f"base.safetensors: resnet8, {shown}")


def test_curriculum_starts_from_a_trained_classifier(
    bdtool: Callable[..., Result], base: Path, npz: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.safetensors"
    bdtool("train", "curriculum", base, "--trunk", base, "--data", npz, *_QUICK, "--lr", 1e-9, "-o", policy)
    model = load_model(policy)
    assert model.policy is not None
    trunk, classifier = model.policy.trunk.state_dict(), load_model(base).base.state_dict()
    weights = [name for name in trunk if name.endswith("weight")]
    assert weights
    for name in weights:  # no step of this learning rate moves them further
        np.testing.assert_allclose(trunk[name].numpy(), classifier[name].numpy(), atol=1e-6)
    assert read_spec(policy).provenance["policy_trunk"]["created_by"] == "bdtool train pretrain"


@pytest.mark.parametrize("policy", ["first:2", "random:2", "distribute:2"])
def test_a_heuristic_trains_the_base_alone(
    policy: str, bdtool_json: Callable[..., Any], base: Path, npz: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model.safetensors"
    words = ["train", "finetune", base, "--policy", policy, "--data", npz, "--val", npz, *_QUICK, "-o", model]
    result = bdtool_json(*words)
    assert result["figures"]["blocks_mean"] == 2
    assert not read_spec(model).has_policy


def test_base_learns_from_a_teacher_and_says_so(
    bdtool: Callable[..., Result], base: Path, npz: Path, tmp_path: Path
) -> None:
    taught, words = tmp_path / "taught.safetensors", ("--policy", "first:2", "--data", npz, *_QUICK)
    bdtool("train", "finetune", base, "--teacher", base, *words, "-o", taught)
    assert read_spec(taught).provenance["teacher"]["created_by"] == "bdtool train pretrain"
    shown = bdtool("inspect", taught).stdout.splitlines()
    assert sum(line.startswith("  teacher:") for line in shown) == 1
    other = tmp_path / "other.safetensors"
    bdtool("train", "finetune", base, *words, "-o", other)
    assert not torch.equal(load_model(taught).base.head.linear.weight, load_model(other).base.head.linear.weight)


def test_same_seed_gives_the_same_file(bdtool: Callable[..., Result], base: Path, npz: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path in files:
        bdtool("train", "curriculum", base, "--data", npz, *_QUICK, "-o", path)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_gpu_that_torch_does_not_see_is_named(
    bdtool: Callable[..., Result], base: Path, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused = bdtool(
        "train", "curriculum", base, "--data", npz, "-o", tmp_path / "x.safetensors", "--device", "cuda:1", status=2
    )
    assert "'--device': cuda:1: torch sees 1 GPU here, counted from cuda:0" in refused.stderr


def test_what_users_get_wrong_is_named(
    bdtool: Callable[..., Result], base: Path, npz: Path, picture: Path, tmp_path: Path
) -> None:
    output = ("--data", npz, "-o", tmp_path / "x.safetensors")
    assert "no policy network" in bdtool("train", "finetune", base, *output, status=2).stderr
    assert (
        "the model has 3 blocks" in bdtool("train", "finetune", base, "--policy", "first:4", *output, status=2).stderr
    )
    assert (
        "torch sees no usable GPU" in bdtool("train", "curriculum", base, *output, "--device", "cuda", status=2).stderr
    )
    for device in ("tpu", "cuda0", "cuda:"):
        assert "expected cpu, cuda" in bdtool("train", "curriculum", base, *output, "--device", device, status=2).stderr
    ranges = {"seed": (-1, "x>=0"), "epochs": (0, "x>0"), "batch": (1, "x>=2"), "alpha": (0.3, "0.5<x<1")}
    for name, (value, range_) in ranges.items():
        told = bdtool("train", "curriculum", base, *output, f"--{name}", value, status=2).stderr
        assert f"'--{name}'" in told
        assert f"is not in the range {range_}." in told
    assert "expected at most the 20 images" in bdtool("train", "curriculum", base, *output, status=2).stderr
    unfinished = ("--data", npz, *_QUICK, "-o", tmp_path / "x.checkpoint")
    assert "hold unfinished runs" in bdtool("train", "curriculum", base, *unfinished, status=2).stderr
    unlabelled = ("--data", picture.parent, "-o", tmp_path / "x.safetensors")
    assert "no labels in" in bdtool("train", "curriculum", base, *unlabelled, status=1).stderr
    unmeasurable = (*output, "--val", picture.parent)
    assert ", by which to measure" in bdtool("train", "imitate", base, *unmeasurable, status=1).stderr
    assert not (tmp_path / "x.safetensors").exists()
