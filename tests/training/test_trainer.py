"""Long jobs: killed, interrupted, diverging, and gone on with."""

import dataclasses
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdtool.data.batches import ImageSource
from bdtool.data.sources import open_data
from bdtool.errors import BundleError, DataError, EngineError, TrainingError, UsageError
from bdtool.models.model import BlockDropModel, ModelSpec
from bdtool.models.parts import network_spec
from bdtool.models.state import meta_model
from bdtool.models.store import load_model
from bdtool.training.base_spec import base_spec
from bdtool.training.images import MemoryImages
from bdtool.training.options import CurriculumOptions, FinetuneOptions, PretrainOptions
from bdtool.training.place import TrainingPlace
from bdtool.training.stages import Trained, curriculum, finetune, pretrain
from bdtool.training.stopping import Interrupted
from bdtool.training.trainer import Report
from export.files import exclusive_lock

_FAST = {"epochs": 1.5, "batch": 32, "amp": "off"}  # 12 steps; the break comes in the middle of an epoch
_BREAK_AT = 5
_NAN, _INF = float("nan"), float("inf")
Stage = Callable[[BlockDropModel, TrainingPlace], Trained]

STAGES: dict[str, Stage] = {
    "pretrain": lambda start, place: pretrain(start.spec, PretrainOptions(**_FAST), place),
    "curriculum": lambda start, place: curriculum(start, CurriculumOptions(**_FAST, stage_epochs=0.3), place),
    "finetune": lambda start, place: finetune(start, FinetuneOptions(**_FAST), place),
    "heuristic": lambda start, place: finetune(start, FinetuneOptions(**_FAST, policy="random:2"), place),
}


def stop_at(number: int, action: Callable[[], None]) -> Callable[[Report], None]:
    return lambda report: action() if report.step == number else None


def die() -> None:
    raise RuntimeError("killed")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path).state_dict()


@pytest.mark.parametrize("name", STAGES)
def test_run_after_a_kill_ends_like_an_unbroken_one(
    name: str, place: Callable[..., TrainingPlace], random_model: Callable[..., BlockDropModel]
) -> None:
    stage = STAGES[name]
    unbroken = stage(random_model("resnet8"), place("unbroken"))
    with pytest.raises(RuntimeError, match="killed"):
        stage(random_model("resnet8"), place("broken", save_every_s=0, on_step=stop_at(_BREAK_AT, die)))
    assert not place("broken").output.exists()
    steps: list[int] = []
    broken = stage(
        random_model("resnet8"), place("broken", resume=True, on_step=lambda report: steps.append(report.step))
    )
    assert steps[0] == _BREAK_AT, "it went on from the last saved step, the one before the kill"
    assert not place("broken").checkpoint.exists()
    expected, got = tensors(place("unbroken").output), tensors(place("broken").output)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert [(e.loss, e.accuracy, e.blocks_mean, e.reward) for e in broken.epochs] == [
        (e.loss, e.accuracy, e.blocks_mean, e.reward) for e in unbroken.epochs
    ]


