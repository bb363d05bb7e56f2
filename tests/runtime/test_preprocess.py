"""Preprocessing equals torchvision's, and refuses what would silently be wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import transforms

from bdtool.errors import DataError
from bdtool.runtime.preprocess import Preprocessor, preprocess
from bdtool.specs import Preprocessing

IMAGENET = Preprocessing(height=6, width=10, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 6, 10, 3), dtype=np.uint8)


def oracle(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)])
    return np.stack([transform(image).numpy() for image in images])


@settings(max_examples=50)
@given(mean=st.tuples(*[st.floats(0, 1)] * 3), std=st.tuples(*[st.floats(0.19, 1)] * 3), seed=st.integers(0, 1000))
def test_equals_torchvision(mean: tuple[float, float, float], std: tuple[float, float, float], seed: int) -> None:
    preprocessing = Preprocessing(height=16, width=16, mean=mean, std=std)
    images = np.random.default_rng(seed).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    # float32 near 5 has steps of 4.8e-7, so two roundings apart is 1e-6
    np.testing.assert_allclose(preprocess(images, preprocessing), oracle(images, preprocessing), rtol=0, atol=1e-6)


def test_every_pixel_value_equals_torchvision() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    preprocessing = Preprocessing(height=16, width=16, mean=IMAGENET.mean, std=IMAGENET.std)
    np.testing.assert_allclose(preprocess(ramp, preprocessing), oracle(ramp, preprocessing), rtol=0, atol=1e-6)


def test_large_images_equal_torchvision() -> None:
    preprocessing = Preprocessing(height=80, width=90, mean=IMAGENET.mean, std=IMAGENET.std)
    images = np.random.default_rng(0).integers(0, 256, (2, 80, 90, 3), dtype=np.uint8)
    np.testing.assert_allclose(preprocess(images, preprocessing), oracle(images, preprocessing), rtol=0, atol=1e-6)


@pytest.mark.parametrize("images", [IMAGES, IMAGES[:1], IMAGES[::2], IMAGES[:, :, ::-1]])
def test_result_is_contiguous_float32(images: np.ndarray) -> None:
    result = preprocess(images, IMAGENET)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, oracle(images.copy(), IMAGENET), rtol=0, atol=1e-6)


def test_images_are_left_as_they_were() -> None:
    images = IMAGES.copy()
    preprocess(images, IMAGENET)
    np.testing.assert_array_equal(images, IMAGES)


def test_preprocessed_images_pass_without_a_copy() -> None:
    ready = preprocess(IMAGES, IMAGENET)
    assert preprocess(ready, IMAGENET) is ready


def test_strided_preprocessed_images_become_contiguous() -> None:
    ready = preprocess(IMAGES, IMAGENET)
    assert preprocess(ready[..., ::-1], IMAGENET).flags.c_contiguous


@pytest.mark.parametrize("images", [IMAGES, preprocess(IMAGES, IMAGENET)])
def test_out_is_filled_and_returned(images: np.ndarray) -> None:
    out = np.empty((3, 3, 6, 10), dtype=np.float32)
    assert Preprocessor(IMAGENET)(images, out) is out
    np.testing.assert_array_equal(out, preprocess(images, IMAGENET))


@pytest.mark.parametrize(
    "out",
    [
        np.empty((4, 3, 6, 10), dtype=np.float32),
        np.empty((3, 3, 6, 10)),
        np.empty((3, 3, 10, 6), dtype=np.float32).swapaxes(2, 3),
    ],
)
def test_out_that_does_not_fit_is_refused(out: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"out must be C-contiguous float32 \[3, 3, 6, 10\]"):
        Preprocessor(IMAGENET)(IMAGES, out)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[0], r"got uint8 \[6, 10, 3\], .*pass images\[None\]"),
        (np.zeros((3, 6, 10), dtype=np.float32), r"pass images\[None\]"),
        (IMAGES.transpose(0, 3, 1, 2), r"NCHW: pass images\.transpose\(0, 2, 3, 1\)"),
        (IMAGES.astype(np.float32), r"NHWC: .*images\.transpose\(0, 3, 1, 2\)"),
        (IMAGES.astype(np.float64), r"got float64 .*astype"),
        (IMAGES.astype(np.int64), r"got int64 .*astype"),
        (np.zeros((1, 3, 6, 10)), r"got float64 .*astype"),
        (IMAGES[:, :5], r"expected uint8 \[N, 6, 10, 3\] or preprocessed float32 \[N, 3, 6, 10\]\. .*fit_image"),
        (IMAGES[..., :1], "with 1 channel: expected red, green and blue"),
        (np.zeros((2, 6, 10, 4), dtype=np.uint8), "with 4 channels: expected red, green and blue"),
        (IMAGES[:0], "expected at least one image"),
        (np.zeros((0, 3, 6, 10), dtype=np.float32), "expected at least one image"),
        (np.zeros((), dtype=np.uint8), r"got uint8 \[\]"),
    ],
)
def test_unusable_images_are_refused_with_a_hint(images: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        preprocess(images, IMAGENET)


def test_checked_batch_is_contiguous_and_else_as_it_was() -> None:
    given = IMAGES[:, :, ::-1]
    checked = Preprocessor(IMAGENET).checked(given)
    assert checked.flags.c_contiguous
    np.testing.assert_array_equal(checked, given)
    assert Preprocessor(IMAGENET).checked(IMAGES) is IMAGES


def test_a_list_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="must be a numpy array; got list"):
        preprocess(IMAGES.tolist(), IMAGENET)
