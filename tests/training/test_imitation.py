"""A policy network that gives harder images more blocks, from what the base's own losses show."""

import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bdtool.errors import BundleError, UsageError
from bdtool.models.model import BlockDropModel
from bdtool.models.policy import PolicyNetwork
from bdtool.models.store import load_model
from bdtool.runtime.preprocess import preprocess
from bdtool.torch_classifier import TorchClassifier
from bdtool.training import nested
from bdtool.training.distributed import Group
from bdtool.training.imitation import Imitation
from bdtool.training.nested import MaskSearch, blocks_by_rank, path_losses
from bdtool.training.options import ImitateOptions
from bdtool.training.place import TrainingPlace
from bdtool.training.policy_head import HeadFit
from bdtool.training.stages import imitate
from bdtool.training.trainer import schedule_factor


@pytest.mark.parametrize("at_once", [64, 5])
def test_the_block_missed_least_is_dropped_next(
    at_once: int,
    random_model: Callable[..., BlockDropModel],
    preprocessed: Callable[..., np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one piece, or in three, of 5, 5 and 2 images."""
    monkeypatch.setattr(nested, "_AT_ONCE", at_once)
    model = random_model("resnet14")
    images, labels = torch.from_numpy(preprocessed(model, 12)), torch.arange(12) % 10
    search = MaskSearch(model.base, images, labels, fewest=3)
    while not search.is_over:
        search.advance()
    masks = search.masks
    assert masks.sum(dim=1).tolist() == [6, 5, 4, 3]
    for larger, smaller in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()
        losses = {}
        for k in larger.nonzero().flatten().tolist():
            keep = larger.clone()
            keep[k] = False
            with torch.no_grad():
                losses[k] = float(F.cross_entropy(model(images, keep.expand(12, -1)), labels))
        assert (larger & ~smaller).nonzero().item() == min(losses, key=lambda k: losses[k])


def test_many_images_run_in_pieces(
    random_model: Callable[..., BlockDropModel],
    preprocessed: Callable[..., np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All the images that judge masks would take gigabytes of a network of ImageNet."""
    model, seen = random_model("resnet8"), []
    model.base.stem.register_forward_pre_hook(lambda stem, inputs: seen.append(len(inputs[0])))
    images, labels = torch.from_numpy(preprocessed(model, 8)), torch.arange(8)
    mask = torch.tensor([True, True, False])
    whole = path_losses(model.base, images, labels, mask)
    monkeypatch.setattr(nested, "_AT_ONCE", 3)
    torch.testing.assert_close(path_losses(model.base, images, labels, mask), whole)
    assert seen == [8, 3, 3, 2]
    in_pieces = nested.losses_without_each(model.base, images, labels, mask)
    assert seen == [8, 3, 3, 2, 3, 3, 2]  # once for all blocks
    expected = [path_losses(model.base, images, labels, torch.tensor(one)).mean() for one in ([0, 1, 0], [1, 0, 0])]
    torch.testing.assert_close(in_pieces, torch.stack(expected))


def fit_head(policy: PolicyNetwork, features: torch.Tensor, targets: torch.Tensor, options: ImitateOptions) -> None:
    fit = HeadFit(policy, features, targets, options)
    while not fit.is_over:
        fit.advance()


@pytest.mark.parametrize("n_hidden", [0, 16])
def test_a_feature_that_hardly_varied_decides_nothing(n_hidden: int) -> None:
    """As of a channel that fires on none of the training images."""
    features = torch.randn(2, 400, 64, generator=torch.Generator().manual_seed(0))
    features[..., 5] = 0
    features[..., 6] *= 1e-6
    targets = (features[0, :, :2] > 0).float()
    policy = PolicyNetwork("cifar", n_blocks=2, n_hidden=n_hidden)
    fit_head(policy, features, targets, ImitateOptions(epochs=5, batch=100, hidden=n_hidden))
    first = policy.logit if policy.hidden is None else policy.hidden
    assert first.weight[:, 5:7].abs().max() == 0
    assert 0 < first.weight.abs().max() < 100


@pytest.mark.parametrize("n_hidden", [0, 16])
def test_trained_layers_go_on_from_what_they_say(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace], n_hidden: int
) -> None:
    start, where = random_model("resnet8", policy_hidden=n_hidden), place()
    images = where.train.take(32).images
    before = TorchClassifier(start).keep_probability(images)
    options = ImitateOptions(epochs=1, batch=256, lr=1e-9, fewest=1, most=3, judges=8, hidden=n_hidden)
    trained = imitate(start, options, where)
    np.testing.assert_allclose(TorchClassifier(trained.model).keep_probability(images), before, atol=1e-4)


def test_layers_learn_at_the_scheduled_rate_from_what_the_seed_draws() -> None:
    features = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    targets = (features[0, :, :2] > 0).float()
    start, weights = PolicyNetwork("cifar", n_blocks=2), []
    for seed in (0, 1):
        policy, rates = copy.deepcopy(start), []
        fit = HeadFit(policy, features, targets, ImitateOptions(epochs=2, batch=20, lr=0.01, seed=seed))
        while not fit.is_over:
            rates.append(fit.state_dict()["optimizer"]["param_groups"][0]["lr"])
            fit.advance()
        assert rates == pytest.approx([0.01 * schedule_factor("cosine", 4)(step) for step in range(4)])
        weights.append(policy.logit.weight)
    assert not torch.equal(*weights)


def test_flipped_images_are_learned_from_too() -> None:
    features = torch.zeros(2, 400, 64)
    features[1] = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))  # only these tell the images apart
    targets = (features[1, :, :2] > 0).float()
    policy = PolicyNetwork("cifar", n_blocks=2)
    fit_head(policy, features, targets, ImitateOptions(epochs=50, batch=100, lr=0.03))
    assert ((policy.logit(features[1]) > 0) == targets.bool()).float().mean() > 0.9


