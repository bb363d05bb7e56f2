"""Batches are checked and prepared before any engine sees them."""

import re

import numpy as np
import pytest
import torch

from bdtool.errors import DataError
from bdtool.runtime.preprocess import preprocess


def test_bad_images_are_refused_before_anything_runs(fake):
    opened = fake()
    for images in (
        np.zeros((1, 3, 5, 4), np.float32),
        np.zeros((0, 3, 4, 4), np.float32),
        np.zeros((3, 4, 4), np.uint8),
    ):
        with pytest.raises(DataError):
            opened.runtime.run(images)
    assert opened.backend.calls == []


def test_prepared_images_equal_the_preprocessor_and_share_memory(fake):
    runtime = fake(max_batch=4).runtime
    height, width = runtime.network.preprocessing.height, runtime.network.preprocessing.width
    images = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    for n_images in (1, 4, 2):
        prepared = runtime.prepare(images[:n_images])
        np.testing.assert_array_equal(prepared, preprocess(images[:n_images], runtime.network.preprocessing))
    assert np.shares_memory(prepared, runtime.prepare(images))
    assert np.shares_memory(prepared, runtime.prepare(images))
    prepared = runtime.prepare(images)
    assert runtime.prepare(prepared) is prepared


def test_array_of_no_axes_is_not_prepared(fake):
    with pytest.raises(DataError, match=r"got uint8 \[\], expected uint8 \[N, 4, 4, 3\]"):
        fake().runtime.prepare(np.zeros((), np.uint8))


@pytest.mark.parametrize("images", [[[0.0]], None, "cat.png"])
def test_what_is_no_array_is_refused(fake, images):
    with pytest.raises(TypeError, match=r"images must be a numpy array, or one on a GPU; got .*Pass np.asarray"):
        fake().runtime.run(images)
    with pytest.raises(TypeError, match=r"images must be a numpy array; got .*Pass np.asarray"):
        fake().runtime.prepare(images)


def test_tensor_on_the_host_is_taken_without_a_copy(fake, images_of):
    images, runtime = images_of([1, 2]), fake().runtime
    np.testing.assert_array_equal(runtime.run(torch.from_numpy(images)).logits, runtime.run(images).logits)
    with pytest.raises(DataError, match=r"images: the Tensor cannot be read \(.*grad.*Pass a numpy array"):
        runtime.run(torch.from_numpy(images).requires_grad_())
    with pytest.raises(DataError, match=r"images: the Tensor cannot be read .* Pass a numpy array, uint8 or float32"):
        runtime.run(torch.from_numpy(images).bfloat16())  # which numpy has no type for


def test_policy_network_is_asked_about_tensors_on_the_host(fake, images_of):
    images, runtime = images_of([1, 2]), fake().runtime
    np.testing.assert_array_equal(runtime.decide(torch.from_numpy(images)), runtime.decide(images))


def test_page_locked_tensor_is_taken_likewise(fake, images_of, monkeypatch):
    """`is_pinned` of a tensor is true only where there is a GPU; what it says by DLPack follows from that."""
    images, runtime = images_of([1, 2]), fake().runtime
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    np.testing.assert_array_equal(runtime.run(torch.from_numpy(images)).logits, runtime.run(images).logits)


@pytest.mark.parametrize(("scale", "warned"), [(1, False), (255, True)])
def test_pixels_as_floats_are_warned_of_once(fake, scale, warned, caplog):
    runtime = fake().runtime
    images = np.random.default_rng(0).random((2, 3, 4, 4)).astype(np.float32) * scale
    for _ in range(2):
        runtime.prepare(images)
    texts = [record.getMessage() for record in caplog.records]
    expected = r"images: float32 values up to 25\d are no preprocessed ones, which lie within .* of 0. Pass pixels"
    assert [bool(re.match(expected, text)) for text in texts] == [True] * warned


def test_decide_checks_a_batch_before_it_is_cut(fake, images_of):
    runtime = fake(max_batch=2).runtime
    for images in (images_of([1]).tolist(), None):
        with pytest.raises(TypeError, match=r"images must be a numpy array; got .*Pass np.asarray"):
            runtime.decide(images)
    with pytest.raises(
        DataError, match=r"got float32 \[3, 4, 4\], .*One image needs a batch axis: pass images\[None\]"
    ):
        runtime.decide(images_of([1])[0])
