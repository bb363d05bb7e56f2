"""What follows from a network's list of parts alone."""

import pytest

from export.bundle import Bundle


@pytest.mark.parametrize(("n_bytes", "n_images"), [(1, 1), (2 * 65536, 2), (3 * 65536 - 1, 2), (1 << 30, 64)])
def test_images_run_at_once_within_memory(tiny, n_bytes, n_images):
    """The largest activation of an image is 16 x 32 x 32 numbers in float32: 64 KiB."""
    network = Bundle.open(tiny.bundle).network
    assert network.images_within(n_bytes, at_most=64) == n_images
    assert network.bulk_batch == 64


def test_fewer_images_of_a_large_network_run_at_once(random_model):
    from bdtool.models.parts import network_spec

    assert network_spec(random_model("resnet50", has_policy=False)).bulk_batch == (16 << 20) // (4 * 256 * 56 * 56)
