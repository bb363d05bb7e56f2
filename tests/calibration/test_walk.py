"""Images go along their own paths, whatever runs besides."""

import numpy as np
import pytest
import torch

from bdtool.torch_classifier import TorchClassifier
from calibration.walk import walk_paths
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


def test_rows_that_run_besides_change_nothing(bundle, pixels, run_part):
    plain = walk_paths(bundle.network, pixels, KEEP, run_part)
    dropped = {f"block_{k:02}": np.flatnonzero(~KEEP[:, k])[:2] for k in range(3)}
    nothing = np.array([], dtype=np.int64)
    found = walk_paths(bundle.network, pixels, KEEP, run_part, extra=lambda part: dropped.get(part.name, nothing))
    assert np.array_equal(found, plain)
    assert [run_part.rows[f"block_{k:02}"] for k in range(3)] == (KEEP.sum(axis=0) + 2).tolist()
