"""All test images of CIFAR-10: public checkpoints and shipped models have their published accuracy, by engines too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bdtool import Orchestrator
from bdtool.cli import main
from bdtool.evaluation import open_classifier
from bdtool.models.shipped import shipped_models
from bdtool.models.store import read_spec
from bdtool.runtime.place import Place
from bdtool.verification.ladder import LOGITS_TOLERANCE

pytestmark = pytest.mark.slow
BATCH = 250


def _logits(path: Path, images: np.ndarray) -> np.ndarray:
    """Return the logits of a MODEL through PyTorch, or of a bundle through its chain of engines, every block kept."""
    with open_classifier(path, Place()) as classifier:
        keep = np.ones((BATCH, classifier.network.n_blocks), dtype=bool)
        pieces = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        return np.concatenate([classifier.run(piece, keep[: len(piece)]).logits for piece in pieces])


@pytest.fixture
def deploy(checkpoints_dir: Path, tmp_path: Path, shared_traces: None) -> Callable[..., tuple[Path, Path]]:
    """Return a function that imports and exports a public checkpoint through the commands."""

    def run(file: str, arch: str, *options: str) -> tuple[Path, Path]:
        model, bundle = tmp_path / "model.safetensors", tmp_path / "bundle"
        imported = ["import", str(checkpoints_dir / file), "--arch", arch, *options, "-o", str(model)]
        for words in (imported, ["export", str(model), "-o", str(bundle)]):
            assert CliRunner().invoke(main, words).exit_code == 0
        return model, bundle

    return run


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def test_resnet32_classifies_as_published_and_engines_agree_with_pytorch(deploy: Any, cifar10_test: Any) -> None:
    model, bundle = deploy("resnet32-d509ac18.th", "resnet32")
    by_torch, by_engines = _logits(model, cifar10_test.images), _logits(bundle, cifar10_test.images)
    assert _accuracy(by_torch, cifar10_test.labels) == 0.9263
    assert _accuracy(by_engines, cifar10_test.labels) == 0.9263
    assert (by_torch.argmax(axis=1) == by_engines.argmax(axis=1)).all()
    assert np.abs(by_torch - by_engines).max() <= LOGITS_TOLERANCE


def test_resnet20_classifies_as_published(deploy: Any, cifar10_test: Any) -> None:
    model, bundle = deploy("resnet20-12fca82f.th", "resnet20")
    by_engines = _logits(bundle, cifar10_test.images)
    assert _accuracy(by_engines, cifar10_test.labels) == 0.9173
    by_torch = _logits(model, cifar10_test.images[:1000])
    assert np.abs(by_torch - by_engines[:1000]).max() <= LOGITS_TOLERANCE


def test_project_checkpoint_with_average_pool_shortcuts_classifies_as_measured(deploy: Any, cifar10_test: Any) -> None:
    colour = ("--mean", "0.4914,0.4822,0.4465", "--std", "0.2470,0.2435,0.2616")
    _, bundle = deploy("r32-cifar10-base.pt", "resnet32", "--shortcut", "average-pool", *colour)
    assert _accuracy(_logits(bundle, cifar10_test.images), cifar10_test.labels) == 0.9180


@pytest.mark.parametrize("name", sorted(shipped_models()))
def test_engines_of_a_shipped_model_classify_as_it_was_measured(
    name: str, cifar10_test: Any, tmp_path: Path, shared_traces: None
) -> None:
    bundle = tmp_path / "bundle"
    assert CliRunner().invoke(main, ["export", name, "-o", str(bundle)]).exit_code == 0
    with Orchestrator.open(bundle) as runtime:
        results = [
            runtime.run(cifar10_test.images[start : start + BATCH])
            for start in range(0, len(cifar10_test.images), BATCH)
        ]
    figures = read_spec(shipped_models()[name]).provenance["figures"]
    assert figures["n_images"] == len(cifar10_test.images)
    accuracy = _accuracy(np.concatenate([result.logits for result in results]), cifar10_test.labels)
    # in training PyTorch convolves in another order, which decides an image in thousands otherwise
    assert accuracy == pytest.approx(figures["accuracy"], abs=2e-4)
    blocks = np.concatenate([result.blocks_run for result in results])
    assert blocks.mean() == pytest.approx(figures["blocks_mean"], abs=2e-3)
    assert blocks.std() == pytest.approx(figures["blocks_std"], abs=2e-3)
