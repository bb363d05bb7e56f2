"""The oracle that engines are compared with runs many images in slices."""

import numpy as np
import pytest

from bdtool.torch_classifier import TorchClassifier


@pytest.mark.parametrize("is_given", [True, False])
def test_slices_answer_as_the_whole_batch(tiny, pixels, is_given):
    images = pixels(tiny.model, 7)
    keep = np.random.default_rng(0).random((7, 3)) < 0.5 if is_given else None
    whole, sliced = TorchClassifier(tiny.model), TorchClassifier(tiny.model, max_batch=3)
    expected, actual = whole.run(images, keep), sliced.run(images, keep)
    np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-5)
    assert np.array_equal(actual.policy, expected.policy)
    assert np.array_equal(sliced.decide(images), whole.decide(images))
