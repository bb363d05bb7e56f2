"""Accuracy and cost: the same through PyTorch and through engines, and equal to a count by hand."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdtool.data.sources import ImageSource, open_data
from bdtool.errors import DataError, EngineError, PolicyError
from bdtool.evaluation import Evaluation, evaluate, open_classifier
from bdtool.runtime.place import Place
from bdtool.runtime.result import RunResult
from bdtool.specs import NetworkSpec
from bdtool.torch_classifier import TorchClassifier
from export.bundle import Bundle

POLICIES = ("learned", "all", "none", "first:2", "random:2", "random:1:7", "distribute:2", "011", "rows.npy", "row.npy")
N_IMAGES = 21


@pytest.fixture
def data(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageSource:
    """Labelled pictures, and the policy files of `POLICIES` in the working directory."""
    from bdtool.data.synthetic import synthetic_images

    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=synthetic_images(N_IMAGES, height=32, width=32), y=np.arange(N_IMAGES) % 10)
    np.save("rows.npy", np.random.default_rng(0).integers(0, 2, (N_IMAGES, 3)))
    np.save("row.npy", np.array([1, 0, 1]))
    return open_data("data.npz", network=Bundle.open(tiny.bundle).network)


def _evaluate(path: Path, data: ImageSource, **options: Any) -> Evaluation:
    with open_classifier(path, Place()) as classifier:
        return evaluate(classifier, data, **options)


@pytest.mark.parametrize("policy", POLICIES)
def test_model_and_bundle_agree_exactly_whatever_the_batch(tiny: Any, data: ImageSource, policy: str) -> None:
    expected = _evaluate(tiny.path, data, policy=policy)
    for batch_size in (1, 4, 64):
        assert _evaluate(tiny.bundle, data, policy=policy, batch_size=batch_size) == expected
    assert _evaluate(tiny.path, data, policy=policy, batch_size=5) == expected


def test_default_is_the_learned_policy(tiny: Any, data: ImageSource) -> None:
    assert _evaluate(tiny.bundle, data) == _evaluate(tiny.path, data, policy="learned")


def test_model_without_policy_network_runs_every_block(export_random: Any, data: ImageSource) -> None:
    plain = export_random("resnet8", shortcut="average-pool", has_policy=False)
    result = _evaluate(plain.path, data)
    assert result == _evaluate(plain.bundle, data)
    assert (result.policy, result.blocks_mean, result.unique_policies) == ("all", 3, 1)
    with pytest.raises(PolicyError, match="no policy network"):
        _evaluate(plain.path, data, policy="learned")


@pytest.mark.parametrize(("weight", "what"), [("base.head.linear.bias", "logits"), ("policy.logit.bias", "probabi")])
def test_network_that_gives_no_numbers_has_no_accuracy(
    random_model: Any, data: ImageSource, weight: str, what: str
) -> None:
    """Through PyTorch as through engines; `argmax` makes a class of NaN."""
    model = random_model("resnet8")
    classifier = TorchClassifier(model)
    model.state_dict()[weight][1] = float("nan")
    with pytest.raises(EngineError, match=rf"the {what}\w* of image 0 are not finite \(21 of 21 images\)"):
        evaluate(classifier, data)
    with pytest.raises(EngineError, match="probabilities of image 0 are not") if "policy" in weight else nullcontext():
        classifier.decide(data.take(2).images)


class _Answers:
    """A classifier that answers class 3 always and keeps what it is told, or [1, 0, 1] and [1, 1, 1] in turn."""

    def __init__(self, network: NetworkSpec) -> None:
        self.network = network

    def run(self, images: np.ndarray, policy: np.ndarray | None = None) -> RunResult:
        if policy is None:
            policy = np.array([[1, i % 2, 1] for i in range(len(images))], dtype=bool)
        logits = np.eye(10, dtype=np.float32)[np.full(len(images), 3)]
        return RunResult(logits=logits, policy=policy)


def test_figures_equal_a_count_by_hand(tiny: Any, data: ImageSource) -> None:
    network = Bundle.open(tiny.bundle).network
    cost = {part.name: part.flops for part in network.parts}
    fixed = cost["stem"] + cost["block_00"] + cost["block_02"] + cost["head"]
    dropped, kept = fixed + cost["shortcut_01"], fixed + cost["block_01"]

    learned = evaluate(_Answers(network), data.drawn(20), batch_size=10)
    assert learned.accuracy == 2 / 20
    assert learned.accuracy_top5 == 11 / 20  # 3, then 0, 1, 2, 4: of equal logits lower classes go first
    assert (learned.n_images, learned.unique_policies) == (20, 2)
    assert (learned.blocks_mean, learned.blocks_std) == (2.5, 0.5)
    assert learned.flops_mean == (dropped + kept) / 2 + cost["policy"]  # the policy network's cost belongs to it
    assert learned.flops_std == (kept - dropped) / 2

    given = evaluate(_Answers(network), data, policy="101")
    assert (given.flops_mean, given.flops_std) == (dropped, 0)
    assert given.full_flops == kept == cost["full"]


def test_five_classes_have_no_top_5(tiny: Any, data: ImageSource) -> None:
    network = dataclasses.replace(Bundle.open(tiny.bundle).network, n_classes=5)
    assert evaluate(_Answers(network), data).accuracy_top5 is None


def test_row_of_a_policy_file_goes_with_its_image(tiny: Any, data: ImageSource, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 2, (data.n_images, 3)).astype(bool)
    np.save(tmp_path / "bits.npy", rows)
    given: list[np.ndarray] = []
    answers = _Answers(Bundle.open(tiny.bundle).network)
    run = answers.run
    answers.run = lambda images, policy: given.append(policy) or run(images, policy)  # type: ignore[method-assign]
    result = evaluate(answers, data.drawn(20), policy=str(tmp_path / "bits.npy"), batch_size=10)
    drawn = [data.names.index(name) for name in data.drawn(20).names]
    np.testing.assert_array_equal(np.concatenate(given), rows[drawn])
    assert result.input_source == f"{data.description}, drawn from {data.n_images} images with seed 0"


def test_flops_of_a_convolution_are_those_of_the_paper(tiny: Any) -> None:
    parts = {part.name: part for part in Bundle.open(tiny.bundle).network.parts}
    assert parts["stem"].flops == 2 * 32 * 32 * 3 * 3 * 3 * 16
    assert parts["block_00"].flops == 2 * 2 * 32 * 32 * 3 * 3 * 16 * 16
    assert parts["head"].flops == 2 * 64 * 10
    assert parts["shortcut_01"].flops == 0


def test_batches_are_announced(tiny: Any, data: ImageSource) -> None:
    sizes: list[int] = []
    evaluate(_Answers(Bundle.open(tiny.bundle).network), data, batch_size=8, on_batch=sizes.append)
    assert sizes == [8, 8, 5]


def test_data_without_labels_is_refused(tiny: Any) -> None:
    network = Bundle.open(tiny.bundle).network
    with pytest.raises(DataError, match=r"no labels in .*; evaluate needs them"):
        evaluate(_Answers(network), open_data("synthetic:4", network=network))


def test_threads_of_pytorch_are_given_back(tiny: Any) -> None:
    import torch

    before = torch.get_num_threads()
    with open_classifier(tiny.path, Place(threads=1)):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
