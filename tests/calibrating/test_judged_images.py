"""Which images a calibration is judged on: others than it learned from, where there are enough."""

import numpy as np
import pytest

from bdtool.calibrating.judged_images import halves, held_out
from bdtool.data.batches import ImageSource
from bdtool.errors import CalibrationError


def _source(n_images: int, description: str = "pictures") -> ImageSource:
    return ImageSource(
        description=description,
        is_real=True,
        names=[str(i) for i in range(n_images)],
        labels=None,
        image_at=lambda index: np.full((8, 8, 3), index, np.uint8),
    )


def test_images_that_were_calibrated_on_are_left_out_where_enough_are_left() -> None:
    images = _source(10)
    learned = images.drawn(4)
    judged = held_out(images, learned, at_least=6)
    assert sorted([*judged.names, *learned.names]) == sorted(images.names)
    assert judged.description == "pictures, without the 4 images calibrated on"
    assert held_out(images, learned, at_least=7) is images


def test_images_of_another_set_are_all_judged() -> None:
    images = _source(10)
    assert held_out(images, _source(10, "others"), at_least=1) is images


def test_one_image_has_no_halves() -> None:
    with pytest.raises(CalibrationError, match=r"pictures: 1 image for the gates, .* Give more"):
        halves(_source(1))