def test_survey_is_of_each_image_as_it_is_and_flipped(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    model, images = random_model("resnet8"), place().train.drawn(20)
    imitation = Imitation(model, images, ImitateOptions(fewest=1, most=3, judges=8))
    while imitation.name != "policy network":
        imitation.advance()
    found, batch = imitation.state_dict()["parts"][1], next(images.batches(20))
    pixels = torch.from_numpy(preprocess(batch.images, model.spec.preprocessing))
    losses = path_losses(model.base, pixels, torch.from_numpy(batch.labels), imitation.masks[-1])
    torch.testing.assert_close(found["losses"], losses, atol=1e-4, rtol=1e-4)
    assert model.policy is not None
    with torch.no_grad():
        features = torch.stack([model.policy.features(x) for x in (pixels, pixels.flip(3))])
    torch.testing.assert_close(found["features"], features, atol=1e-4, rtol=1e-4)


def test_policy_network_gives_harder_images_more_blocks(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    """Classes of these pictures are as hard as the random base makes them, and easily told apart."""
    model, images = random_model("resnet8"), place().train
    imitation = Imitation(model, images, ImitateOptions(epochs=60, batch=64, fewest=1, most=3, judges=32))
    while not imitation.is_over:
        imitation.advance()
    losses = imitation.state_dict()["parts"][1]["losses"].numpy()
    n_kept = TorchClassifier(model).decide(images.take(256).images).sum(axis=1)
    order = losses.argsort()
    assert n_kept[order[-100:]].mean() > n_kept[order[:100]].mean() + 0.3


def test_losses_are_those_of_each_image_alone(
    random_model: Callable[..., BlockDropModel], preprocessed: Callable[..., np.ndarray]
) -> None:
    model = random_model("resnet8")
    images, labels = torch.from_numpy(preprocessed(model, 5)), torch.tensor([3, 1, 4, 1, 5])
    mask = torch.tensor([True, False, True])
    with torch.no_grad():
        alone = [F.cross_entropy(model(x[None], mask[None]), y[None]) for x, y in zip(images, labels, strict=True)]
    torch.testing.assert_close(path_losses(model.base, images, labels, mask), torch.stack(alone))


def test_harder_images_get_more_blocks() -> None:
    losses = np.array([0.9, 0.1, 0.5, 0.3, 0.2, 0.8, 0.4, 0.6, 0.7, 0.0])
    assert blocks_by_rank(losses, fewest=5, most=9).tolist() == [9, 5, 7, 5, 5, 9, 7, 9, 9, 5]


def test_a_hidden_layer_learns_what_a_linear_one_cannot() -> None:
    """A picture is hard where two features are alike, as two classes are: no linear function of both says so."""
    generator = torch.Generator().manual_seed(0)
    features = 3 + torch.randn(2, 4000, 64, generator=generator)
    features[1] = features[0]
    hard = ((features[0, :, 0] - 3) * (features[0, :, 1] - 3) > 0).float()
    targets = torch.stack([torch.ones(4000), hard], dim=1)
    correct = {}
    for n_hidden in (0, 32):
        policy = PolicyNetwork("cifar", n_blocks=2, n_hidden=n_hidden)
        fit_head(policy, features, targets, ImitateOptions(epochs=30, batch=200, hidden=n_hidden))
        with torch.no_grad():
            hidden = features[0] if policy.hidden is None else F.relu(policy.hidden(features[0]))
            keep = policy.logit(hidden) > 0
        assert keep[:, 0].all()
        correct[n_hidden] = float((keep[:, 1] == hard.bool()).float().mean())
    assert correct[32] > 0.9
    assert correct[0] < 0.6


def test_only_the_layers_behind_the_trunk_learn(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    start, where = random_model("resnet14", has_policy=False), place()
    before = copy.deepcopy(start.base.state_dict())
    trunk = random_model("resnet8", has_policy=False)
    options = ImitateOptions(epochs=20, batch=64, fewest=2, most=5, hidden=16, judges=64)
    trained = imitate(start, options, where, trunk=trunk)
    model = load_model(where.output)
    assert model.spec == trained.model.spec
    assert model.spec.policy_hidden == 16
    assert model.spec.provenance["created_by"] == "bdtool train imitate"
    masks = model.spec.provenance["masks"]
    assert {int(n): bits.count("1") for n, bits in masks.items()} == {n: n for n in range(2, 7)}
    assert model.policy is not None
    for name, tensor in model.base.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in model.policy.trunk.state_dict().items():
        assert torch.equal(tensor, trunk.base.state_dict()[name]), name
    assert 2 <= trained.figures["blocks_mean"] <= 5
    assert trained.figures["blocks_std"] > 0.5


def test_a_policy_without_hidden_layer_is_fitted_too(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    options = ImitateOptions(epochs=2, batch=64, fewest=1, most=3, hidden=0, judges=32, limit=128)
    shares: list[float] = []
    where = place(on_progress=lambda share, text: shares.append(share))
    trained = imitate(random_model("resnet8", has_policy=False), options, where)
    assert trained.model.spec.policy_hidden == 0
    assert trained.model.spec.provenance["data"]["n_images"] == 128
    assert shares[0] == 0
    assert {0.1, 0.2, 0.9} <= {round(share, 6) for share in shares}  # a step of each part: 2 masks, 4 steps of Adam
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


@pytest.mark.parametrize(("batch", "warns"), [(65, True), (64, False)])
def test_steps_too_few_to_learn_in_are_told_before_the_search(
    batch: int,
    warns: bool,
    random_model: Callable[..., BlockDropModel],
    place: Callable[..., TrainingPlace],
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[bool] = []
    where = place(on_progress=lambda share, text: told.append("are 98 steps" in caplog.text))
    options = ImitateOptions(epochs=100, batch=batch, fewest=3, most=3, judges=8, limit=64)
    imitate(random_model("resnet8"), options, where)
    assert told[0] == warns
    assert ("Give a smaller --batch or more --epochs" in caplog.text) == warns


def test_all_images_may_be_given_all_blocks(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    options = ImitateOptions(epochs=20, batch=64, fewest=3, most=3, judges=8, limit=64)
    trained = imitate(random_model("resnet8", has_policy=False), options, place())
    assert trained.model.spec.provenance["masks"] == {"3": "111"}
    assert trained.figures["blocks_mean"] == 3


def test_a_second_run_into_the_same_model_is_refused_while_one_is_at_work(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    start, options = random_model("resnet8"), ImitateOptions(epochs=1, fewest=1, most=3, judges=32, limit=64)
    where = place(on_progress=lambda share, text: imitate(start, options, place()))
    with pytest.raises(BundleError, match=r"training into .*model.safetensors is already running in another process"):
        imitate(start, options, where)
    assert not where.output.exists()


@pytest.mark.parametrize(("fewest", "most"), [(3, 2), (1, 4)])
def test_blocks_that_the_model_lacks_are_refused(
    fewest: int, most: int, random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    with pytest.raises(UsageError, match=f"fewest {fewest}, most {most}: expected .* model's 3 blocks"):
        imitate(random_model("resnet8"), ImitateOptions(fewest=fewest, most=most), place())


@pytest.mark.parametrize(("n_blocks", "expected"), [(15, (5, 9)), (54, (18, 32)), (3, (1, 2))])
def test_blocks_by_default(n_blocks: int, expected: tuple[int, int]) -> None:
    assert ImitateOptions().blocks_of(n_blocks) == expected


def test_several_processes_are_refused(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    group = Group(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(UsageError, match="got 2 processes, expected one"):
        imitate(random_model("resnet8"), ImitateOptions(), place(group=group))
