"""Blocked layouts: packing loses nothing and puts every value where the layout's name says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.layouts import CHANNELS_LAST, block_size, pack, unpack

LAYOUTS = st.sampled_from(["NCHW", "NCHW4c", "NCHW8c", "NCHW16c"])


@given(layout=LAYOUTS, n=st.integers(0, 3), blocks=st.integers(1, 3), h=st.integers(1, 5), w=st.integers(1, 5))
def test_unpack_undoes_pack(layout, n, blocks, h, w):
    shape = (n, blocks * block_size(layout), h, w)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    packed = pack(values, layout)
    assert packed.shape == shape
    np.testing.assert_array_equal(unpack(packed, layout), values)
    np.testing.assert_array_equal(pack(unpack(values, layout), layout), values)


def test_packed_channels_lie_side_by_side():
    values = np.random.default_rng(0).normal(size=(2, 16, 3, 5)).astype(np.float32)
    packed = pack(values, "NCHW8c").reshape(2, 2, 3, 5, 8)
    for n, c, y, x in [(0, 0, 0, 0), (1, 9, 2, 4), (0, 7, 1, 3), (1, 15, 0, 2)]:
        assert packed[n, c // 8, y, x, c % 8] == values[n, c, y, x]


def test_channels_last_puts_all_channels_of_a_pixel_side_by_side():
    values = np.random.default_rng(0).normal(size=(2, 6, 3, 5)).astype(np.float32)
    packed = pack(values, CHANNELS_LAST)
    assert packed.shape == values.shape
    np.testing.assert_array_equal(packed.reshape(2, 3, 5, 6), values.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(unpack(packed, CHANNELS_LAST), values)


def test_images_of_a_batch_stay_apart_when_packed():
    """The runtime picks rows of packed batches, so image i must stay row i."""
    values = np.random.default_rng(0).normal(size=(4, 8, 2, 3)).astype(np.float32)
    np.testing.assert_array_equal(pack(values, "NCHW8c")[[2, 0]], pack(values[[2, 0]], "NCHW8c"))


def test_vectors_are_never_packed():
    values = np.ones((2, 16), np.float32)
    assert pack(values, "NCHW16c") is values
    assert unpack(values, "NCHW16c") is values


@pytest.mark.parametrize("name", ["NHWC", "NCHW16", "nchw8c", ""])
def test_unknown_layout_is_refused(name):
    with pytest.raises(ValueError, match="unknown layout"):
        block_size(name)
