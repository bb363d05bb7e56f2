"""What a calibration compares parts on; the command's own tests are in tests/cli."""

from pathlib import Path

import numpy as np
import pytest

from bdtool.calibrating import calibrate as calibrating
from bdtool.calibrating.request import CalibrationRequest
from bdtool.data.batches import ImageSource
from calibration.paths import PathBatch
from export.bundle import Bundle

_N = 100


class _SeenError(Exception):
    pass


def test_parts_are_compared_on_images_from_all_over_the_set(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the first ones, which of a folder for each class are all of one class."""
    images = ImageSource(
        description="from black to white",
        is_real=True,
        names=[str(i) for i in range(_N)],
        labels=None,
        image_at=lambda index: np.full((32, 32, 3), index, np.uint8),
    )
    seen: list[PathBatch] = []

    def part_errors(network: object, fp32: object, models: object, batch: PathBatch) -> None:
        seen.append(batch)
        raise _SeenError

    monkeypatch.setattr(calibrating, "part_errors", part_errors)
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(_SeenError):
        calibrating.calibrate(bundle, images, images, CalibrationRequest(precision="fp16"))
    size = bundle.network.preprocessing
    numbers = np.rint((seen[0].images[:, 0, 0, 0] - size.offset[0]) / size.scale[0])
    assert (numbers[0], numbers[-1], len(numbers), len(seen[0].keep)) == (0, _N - 1, 32, 32)
    assert np.diff(numbers).max() <= 4
