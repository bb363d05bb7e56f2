"""What a stage starts from, and what it leaves alone."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bdtool.errors import PolicyError, UsageError
from bdtool.evaluation import evaluate
from bdtool.inspection import tuned_for
from bdtool.models.model import BlockDropModel
from bdtool.models.store import load_model
from bdtool.torch_classifier import TorchClassifier
from bdtool.training.base_spec import base_spec
from bdtool.training.budget import shift_policy
from bdtool.training.options import CurriculumOptions, FinetuneOptions, ImitateOptions, PretrainOptions
from bdtool.training.place import TrainingPlace
from bdtool.training.policy_network import with_policy, without_policy
from bdtool.training.stages import Trained, computes_in_bfloat16, curriculum, finetune, imitate, pretrain
from bdtool.training.tasks import FinetuneTask, PretrainTask


def test_a_policy_network_that_is_taken_away_leaves_no_trace(random_model: Callable[..., BlockDropModel]) -> None:
    model = random_model("resnet8", policy_hidden=8, policy_downscale=2)
    assert without_policy(model).spec == random_model("resnet8", has_policy=False).spec


@pytest.mark.parametrize("epochs", [0.01, 0.5, 1, 3, 20])
@pytest.mark.parametrize("stage_blocks", [1, 3, 100])
@pytest.mark.parametrize("n_blocks", [3, 15, 54])
def test_curriculum_by_default_learns_all_blocks_from_half_of_the_run_on(
    epochs: float, stage_blocks: int, n_blocks: int
) -> None:
    options = CurriculumOptions(epochs=epochs, stage_blocks=stage_blocks)
    n_steps = options.n_steps(195)
    learned = [options.n_learned(step, steps_per_epoch=195, n_blocks=n_blocks) for step in range(n_steps)]
    assert learned == sorted(learned)
    assert min(learned[(n_steps - 1) // 2 :]) == n_blocks
    assert n_steps < 2 * n_blocks or learned[0] == min(stage_blocks, n_blocks), "it starts with the last blocks"


def test_curriculum_of_a_given_pace_learns_more_after_so_many_epochs() -> None:
    options = CurriculumOptions(epochs=4, stage_epochs=0.1, stage_blocks=3)
    learned = [options.n_learned(step, steps_per_epoch=100, n_blocks=15) for step in (0, 9, 10, 39, 40, 399)]
    assert learned == [3, 3, 6, 12, 15, 15]


def test_curriculum_that_ends_before_all_blocks_are_learned_is_refused(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    """Of 8 steps an epoch the last block's stage starts with step 16, one behind two epochs."""
    where = place(on_step=lambda report: pytest.fail("it trained first"))
    expected = (
        "stage_epochs 1, stage_blocks 1: got 2 epochs, which learn the last 2 of 3 blocks; .* "
        "Leave --stage-epochs out, .* or give --epochs 3"
    )
    with pytest.raises(UsageError, match=expected):
        curriculum(random_model("resnet8"), CurriculumOptions(epochs=2, batch=32, stage_epochs=1), where)
    CurriculumOptions(epochs=3, stage_epochs=1).check_all_learned(steps_per_epoch=8, n_blocks=3)


def test_new_policy_network_for_a_size_that_it_cannot_take_is_refused(
    random_model: Callable[..., BlockDropModel],
) -> None:
    base = random_model("resnet8", shortcut="option-a", size=33, has_policy=False)
    with pytest.raises(
        UsageError, match=r"policy\.trunk\.blocks\.1\.shortcut: an average-pool .* halves 33 x 33 pixels"
    ):
        with_policy(base, seed=0)


def test_frozen_policy_stays_and_the_base_learns_its_paths(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    start = random_model("resnet8", has_policy=True)
    before = copy.deepcopy(start.state_dict())
    trained = finetune(start, FinetuneOptions(epochs=1, batch=20, freeze_policy=True), place()).model.state_dict()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], trained[name])}
    assert changed == {"base"}


def test_thresholds_are_drawn_for_a_policy_network_that_stays(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    start = random_model("resnet8", has_policy=True)
    options = FinetuneOptions(epochs=1, batch=32, policy="learned:0.2-0.9", freeze_policy=True)
    trained = finetune(start, options, place())
    assert trained.model.policy is not None
    assert tuned_for(trained.model.spec.provenance) == "learned:0.2-0.9"
    with pytest.raises(UsageError, match=r"learned:0\.2-0\.9: the policy network does not learn; add --freeze-policy"):
        finetune(start, FinetuneOptions(policy="learned:0.2-0.9"), place())
    for policy, says in (("learned:0.9-0.2", "Write learned:0.2-0.9"), ("learned:0.2-2", "expected a threshold from")):
        with pytest.raises(PolicyError, match=says):
            finetune(start, FinetuneOptions(policy=policy, freeze_policy=True), place())


def test_base_learns_along_the_row_of_each_image(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace], tmp_path: Path
) -> None:
    """Images keep one block or all: a mean of 2 blocks in an epoch, whichever images a batch draws."""
    rows = np.ones((256, 3), dtype=bool)
    rows[::2, 1:] = False
    np.save(tmp_path / "rows.npy", rows)
    options = FinetuneOptions(epochs=1, batch=32, policy=str(tmp_path / "rows.npy"))
    trained = finetune(random_model("resnet8"), options, place(val=None))
    assert trained.epochs[0].blocks_mean == 2


