"""The oracle that engines are compared with runs many images in slices."""

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("by_default", ["tf32", "ieee"])
def test_fp32_means_fp32_on_a_gpu(tiny, pixels, monkeypatch, by_default):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # the test's end puts back what depends on it
    convolutions, found = torch.backends.cudnn.conv, []
    convolutions.fp32_precision = by_default
    classifier = TorchClassifier(tiny.model)
    hooks = [
        part.register_forward_hook(lambda *_: found.append(convolutions.fp32_precision))
        for part in (tiny.model.base, tiny.model.policy)
    ]
    classifier.run(pixels(tiny.model, 2))
    classifier.decide(pixels(tiny.model, 2))
    for hook in hooks:
        hook.remove()
    assert found == ["ieee"] * 3
    assert convolutions.fp32_precision == by_default, "training goes on as before"
