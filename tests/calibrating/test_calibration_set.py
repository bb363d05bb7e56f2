"""What a calibration learns from: its digest names the images and their paths."""

import numpy as np

from bdtool import Orchestrator
from bdtool.calibrating.calibration_set import CalibrationSet
from bdtool.data.batches import ImageSource
from bdtool.data.synthetic import synthetic_images
from bdtool.runtime.policies import parse_policy_for
from tests.conftest import Exported


def _source(pictures: np.ndarray) -> ImageSource:
    return ImageSource(
        description="pictures",
        is_real=True,
        names=[str(i) for i in range(len(pictures))],
        labels=None,
        image_at=lambda index: pictures[index],
    )


def test_digest_is_of_the_images_and_the_bits_that_the_policy_gives(tiny: Exported) -> None:
    pictures = synthetic_images(70, height=32, width=32)  # two batches
    with Orchestrator.open(tiny.bundle) as fp32:

        def decided(policy: str | None, pictures: np.ndarray = pictures) -> CalibrationSet:
            return CalibrationSet.decide(_source(pictures), parse_policy_for(fp32.network, policy), fp32)

        sets = [decided(None), decided("110"), decided("011"), decided("110", pictures[::-1])]
        assert np.array_equal(sets[0].keep, fp32.decide(pictures))
    assert np.array_equal(sets[1].keep, np.tile([True, True, False], (70, 1)))
    assert len({one.digest for one in sets}) == 4
    batches = list(sets[0].batches())
    assert [batch.first for batch in batches] == [0, len(batches[0].images)]
    assert np.array_equal(np.concatenate([batch.keep for batch in batches]), sets[0].keep)
