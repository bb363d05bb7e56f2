"""Which images a calibration is judged on: others than those that it learns from."""

from __future__ import annotations

from bdtool.data.batches import ImageSource
from bdtool.errors import CalibrationError
from bdtool.words import counted

LEAST_HELD_OUT = 100  # images: of fewer, each is more than a percentage point of the accuracy


def held_out(evaluation: ImageSource, calibrated_on: ImageSource, *, at_least: int) -> ImageSource:
    """Return the images that were not calibrated on; all of them where fewer than `at_least` are left."""
    shared = evaluation.shared_with(calibrated_on)
    if not shared.any() or (~shared).sum() < at_least:
        return evaluation
    n_left_out = counted(int(shared.sum()), "image")
    return evaluation.without(
        calibrated_on, description=f"{evaluation.description}, without the {n_left_out} calibrated on"
    )


def halves(images: ImageSource) -> tuple[ImageSource, ImageSource]:
    """Return a half drawn for the gates, the one that `bdtool evaluate --limit` draws, and the rest to choose on.

    Raises:
        CalibrationError: there is one image only.
    """
    if images.n_images < 2:
        raise CalibrationError(
            f"{images.description}: 1 image for the gates, but mixed precision is chosen on one half of them and "
            "measured on the other. Give more (--eval, --eval-limit)"
        )
    half = images.drawn((images.n_images + 1) // 2)
    rest = images.without(half, description=f"{images.description}, without the {half.n_images} of the gates")
    return half, rest
