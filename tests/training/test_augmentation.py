import numpy as np
import pytest
import torch

from bdtool.training.augmentation import crop_and_flip, random_resized_crop


def pictures(n: int = 4) -> torch.Tensor:
    return torch.randint(1, 256, (n, 8, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_middle_numbers_leave_the_pictures_alone() -> None:
    images = pictures()
    assert torch.equal(crop_and_flip(images, torch.tensor([[0.5, 0.5, 0.0]] * 4), padding=2), images)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 4), (4, 2)])
def test_each_picture_is_shifted_and_flipped_by_its_own_numbers(down: int, right: int, flip: bool) -> None:
    images = pictures()
    uniforms = torch.full((4, 3), 0.5) * torch.tensor([1.0, 1.0, 0.0])
    uniforms[2] = torch.tensor([(down + 0.5) / 5, (right + 0.5) / 5, 0.9 if flip else 0.1])
    got = crop_and_flip(images, uniforms, padding=2)
    padded = np.pad(images[2].numpy(), [(2, 2), (2, 2), (0, 0)])[down : down + 8, right : right + 6]
    assert np.array_equal(got[2].numpy(), padded[:, ::-1] if flip else padded)
    assert torch.equal(got[[0, 1, 3]], images[[0, 1, 3]])


@pytest.mark.parametrize("uniforms", [[0.0] * 5, [0.999] * 5, [0.3, 0.8, 0.1, 0.9, 0.4]])
def test_resized_crops_have_the_asked_size(uniforms: list[float]) -> None:
    pixels = np.arange(40 * 50 * 3, dtype=np.uint32).reshape(40, 50, 3).astype(np.uint8)
    got = random_resized_crop(pixels, uniforms, height=16, width=24)
    assert got.shape == (16, 24, 3)
    assert got.dtype == np.uint8


def test_a_crop_of_the_whole_picture_is_the_picture() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    got = random_resized_crop(pixels, [1.0, 0.5, 0.0, 0.0, 0.0], height=16, width=16)
    assert np.array_equal(got, pixels)
    assert np.array_equal(random_resized_crop(pixels, [1.0, 0.5, 0, 0, 0.7], height=16, width=16), pixels[:, ::-1])
