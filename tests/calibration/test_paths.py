"""Each block sees only the images that reach and keep it, and their activations as its earlier blocks left them."""

import numpy as np
import torch

from bdtool.models.parts import part_modules
from calibration.paths import PathBatch, TopUp, part_ranges, stage_keys

ALL = np.ones((16, 3), dtype=bool)


def test_a_block_counts_the_images_that_keep_it(collect):
    keep = ALL.copy()
    keep[4:, 1] = False
    collector = collect(keep)
    assert collector.n_images("block_01/x") == 4
    assert collector.n_images("shortcut_01/y") == 12
    assert collector.n_images("block_02/x") == 16


def test_inputs_depend_on_the_blocks_that_ran_before(tiny, collect, pixels):
    keep = np.tile([False, True, True], (16, 1))
    modules = part_modules(tiny.model)
    with torch.inference_mode():
        x = modules["stem"](torch.from_numpy(pixels))  # block 0 keeps the shape: dropped, it passes x on
        y = modules["block_01"](x)
    found = collect(keep)
    assert np.isclose(found.range_of("block_01/x", method="min-max"), float(x.abs().max()), rtol=1e-5)
    assert np.isclose(found.range_of("block_02/x", method="min-max"), float(y.abs().max()), rtol=1e-5)
    everyone = collect(ALL)
    assert not np.isclose(everyone.range_of("block_01/x", method="min-max"), float(x.abs().max()), rtol=0.01)


def test_a_rare_block_is_topped_up_without_changing_the_paths(collect):
    keep = np.tile([True, True, False], (16, 1))
    keep[0, 2] = True
    plain, topped = collect(keep), collect(keep, at_least=5)
    assert plain.n_images("block_02/x") == 1
    assert topped.n_images("block_02/x") == 5
    assert topped.n_images("shortcut_01/y") == 5  # no image drops block 1
    assert topped.n_images("head/logits") == plain.n_images("head/logits") == 16
    assert np.array_equal(topped.histogram("head/logits").counts, plain.histogram("head/logits").counts)


def test_the_first_images_that_do_not_run_a_block_top_it_up_in_the_batch_they_are_in(bundle, pixels):
    keep = ALL.copy()
    keep[8:, 2] = False
    top_up = TopUp.plan(bundle.network, keep, at_least=10)
    assert top_up.rows == {"block_02": {8, 9}, "shortcut_01": set(range(10)), "shortcut_02": {0, 1}}
    halves = slice(0, 8), slice(8, 16)
    batches = [PathBatch(first=rows.start, images=pixels[rows], keep=keep[rows]) for rows in halves]
    block, shortcut = bundle.network.part("block_02"), bundle.network.part("shortcut_01")
    assert [top_up.of(block, batch).tolist() for batch in batches] == [[], [0, 1]]
    assert [top_up.of(shortcut, batch).tolist() for batch in batches] == [[*range(8)], [0, 1]]
    everyone = TopUp.plan(bundle.network, keep, at_least=99)
    assert everyone.rows["block_02"] == set(range(8, 16))


def test_a_stage_ends_where_the_shape_changes(bundle):
    keys = stage_keys(bundle.network)
    assert [keys[f"block_{k:02}"] for k in range(3)] == [
        ("stage 0", "stage 0"),
        ("stage 0", "stage 1"),
        ("stage 1", "stage 2"),
    ]
    assert (keys["shortcut_01"], keys["shortcut_02"]) == (keys["block_01"], keys["block_02"])
    assert (keys["stem"], keys["head"]) == (("", "stage 0"), ("stage 2", ""))


def test_a_stage_has_one_range_for_all_its_activations(collect):
    collector = collect(ALL)
    single = [collector.range_of(key, method="min-max") for key in ("stem/y", "block_00/y", "block_01/x")]
    assert collector.range_of("stage 0", method="min-max") == max(single)


def test_ranges_of_a_part_are_of_the_percentile_asked_for(bundle, watched, collect):
    collector = collect(ALL)
    half, most = (
        part_ranges(bundle.network, watched["block_00"], collector, method="percentile", percentile=percentile)
        for percentile in (50, 99)
    )
    assert half["x"] < most["x"] < collector.range_of("stage 0", method="min-max")