def test_images_of_a_sample_keep_their_rows(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace], tmp_path: Path
) -> None:
    rows, drawn = np.zeros((256, 3), dtype=bool), place().train.take(64).rows
    rows[drawn, 0] = True
    np.save(tmp_path / "rows.npy", rows)
    options = FinetuneOptions(epochs=1, batch=32, policy=str(tmp_path / "rows.npy"), limit=64)
    assert finetune(random_model("resnet8"), options, place(val=None)).epochs[0].blocks_mean == 1


@pytest.mark.parametrize(
    ("policy", "mask"), [("101", "101"), ("first:2", "110"), ("all", None), ("111", None), ("random:2", None)]
)
def test_base_that_learned_along_one_path_runs_it_by_default(
    policy: str, mask: str | None, random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    for start in (random_model("resnet8"), random_model("resnet8", has_policy=False, mask="011")):
        trained = finetune(start, FinetuneOptions(epochs=0.25, batch=32, policy=policy), place())
        assert trained.model.spec.mask == load_model(place().output).spec.mask == mask
        by_default = evaluate(TorchClassifier(trained.model), place().val)
        assert by_default.policy == (mask or "all")
        assert mask is None or by_default.accuracy == trained.figures["accuracy"]


@pytest.mark.parametrize("stage", [curriculum, imitate])
def test_new_policy_network_takes_the_place_of_a_mask(
    stage: Callable[..., Trained], random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    options = {
        curriculum: CurriculumOptions(epochs=0.25, batch=64),
        imitate: ImitateOptions(epochs=1, batch=64, fewest=1, most=3, judges=32, limit=64),
    }[stage]
    model = stage(random_model("resnet8", has_policy=False, mask="011"), options, place(val=None)).model
    assert (model.spec.has_policy, model.spec.mask) == (True, None)


def test_rows_of_training_images_are_not_measured_on_others(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace], tmp_path: Path
) -> None:
    np.save(tmp_path / "rows.npy", np.ones((256, 3)))
    where = place(on_step=lambda report: pytest.fail("it trained first"))
    options = FinetuneOptions(epochs=1, policy=str(tmp_path / "rows.npy"))
    with pytest.raises(PolicyError, match=r"rows.npy: has a row for each training image, .* Leave --val out"):
        finetune(random_model("resnet8"), options, where)


def test_rows_for_other_images_are_refused(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace], tmp_path: Path
) -> None:
    options = FinetuneOptions(epochs=1, policy=str(tmp_path / "rows.npy"))
    for n_rows in (255, 257):
        np.save(tmp_path / "rows.npy", np.ones((n_rows, 3)))
        with pytest.raises(PolicyError, match=f"got {n_rows} rows for 256 training images"):
            finetune(random_model("resnet8"), options, place(val=None))


