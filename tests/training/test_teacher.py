"""A base that learns from another network's answers."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bdtool.errors import UsageError
from bdtool.models.model import BlockDropModel
from bdtool.runtime.preprocess import preprocess
from bdtool.specs import Preprocessing
from bdtool.training.options import FinetuneOptions
from bdtool.training.place import TrainingPlace
from bdtool.training.stages import finetune
from bdtool.training.teacher import Teacher, distillation_loss

_CPU = torch.device("cpu")
_OTHER_COLOURS = Preprocessing(height=32, width=32, mean=(0.3, 0.5, 0.6), std=(0.3, 0.2, 0.25))


def test_teacher_sees_pictures_as_it_was_trained_on_them(
    random_model: Callable[..., BlockDropModel], stripes_source: Any
) -> None:
    teacher, learner = random_model("resnet14", has_policy=False, seed=3).eval(), random_model("resnet8")
    teacher.spec = dataclasses.replace(teacher.spec, preprocessing=_OTHER_COLOURS)
    pixels = stripes_source.take(4).images
    given = torch.from_numpy(preprocess(pixels, learner.spec.preprocessing))
    taught = Teacher(teacher, learner.spec, device=_CPU).logits(given)
    with torch.no_grad():
        expected = teacher(torch.from_numpy(preprocess(pixels, _OTHER_COLOURS)))
    torch.testing.assert_close(taught, expected, atol=1e-4, rtol=1e-4)


def test_teacher_that_was_trained_for_a_mask_answers_by_it(random_model: Callable[..., BlockDropModel]) -> None:
    teacher = random_model("resnet8", has_policy=False, mask="110", seed=3)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    taught = Teacher(teacher, teacher.spec, device=_CPU).logits(images)
    keep = torch.tensor([[True, True, False]]).expand(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(taught, teacher(images, keep), atol=1e-4, rtol=1e-4)


def test_loss_is_of_labels_and_of_answers_at_temperature_4() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, taught = (5 * torch.randn(6, 10, generator=generator) for _ in range(2))
    labels = torch.arange(6)
    probability = F.softmax(taught / 4, dim=1)
    soft = -(probability * (F.log_softmax(logits / 4, dim=1) - probability.log())).sum(dim=1).mean()
    expected = 0.1 * F.cross_entropy(logits, labels) + 0.9 * 16 * soft
    torch.testing.assert_close(distillation_loss(logits, taught, labels), expected)


@pytest.mark.parametrize(("has_policy", "options"), [(False, {"policy": "all"}), (True, {})])
def test_base_comes_closer_to_its_teacher(
    has_policy: bool,
    options: dict[str, Any],
    random_model: Callable[..., BlockDropModel],
    place: Callable[..., TrainingPlace],
) -> None:
    start, teacher = random_model("resnet8", has_policy=has_policy), random_model("resnet8", has_policy=False, seed=7)
    images = torch.from_numpy(preprocess(place().train.take(100).images, start.spec.preprocessing))
    asked = FinetuneOptions(epochs=6, batch=32, augment="flip", **options)
    distances = []
    for name, taught_by in (("alone", None), ("taught", teacher)):
        model = finetune(copy.deepcopy(start), asked, place(name), teacher=taught_by).model.eval()
        with torch.no_grad():
            answers = [F.log_softmax(one.base(images), dim=1) for one in (model, teacher.eval())]
        distances.append(float(F.kl_div(*answers, reduction="batchmean", log_target=True)))
    assert distances[1] < 0.5 * distances[0]
    assert model.spec.provenance["teacher"] == teacher.spec.provenance


def test_teacher_that_does_not_fit_is_refused(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    start, teacher = random_model("resnet8"), random_model("resnet14", has_policy=False)

    def refused(match: str, other: BlockDropModel) -> None:
        with pytest.raises(UsageError, match=match):
            finetune(start, FinetuneOptions(epochs=0.1), place(), teacher=other)

    refused("teacher: got a MODEL with a policy network, expected a base alone", random_model("resnet8"))
    refused(
        r"takes pictures of 64 x 64 pixels, the MODEL of 32 x 32", random_model("resnet8", has_policy=False, size=64)
    )
    many = random_model("resnet14", has_policy=False)
    many.spec = dataclasses.replace(many.spec, n_classes=20)
    refused("got 20 classes without names, expected 10 classes without names", many)
    labels = tuple("abcdefghij")
    teacher.spec = dataclasses.replace(teacher.spec, labels=labels)
    refused("got 10 classes, from 'a' to 'j', expected 10 classes without names", teacher)
