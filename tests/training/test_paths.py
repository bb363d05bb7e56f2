"""The paths that a base learns along: a policy network's own, at one threshold or many, or a heuristic's."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from bdtool.models.model import BlockDropModel
from bdtool.runtime.policies import parse_policy
from bdtool.torch_classifier import TorchClassifier
from bdtool.training.budget import shift_policy
from bdtool.training.options import FinetuneOptions
from bdtool.training.paths import deployed_paths, heuristic_paths
from bdtool.training.place import TrainingPlace
from bdtool.training.stages import _fixed_paths
from bdtool.training.tasks import Step


def test_frozen_policy_decides_on_pictures_as_they_are(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    model, where = random_model("resnet8", has_policy=True), place()
    shift_policy(model, where.train, 1.5)  # so that pictures differ
    paths = deployed_paths(model, where.train.drawn(200), group=where.group)
    expected = TorchClassifier(model).run(where.train.take(200).images).policy
    assert len(np.unique(expected, axis=0)) > 1
    index = torch.tensor([199, 3, 3, 60])
    assert np.array_equal(paths(Step(7, 10, index)).numpy(), expected[index])


def test_base_learns_the_paths_at_all_thresholds_between_two(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    model, where = random_model("resnet8", has_policy=True), place()
    paths = deployed_paths(model, where.train, group=where.group, thresholds=(0.2, 0.9))
    probability = torch.from_numpy(TorchClassifier(model).keep_probability(where.train.take(256).images))
    index = torch.arange(256)
    steps = [paths(Step(number, 10, index)) for number in range(20)]
    for keep in steps:
        assert (keep >= (probability >= 0.9)).all()
        assert (keep <= (probability >= 0.2)).all()
    drawn = torch.stack(steps).float().mean(dim=0)  # a block of probability p runs at (p - 0.2) / 0.7 of the thresholds
    assert (drawn - ((probability - 0.2) / 0.7).clamp(0, 1)).abs().mean() < 0.1
    assert torch.equal(steps[3], paths(Step(3, 10, index))), "a resumed run draws the same"
    shares = [paths(Step(3, 10, index[rank::2], rank=rank, n_ranks=2)) for rank in (0, 1)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), steps[3]), "processes draw what one would"


def test_another_seed_draws_other_thresholds(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    options = FinetuneOptions(policy="learned:0.2-0.9", freeze_policy=True)
    model, where = random_model("resnet8", has_policy=True), place()
    request = parse_policy(options.single_policy, n_blocks=3, has_policy_network=True)
    step = Step(3, 10, torch.arange(256))
    drawn = []
    for seed in (0, 0, 1):
        paths = _fixed_paths(model, request, dataclasses.replace(options, seed=seed), where)
        assert paths is not None
        drawn.append(paths(step))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_processes_draw_the_rows_that_one_would(place: Callable[..., TrainingPlace]) -> None:
    request = parse_policy("random:0-3", n_blocks=3, has_policy_network=False)
    paths, images = heuristic_paths(request, place().train), torch.arange(8)
    first, second = (paths(Step(number, 10, images)) for number in (0, 1))
    assert np.array_equal(torch.cat([first, second]).numpy(), request.matrix(16)), "no row twice"
    shares = [paths(Step(1, 10, images[rank::2], rank=rank, n_ranks=2)) for rank in (0, 1)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), second)
