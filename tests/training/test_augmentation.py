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


@pytest.mark.parametrize(
    ("area", "ratio", "height", "width"),
    [
        (0.0, 0.5, 40, 40),  # 8 % of 100 x 200 pixels, a square
        ((0.24 - 0.08) / 0.92, 0.0, 80, 60),  # 24 %, 3/4 as wide as high
        ((0.24 - 0.08) / 0.92, 1.0, 60, 80),
        (1.0, 1.0, 100, 163),  # all of the area, 4/3: cut to the height of the picture
    ],
)
@pytest.mark.parametrize(("down", "right"), [(0.0, 0.0), (0.3, 0.999), (0.999, 0.6)])
def test_crop_is_the_part_that_its_numbers_say(
    area: float, ratio: float, height: int, width: int, down: float, right: float
) -> None:
    """Scaled to its own size, the part is as it was."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 200, 3), dtype=np.uint8)
    got = random_resized_crop(pixels, [area, ratio, down, right, 0.1], height=height, width=width)
    top, left = int(down * (101 - height)), int(right * (201 - width))
    assert np.array_equal(got, pixels[top : top + height, left : left + width])


def test_a_crop_of_the_whole_picture_is_the_picture() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    got = random_resized_crop(pixels, [1.0, 0.5, 0.0, 0.0, 0.0], height=16, width=16)
    assert np.array_equal(got, pixels)
    assert np.array_equal(random_resized_crop(pixels, [1.0, 0.5, 0, 0, 0.7], height=16, width=16), pixels[:, ::-1])
