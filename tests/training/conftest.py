"""Small real models and data to train on in seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from bdtool.data.batches import ImageSource
    from bdtool.models.model import BlockDropModel
    from bdtool.training.place import TrainingPlace


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 labelled pictures, uint8 32 x 32: ten classes of stripes of different widths and colours, with noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(256) % 10
    waves = np.sin(np.arange(32)[None, :] * (labels[:, None] + 1) * 0.3)
    pictures = 128 + 60 * waves[:, None, :, None] * (1 + 0.1 * np.arange(3)) + rng.normal(0, 20, (256, 32, 32, 3))
    path = tmp_path_factory.mktemp("stripes") / "stripes.npz"
    np.savez(path, x=np.clip(pictures, 0, 255).astype(np.uint8), y=labels)
    return path


@pytest.fixture(scope="session")
def stripes_source(stripes: Path, random_model: Callable[..., "BlockDropModel"]) -> "ImageSource":
    from bdtool.data.sources import open_data
    from bdtool.models.parts import network_spec

    return open_data(str(stripes), network=network_spec(random_model("resnet8")))


@pytest.fixture
def place(stripes_source: "ImageSource", tmp_path: Path) -> Callable[..., "TrainingPlace"]:
    """Return a function that gives where to train: on the stripes, into a file of the test's own, on the CPU."""
    import torch

    from bdtool.training.distributed import Group
    from bdtool.training.place import TrainingPlace

    def make(name: str = "model", **options: object) -> TrainingPlace:
        group = Group(rank=0, size=1, device=torch.device("cpu"))
        arguments = {"train": stripes_source, "val": stripes_source, "output": tmp_path / f"{name}.safetensors"}
        return TrainingPlace(**{**arguments, "group": group, **options})

    return make
