"""Small real models and real data for the tests of `bdtool.models`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bdtool.models.architectures import ShortcutKind, architecture
from bdtool.models.model import BlockDropModel, ModelSpec, build_model
from bdtool.specs import Preprocessing

SHARED = Path(__file__).parents[2].parent / "shared"
MakeModel = Callable[..., BlockDropModel]


def stir_batch_norms(module: nn.Module) -> None:
    """Give every BatchNorm weights and statistics that matter: fresh ones are the identity and would hide mistakes."""
    generator = torch.Generator().manual_seed(7)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in (
                (layer.weight, 0.5, 1.0),
                (layer.bias, -0.5, 0.5),
                (layer.running_mean, -0.3, 0.3),
                (layer.running_var, 0.5, 1.5),
            ):
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Return a function from an architecture's name to a model with random weights."""

    def make(
        arch: str = "resnet14",
        *,
        shortcut: ShortcutKind | None = None,
        n_classes: int = 10,
        has_policy: bool = True,
        policy_hidden: int = 0,
        downscale: int = 1,
        policy_downscale: int = 0,
        mask: str | None = None,
        seed: int = 0,
        size: int | None = None,
    ) -> BlockDropModel:
        layout = architecture(arch)
        side = size or layout.image_size
        spec = ModelSpec(
            arch=arch,
            n_classes=n_classes,
            labels=None,
            preprocessing=Preprocessing(height=side, width=side, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
            shortcut=shortcut or layout.default_shortcut,
            has_policy=has_policy,
            provenance={"created_by": "test"},
            policy_hidden=policy_hidden,
            downscale=downscale,
            policy_downscale=policy_downscale,
            mask=mask,
        )
        model = build_model(spec, seed=seed)
        stir_batch_norms(model)
        return model

    return make


@pytest.fixture(scope="session")
def stir() -> Callable[[nn.Module], None]:
    return stir_batch_norms


@pytest.fixture(scope="session")
def public_checkpoints() -> Path:
    folder = SHARED / "checkpoints"
    if not folder.is_dir():
        pytest.skip("public checkpoints are not at ../shared/checkpoints")
    return folder


@pytest.fixture(scope="session")
def cifar_sample() -> tuple[np.ndarray, np.ndarray]:
    """The first 200 test images of CIFAR-10, uint8 [200, 32, 32, 3], and their labels."""
    folder = SHARED / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip("CIFAR-10 is not at ../shared/data/cifar10")
    with Image.open(folder / "test_0.webp") as sheet:
        rows = np.asarray(sheet.crop((0, 0, 3200, 64)).convert("RGB"))
    tiles = rows.reshape(2, 32, 100, 32, 3).swapaxes(1, 2).reshape(200, 32, 32, 3)
    return tiles, np.load(folder / "test_labels.npy")[:200]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Let every test draw the same random numbers, whichever tests run before it."""
    torch.manual_seed(0)
