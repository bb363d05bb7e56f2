"""Policies that give each image bits of its own: which image of the data set a batch begins with."""

import numpy as np
import pytest

from bdtool.errors import PolicyError

K = 6


def test_file_of_rows_must_fit_the_batch_unless_it_is_said_where_it_begins(fake, images_of, tmp_path):
    runtime, file = fake(max_batch=2).runtime, str(tmp_path / "rows.npy")
    rows = np.random.default_rng(0).integers(0, 2, (5, K)).astype(bool)
    np.save(file, rows)
    np.testing.assert_array_equal(runtime.run(images_of(range(5)), policy=file).policy, rows)
    np.testing.assert_array_equal(runtime.run(images_of(range(3)), policy=file, first=2).policy, rows[2:])
    with pytest.raises(PolicyError, match=r"rows\.npy: got 5 rows for 3 images, expected one row .* Pass `first`"):
        runtime.run(images_of(range(3)), policy=file)
    with pytest.raises(ValueError, match="first: got -2, expected the number of an image, from 0 on"):
        runtime.run(images_of(range(2)), policy=file, first=-2)
    with pytest.raises(PolicyError, match=r"has 5 rows, but image 5"):
        runtime.run(images_of(range(3)), policy=file, first=3)


def test_file_is_read_again(fake, images_of, tmp_path):
    runtime, file = fake().runtime, str(tmp_path / "row.npy")
    for row in (np.ones(K), np.zeros(K)):
        np.save(file, row)
        np.testing.assert_array_equal(runtime.run(images_of([1]), policy=file).policy[0], row == 1)


def test_random_bits_go_on_from_the_number_of_an_image(fake, images_of):
    runtime = fake(max_batch=8).runtime
    together = runtime.run(images_of(range(8)), policy="random:3").policy
    alone = [runtime.run(images_of([i]), policy="random:3", first=i).policy[0] for i in range(8)]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(runtime.run(images_of([5]), policy="random:3").policy[0], together[0])
    assert len(np.unique(together, axis=0)) > 1
