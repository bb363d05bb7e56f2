import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdtool.data.batches import ImageSource
from bdtool.data.sources import open_data
from bdtool.models.model import BlockDropModel
from bdtool.models.parts import network_spec
from bdtool.runtime.preprocess import preprocess
from bdtool.training.images import MemoryImages, PictureFiles, read_all, training_images

CPU = torch.device("cpu")


def test_a_batch_without_shift_is_what_the_runtime_would_see(
    stripes: Path, random_model: Callable[..., BlockDropModel]
) -> None:
    model = random_model("resnet8")
    source = open_data(str(stripes), network=network_spec(model))
    images = training_images(source, model.spec.preprocessing, device=CPU)
    assert isinstance(images, MemoryImages)
    index = torch.tensor([5, 3, 200])
    batch, labels = images.batch(index, torch.tensor([[0.5, 0.5, 0.0]] * 3))
    pixels, all_labels = read_all(source)
    np.testing.assert_allclose(batch.numpy(), preprocess(pixels[index], model.spec.preprocessing), atol=1e-5)
    assert labels.tolist() == all_labels[index].tolist()
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_large_pictures_are_cropped_from_their_files(
    tmp_path: Path, random_model: Callable[..., BlockDropModel]
) -> None:
    from bdtool.specs import Preprocessing

    model = random_model("resnet18", size=64)
    rng = np.random.default_rng(0)
    for k in range(10):
        (tmp_path / f"class_{k}").mkdir()
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / f"class_{k}" / "a.png")
    size = Preprocessing(height=64, width=48, mean=(0.5,) * 3, std=(0.25,) * 3, resize=72)
    source = open_data(str(tmp_path), network=network_spec(model), resize=True)
    images = training_images(source, size, device=CPU)
    assert isinstance(images, PictureFiles)
    uniforms = torch.rand(4, images.n_uniforms, generator=torch.Generator().manual_seed(0))
    batch, labels = images.batch(torch.tensor([9, 0, 4, 4]), uniforms)
    assert batch.shape == (4, 3, 64, 48)
    assert labels.tolist() == [9, 0, 4, 4]
    assert not torch.equal(batch[2], batch[3]), "the same picture, cropped by other numbers"


def test_crops_are_scaled_as_the_network_wants_it(tmp_path: Path, random_model: Callable[..., BlockDropModel]) -> None:
    model = random_model("resnet18", size=64)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for k in range(10):
        (tmp_path / f"class_{k}").mkdir()
        picture.save(tmp_path / f"class_{k}" / "a.png")
    scaled = dataclasses.replace(model.spec.preprocessing, resize=72, interpolation="bicubic")
    source = open_data(str(tmp_path), network=network_spec(model), resize=True)
    images = training_images(source, scaled, device=CPU)
    batch, _ = images.batch(torch.tensor([0]), torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0]]))  # the whole picture
    expected = np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(batch.numpy(), preprocess(expected[None], scaled), atol=1e-5)


@pytest.mark.parametrize("number", [0.1, 0.9])
@pytest.mark.parametrize("kind", [MemoryImages, PictureFiles])
def test_flipped_images_are_else_as_they_are_deployed(
    kind: type[MemoryImages | PictureFiles], number: float, tmp_path: Path, random_model: Callable[..., BlockDropModel]
) -> None:
    rng = np.random.default_rng(0)
    for k in range(10):
        (tmp_path / f"class_{k}").mkdir()
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / f"class_{k}" / "a.png")
    model = random_model("resnet18", size=64)
    source = open_data(str(tmp_path), network=network_spec(model), resize=True)
    images = kind(source, model.spec.preprocessing, device=CPU, augment="flip")
    uniforms = torch.full((2, images.n_uniforms), 0.2)
    uniforms[:, -1] = number
    batch, labels = images.batch(torch.tensor([7, 2]), uniforms)
    deployed = preprocess(source.take(10).images, model.spec.preprocessing)[[7, 2]]
    np.testing.assert_allclose(batch.numpy(), deployed[..., ::-1] if number > 0.5 else deployed, atol=1e-5)
    assert labels.tolist() == [7, 2]


def test_facts_name_the_data_without_its_place(stripes: Path, random_model: Callable[..., BlockDropModel]) -> None:
    model = random_model("resnet8")
    source = open_data(str(stripes), network=network_spec(model))
    facts = training_images(source.drawn(100), model.spec.preprocessing, device=CPU).facts
    assert facts["name"] == "stripes.npz"
    assert facts["n_images"] == 100
    whole = training_images(source, model.spec.preprocessing, device=CPU).facts
    assert whole["sha256"] != facts["sha256"]


@pytest.mark.parametrize("kind", [MemoryImages, PictureFiles])
def test_facts_tell_data_sets_apart(
    kind: type[MemoryImages | PictureFiles], stripes_source: ImageSource, random_model: Callable[..., BlockDropModel]
) -> None:
    """By their images, of files by their names, and by their labels."""
    source = dataclasses.replace(stripes_source, picture_at=stripes_source.image_at)
    assert source.labels is not None
    others = (
        dataclasses.replace(source, labels=source.labels[::-1].copy()),
        dataclasses.replace(source, names=source.names[::-1], image_at=lambda index: 255 - source.image_at(index)),
    )
    preprocessing = random_model("resnet8").spec.preprocessing
    digests = {kind(one, preprocessing, device=CPU).facts["sha256"] for one in (source, *others)}
    assert len(digests) == 3


def test_only_large_pictures_stay_in_their_files(
    stripes_source: ImageSource, random_model: Callable[..., BlockDropModel]
) -> None:
    small = random_model("resnet8").spec.preprocessing
    files = dataclasses.replace(stripes_source, picture_at=stripes_source.image_at)
    large = dataclasses.replace(small, resize=40)
    kinds = [
        type(training_images(source, preprocessing, device=CPU))
        for source, preprocessing in ((files, large), (files, small), (stripes_source, large))
    ]
    assert kinds == [PictureFiles, MemoryImages, MemoryImages]


def test_read_all_keeps_the_order(stripes: Path, random_model: Callable[..., BlockDropModel]) -> None:
    source = open_data(str(stripes), network=network_spec(random_model("resnet8")))
    pixels, labels = read_all(source)
    assert len(pixels) == len(labels) == 256
    assert np.array_equal(pixels[6], source.image_at(6))
