"""Images go along their own paths, whatever runs besides."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bdtool.torch_classifier import TorchClassifier
from calibration.walk import everyone_where_nobody, walk_paths
from export.check import OnnxReference

KEEP = np.random.default_rng(0).random((16, 3)) < 0.5


@pytest.fixture(scope="module")
def run_part(bundle):
    """Return a function that runs a part and notes the number of rows in `run_part.rows`."""
    sessions = {p.name: OnnxReference(bundle.part_path(p).read_bytes()) for p in bundle.network.parts}

    def run(part, values):
        run.rows[part.name] = len(values)
        return sessions[part.name].run({part.inputs[0].name: values})[part.outputs[0].name]

    run.rows = {}
    return run


@pytest.mark.parametrize("keep", [KEEP, np.ones_like(KEEP), np.zeros_like(KEEP)], ids=["mixed", "all", "none"])
def test_the_logits_are_those_of_the_masked_network(bundle, tiny, pixels, run_part, keep):
    expected = TorchClassifier(tiny.model).run(pixels, policy=keep).logits
    run_part.rows.clear()
    with torch.inference_mode():
        found = walk_paths(bundle.network, pixels, keep, run_part)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert [run_part.rows.get(f"block_{k:02}", 0) for k in range(3)] == keep.sum(axis=0).tolist()


def test_policy_network_runs_for_all_images_where_there_is_one(bundle, pixels, run_part):
    run_part.rows.clear()
    found = walk_paths(bundle.network, pixels, KEEP, run_part)
    assert run_part.rows.pop("policy") == len(pixels)
    without = replace(bundle.network, parts=tuple(part for part in bundle.network.parts if part.kind != "policy"))
    assert np.array_equal(walk_paths(without, pixels, KEEP, run_part), found)
    assert "policy" not in run_part.rows


def test_all_images_run_besides_what_none_of_them_keeps(bundle):
    extra = everyone_where_nobody(np.array([[True, False, False], [False, False, True]]))
    rows = {part.name: extra(part).tolist() for part in bundle.network.parts if part.kind != "full"}
    assert {name: found for name, found in rows.items() if found} == {"block_01": [0, 1]}


def test_rows_that_run_besides_change_nothing(bundle, pixels, run_part):
    plain = walk_paths(bundle.network, pixels, KEEP, run_part)
    dropped = {f"block_{k:02}": np.flatnonzero(~KEEP[:, k])[:2] for k in range(3)}
    nothing = np.array([], dtype=np.int64)
    found = walk_paths(bundle.network, pixels, KEEP, run_part, extra=lambda part: dropped.get(part.name, nothing))
    assert np.array_equal(found, plain)
    assert [run_part.rows[f"block_{k:02}"] for k in range(3)] == (KEEP.sum(axis=0) + 2).tolist()