def test_heuristic_has_no_policy_network_to_freeze(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    with pytest.raises(UsageError, match="first:2: has no policy network to freeze"):
        finetune(
            random_model("resnet8", has_policy=True), FinetuneOptions(policy="first:2", freeze_policy=True), place()
        )


def test_new_policy_network_keeps_most_blocks(
    random_model: Callable[..., BlockDropModel], preprocessed: Callable[..., np.ndarray]
) -> None:
    model = with_policy(random_model("resnet8", has_policy=False), seed=0)
    with torch.no_grad():
        probability = model.keep_probability(torch.from_numpy(preprocessed(model, 16)))
    assert 0.7 < probability.mean() < 0.95


@pytest.mark.parametrize("stage", ["curriculum", "imitate"])
def test_new_policy_network_is_drawn_by_the_seed(
    stage: str, random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    start, quick, weights = random_model("resnet8", has_policy=False), {"epochs": 1, "batch": 16, "limit": 16}, []
    for seed in (0, 1):
        where = place(str(seed), val=None)
        model = (
            curriculum(start, CurriculumOptions(**quick, seed=seed, lr=1e-9), where)
            if stage == "curriculum"
            else imitate(start, ImitateOptions(**quick, seed=seed, judges=8), where)
        ).model
        assert model.policy is not None
        weights.append(model.policy.trunk.stem.conv.weight)
    assert (weights[0] - weights[1]).abs().max() > 0.01


@pytest.mark.parametrize("stage", ["pretrain", "curriculum", "finetune"])
def test_statistics_are_of_the_batches_that_were_trained_on(
    stage: str, random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    """Two epochs of two batches, and none of those of the measurement between them."""
    start, where, quick = random_model("resnet8"), place(), {"epochs": 2, "batch": 32, "limit": 64}
    run = {
        "pretrain": lambda: pretrain(start.spec, PretrainOptions(**quick), where),
        "curriculum": lambda: curriculum(start, CurriculumOptions(**quick), where),
        "finetune": lambda: finetune(start, FinetuneOptions(**quick), where),
    }
    trained = run[stage]().model.state_dict()
    counts = {
        name.partition(".")[0]: int(n) for name, n in trained.items() if name.endswith("stem.bn.num_batches_tracked")
    }
    expected = {"pretrain": {"base": 4}, "curriculum": {"base": 0, "policy": 4}, "finetune": {"base": 4, "policy": 4}}
    assert counts == expected[stage]


def test_optimizers_are_as_the_options_say(random_model: Callable[..., BlockDropModel]) -> None:
    model = random_model("resnet8")
    options = FinetuneOptions(lr=0.1, base_lr=0.2, momentum=0.5, weight_decay=0.3)
    sgd, adam = FinetuneTask(model, options, amp=False).optimizers()
    wanted = {"lr": 0.2, "momentum": 0.5, "nesterov": True, "weight_decay": 0.3}
    assert {name: sgd.defaults[name] for name in wanted} == wanted
    assert adam.defaults["lr"] == 0.1
    assert model.policy is not None
    for optimizer, network in ((sgd, model.base), (adam, model.policy)):
        assert optimizer.param_groups[0]["params"] == list(network.parameters())
    [plain] = PretrainTask(model, PretrainOptions(lr=0.4, momentum=0.0), amp=False).optimizers()
    assert (plain.defaults["lr"], plain.defaults["momentum"]) == (0.4, 0)


def test_augmentation_is_the_one_that_was_asked_for(place: Callable[..., TrainingPlace]) -> None:
    losses = set()
    for augment in ("crop", "flip"):
        options = PretrainOptions(epochs=1, batch=32, limit=32, augment=augment)
        spec = base_spec("resnet8", data="stripes.npz")
        losses.add(pretrain(spec, options, place(augment, val=None)).epochs[0].loss)
    assert len(losses) == 2


@pytest.mark.parametrize("blocks", [0.5, 1.75, 2.9])
def test_shifted_policy_keeps_so_many_blocks(
    blocks: float, random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    model, images = random_model("resnet8", has_policy=True), place().train
    classifier = TorchClassifier(model)
    pictures = images.take(images.n_images).images
    before = classifier.keep_probability(pictures)
    shift_policy(model, images, blocks)
    after = classifier.keep_probability(pictures)
    assert (after >= 0.5).sum(axis=1).mean() == pytest.approx(blocks, abs=0.01)  # two bits of 768 may tie
    shift = np.log(after / (1 - after)) - np.log(before / (1 - before))
    np.testing.assert_allclose(shift, shift[0, 0], atol=1e-4)


def test_policy_that_is_sure_of_everything_is_shifted_to_finite_numbers(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    model = random_model("resnet8", has_policy=True)
    assert model.policy is not None
    with torch.no_grad():
        model.policy.logit.weight.mul_(1e4)  # probabilities of exactly 0 and 1
    shift_policy(model, place().train, 1.5)
    assert model.policy.logit.bias.isfinite().all()


@pytest.mark.parametrize(("blocks", "has_policy"), [(3, True), (1, False)])
def test_shift_that_cannot_be_is_refused(
    blocks: float, has_policy: bool, random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    expected = "less than the model's 3" if has_policy else "only a policy network can be shifted"
    with pytest.raises(UsageError, match=expected):
        shift_policy(random_model("resnet8", has_policy=has_policy), place().train, blocks)


@pytest.mark.parametrize("stage", ["pretrain", "curriculum", "imitate", "finetune"])
def test_limit_leaves_all_other_images_unread(
    stage: str, random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    """Also by what judges masks, counts the blocks of a policy, and decides for each image."""
    source, read = place().train, set[int]()
    train = dataclasses.replace(source, image_at=lambda index: read.add(index) or source.image_at(index))
    start, where = random_model("resnet8"), place(train=train, val=None)
    quick = {"epochs": 1, "batch": 16, "limit": 40}
    run = {
        "pretrain": lambda: pretrain(start.spec, PretrainOptions(**quick), where),
        "curriculum": lambda: curriculum(start, CurriculumOptions(**quick), where),
        "imitate": lambda: imitate(start, ImitateOptions(**quick), where),
        "finetune": lambda: finetune(start, FinetuneOptions(**quick, freeze_policy=True, blocks=1.5), where),
    }
    assert run[stage]().model.spec.provenance["data"]["n_images"] == 40
    assert read == set(source.take(40).rows)


@pytest.mark.parametrize("has_amx", [True, False])
def test_bfloat16_is_taken_where_it_is_faster(has_amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert computes_in_bfloat16("auto", torch.device("cpu")) == has_amx
    assert computes_in_bfloat16("bf16", torch.device("cpu"))
    assert not computes_in_bfloat16("off", torch.device("cpu"))