def test_time_of_an_epoch_holds_that_of_reading_its_images(
    place: Callable[..., TrainingPlace], random_model: Callable[..., BlockDropModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = MemoryImages.batch

    def slowly(images: MemoryImages, *given: Any) -> Any:
        time.sleep(0.2)
        return read(images, *given)

    monkeypatch.setattr(MemoryImages, "batch", slowly)
    [epoch] = pretrain(random_model("resnet8").spec, PretrainOptions(**_FAST | {"epochs": 1}), place()).epochs
    assert epoch.seconds > 0.2 * 7, "8 steps, whose images are read one batch after another"


@pytest.mark.parametrize("of", ["checkpoint", "MODEL"])
def test_what_a_kill_left_of_a_file_is_removed(of: str, place: Callable[..., TrainingPlace]) -> None:
    where = place()
    left = where.output.with_name(f".{where.checkpoint.name if of == 'checkpoint' else where.output.name}.abcd1234.tmp")
    left.write_bytes(b"half a file")
    with exclusive_lock(where.output.with_name(f".{where.output.name}.lock"), purpose="the other run"):
        with pytest.raises(BundleError, match="already running"), where.reserved():
            pass
        assert left.exists(), "it may be of the run that is at work"
    with where.reserved():
        assert not left.exists()


@pytest.mark.parametrize("n_measured", [0, 1])
def test_an_epoch_that_could_not_be_measured_is_not_lost(
    n_measured: int, place: Callable[..., TrainingPlace], random_model: Callable[..., BlockDropModel]
) -> None:
    run = functools.partial(curriculum, random_model("resnet8", has_policy=False), CurriculumOptions(**_FAST))
    unbroken = run(place("unbroken"))
    assert [epoch.note for epoch in unbroken.epochs] == ["last 3 of 3 blocks"] * 2
    measured: list[int] = []
    failing = dataclasses.replace(place().val, image_at=failing_image(place().val, after=n_measured * 256))
    with pytest.raises(DataError, match="a damaged picture"):
        run(place(val=failing, on_epoch=lambda epoch: measured.append(epoch.epoch)))
    steps: list[int] = []
    again = place(
        resume=True,
        on_step=lambda report: steps.append(report.step),
        on_epoch=lambda epoch: measured.append(epoch.epoch),
    )
    broken = run(again)
    assert steps == list(range(9, 13))[n_measured * 4 :], "no step was done twice"
    assert measured == [1, 2]
    assert [dataclasses.replace(epoch, seconds=0) for epoch in broken.epochs] == [
        dataclasses.replace(epoch, seconds=0) for epoch in unbroken.epochs
    ]
    assert again.output.read_bytes() == place("unbroken").output.read_bytes()


def failing_image(source: ImageSource, *, after: int) -> Callable[[int], np.ndarray]:
    """Return an `image_at` that gives so many images, and no more."""
    given = itertools.count()

    def image_at(index: int) -> np.ndarray:
        if next(given) >= after:
            raise DataError("a damaged picture")
        return source.image_at(index)

    return image_at


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first(number: signal.Signals, place: Callable[..., TrainingPlace]) -> None:
    options = PretrainOptions(**_FAST)
    spec = _spec()
    resumed: list[str] = []
    asked = place(on_resume=resumed.append, on_step=stop_at(_BREAK_AT, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(Interrupted, match=f"after step {_BREAK_AT} of 12; the same command with --resume"):
        pretrain(spec, options, asked)
    assert not resumed
    steps: list[int] = []
    again = place(
        resume=True,
        on_step=lambda report: steps.append(report.step),
        on_resume=resumed.append,
    )
    pretrain(spec, options, again)
    assert steps == list(range(_BREAK_AT + 1, 13))
    assert resumed == [f"step {_BREAK_AT} of 12"]


def test_a_finished_run_is_not_trained_again_by_resume(place: Callable[..., TrainingPlace]) -> None:
    pretrain(_spec(), PretrainOptions(**_FAST), place(resume=True))  # nothing is there yet: it starts
    before = place().output.read_bytes()
    with pytest.raises(UsageError, match=r"nothing to go on with: .*model.safetensors is there, and no unfinished run"):
        pretrain(_spec(), PretrainOptions(**_FAST), place(resume=True))
    assert place().output.read_bytes() == before


@pytest.mark.parametrize("n_measured", [0, 1], ids=["first epoch", "last epoch"])
def test_a_signal_breaks_a_measurement_off(n_measured: int, place: Callable[..., TrainingPlace]) -> None:
    source = place().val
    given = itertools.count()

    def image_at(index: int) -> np.ndarray:
        if next(given) == n_measured * source.n_images + 5:
            os.kill(os.getpid(), signal.SIGINT)
        return source.image_at(index)

    measured: list[int] = []
    val = dataclasses.replace(source, image_at=image_at)
    asked = place(val=val, on_epoch=lambda epoch: measured.append(epoch.epoch))
    with pytest.raises(Interrupted, match=f"after step {(8, 12)[n_measured]} of 12; the same command with --resume"):
        pretrain(_spec(), PretrainOptions(**_FAST), asked)
    assert measured == [1][:n_measured]
    assert not asked.output.exists()
    trained = pretrain(_spec(), PretrainOptions(**_FAST), place(resume=True))
    assert [epoch.validation["n_images"] for epoch in trained.epochs] == [source.n_images] * len(trained.epochs)


def test_each_epoch_is_measured_once(place: Callable[..., TrainingPlace]) -> None:
    source = place().val
    indices: list[int] = []
    val = dataclasses.replace(source, image_at=lambda index: indices.append(index) or source.image_at(index))
    trained = pretrain(_spec(), PretrainOptions(**_FAST), place(val=val))
    assert len(indices) == len(trained.epochs) * source.n_images
    assert trained.figures == trained.epochs[-1].validation != {}


def test_a_killed_process_loses_at_most_what_it_did_since_the_last_save(stripes: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    command = [sys.executable, "-m", "bdtool", "train", "pretrain", "--arch", "resnet8", "--data", str(stripes)]
    command += ["-o", str(model), "--epochs", "500", "--batch", "32", "--save-every", "0", "--threads", "1"]
    checkpoint = tmp_path / "model.safetensors.checkpoint"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    state = torch.load(checkpoint, weights_only=True)
    assert state["step"] >= 1
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "holds an unfinished run: add --resume" in refused.stderr
    assert not model.exists()


def test_models_that_differ_in_their_suffix_have_checkpoints_of_their_own(
    place: Callable[..., TrainingPlace], tmp_path: Path
) -> None:
    names = ("net", "net.v1", "net.v2", "net.safetensors")
    assert len({place(output=tmp_path / name).checkpoint for name in names}) == len(names)


def test_a_model_is_not_named_like_a_checkpoint(place: Callable[..., TrainingPlace], tmp_path: Path) -> None:
    for name in ("net.safetensors.checkpoint", "net.safetensors.CHECKPOINT"):
        with pytest.raises(
            UsageError, match=r"files that end in .checkpoint hold unfinished runs; .* net.safetensors$"
        ):
            place(output=tmp_path / name)


@pytest.mark.parametrize("second", STAGES)
def test_a_second_run_into_the_same_model_is_refused_while_one_is_at_work(
    second: str, place: Callable[..., TrainingPlace], random_model: Callable[..., BlockDropModel]
) -> None:
    asked = place(on_step=stop_at(_BREAK_AT, lambda: STAGES[second](random_model("resnet8"), place(resume=True))))
    with pytest.raises(BundleError, match=r"training into .*model.safetensors is already running in another process"):
        pretrain(_spec(), PretrainOptions(**_FAST), asked)
    assert not asked.output.exists()
    pretrain(_spec(), PretrainOptions(**_FAST), place())


def test_checkpoint_of_other_options_is_refused_by_name(place: Callable[..., TrainingPlace]) -> None:
    spec = _spec()
    with pytest.raises(RuntimeError):
        pretrain(spec, PretrainOptions(**_FAST), place(save_every_s=0, on_step=stop_at(_BREAK_AT, die)))
    with pytest.raises(UsageError, match="add --resume"):
        pretrain(spec, PretrainOptions(**_FAST), place())
    with pytest.raises(TrainingError, match=r"asked for otherwise \(lr was 0\.1, is 0\.2\)"):
        pretrain(spec, PretrainOptions(**_FAST, lr=0.2), place(resume=True))


@pytest.mark.parametrize("after", ["", " "])
def test_checkpoint_along_other_paths_is_refused_though_their_file_has_the_same_name(
    place: Callable[..., TrainingPlace], random_model: Callable[..., BlockDropModel], tmp_path: Path, after: str
) -> None:
    rows = tmp_path / "rows.npy"
    options, start = FinetuneOptions(**_FAST, policy=f"{rows}{after}"), random_model("resnet8")
    np.save(rows, np.array([1, 0, 1]))
    with pytest.raises(RuntimeError):
        finetune(start, options, place(save_every_s=0, on_step=stop_at(_BREAK_AT, die)))
    np.save(rows, np.array([1, 1, 0]))
    with pytest.raises(TrainingError, match=r"asked for otherwise \(policy_file was"):
        finetune(start, options, place(resume=True))


def test_checkpoint_of_another_network_is_refused(place: Callable[..., TrainingPlace]) -> None:
    with pytest.raises(RuntimeError):
        pretrain(_spec(), PretrainOptions(**_FAST), place(save_every_s=0, on_step=stop_at(_BREAK_AT, die)))
    colours = dataclasses.replace(_spec().preprocessing, mean=(0.5, 0.5, 0.5))
    others = {
        "classes was 10, is": dataclasses.replace(_spec(), labels=tuple("abcdefghij")),
        "downscale was 1, is 2": dataclasses.replace(_spec(), downscale=2),
        "mean was": dataclasses.replace(_spec(), preprocessing=colours),
        "arch was 'resnet8', is 'resnet14'": base_spec("resnet14", data="stripes.npz"),
    }
    for named, other in others.items():
        with pytest.raises(TrainingError, match=rf"asked for otherwise \({named}"):
            pretrain(other, PretrainOptions(**_FAST), place(resume=True))


def test_damaged_checkpoint_is_refused(place: Callable[..., TrainingPlace]) -> None:
    place().checkpoint.write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(TrainingError, match="not a whole checkpoint of a run"):
        pretrain(_spec(), PretrainOptions(**_FAST), place(resume=True))


def test_infinite_loss_stops_with_the_step_named(
    place: Callable[..., TrainingPlace], random_model: Callable[..., BlockDropModel]
) -> None:
    start = random_model("resnet8")
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+ of 12; try a lower learning rate"):
        finetune(start, FinetuneOptions(**_FAST, base_lr=1e30, schedule="constant"), place())
    assert not place().output.exists()


@pytest.mark.parametrize("saved_before", [False, True])
def test_run_that_diverges_leaves_no_checkpoint_of_it(
    saved_before: bool, place: Callable[..., TrainingPlace], random_model: Callable[..., BlockDropModel]
) -> None:
    """With such a checkpoint the same command was refused for it, and --resume led to the same end for good."""

    def spoil() -> None:
        next(model.parameters()).data[0] = float("inf")

    model = random_model("resnet8", has_policy=True)
    options = FinetuneOptions(**_FAST, policy="learned")
    where = place(on_step=stop_at(_BREAK_AT, spoil), save_every_s=0 if saved_before else 120)
    if not saved_before:
        options = dataclasses.replace(options, epochs=_BREAK_AT / 8)
    with pytest.raises(TrainingError, match=r"NaN or infinite weights after step \d+ of .*; try a lower learn") as said:
        finetune(model, options, where)
    assert where.checkpoint.exists() == saved_before
    assert (f"remove {where.checkpoint} first, as --resume leads there again" in str(said.value)) == saved_before
    assert not where.output.exists()


def test_epoch_that_measures_no_numbers_says_how_to_start_anew(
    place: Callable[..., TrainingPlace], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise EngineError("the logits of image 0 are not finite")

    monkeypatch.setattr("bdtool.training.stages.evaluate", fail)
    where = place()
    with pytest.raises(
        TrainingError, match=r"--val cannot be measured: the logits .*; try a lower .*; remove .* first"
    ):
        pretrain(_spec(), PretrainOptions(**_FAST), where)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_pretraining_learns_the_same_names(place: Callable[..., TrainingPlace]) -> None:
    trained = pretrain(_spec(), PretrainOptions(**{**_FAST, "epochs": 3}, compile=True), place())
    assert trained.epochs[-1].loss < trained.epochs[0].loss
    assert load_model(place().output).state_dict().keys() == trained.model.state_dict().keys()


def test_batch_larger_than_the_data_is_refused(place: Callable[..., TrainingPlace]) -> None:
    with pytest.raises(UsageError, match="batch 512: expected at most the 256 images"):
        pretrain(_spec(), PretrainOptions(epochs=1, batch=512), place())


def test_images_without_labels_are_refused(place: Callable[..., TrainingPlace], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((40, 32, 32, 3), dtype=np.uint8))
    spec = _spec()
    source = open_data(str(tmp_path / "x.npz"), network=network_spec(meta_model(spec)))
    with pytest.raises(DataError, match=r"no labels in .*; training needs them"):
        pretrain(spec, PretrainOptions(**_FAST), place(train=source))


def test_images_to_measure_on_without_labels_are_refused_before_training(place: Callable[..., TrainingPlace]) -> None:
    unlabelled = dataclasses.replace(place().train, labels=None)
    with pytest.raises(DataError, match=r"no labels in .*, by which to measure; give --val"):
        place(val=unlabelled)


def _spec() -> ModelSpec:
    return base_spec("resnet8", data="stripes.npz")
