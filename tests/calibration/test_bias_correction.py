"""Corrected biases take back the mean error of rounding, in the parts alone and along the paths."""

import numpy as np
import pytest

from calibration.bias_correction import correct_biases, n_images_for_correction
from calibration.part_errors import CandidatePart
from calibration.paths import PathBatch, part_ranges
from calibration.quantize import quantize_part
from calibration.walk import walk_paths
from export.check import OnnxReference

KEEP = np.random.default_rng(0).random((16, 3)) < 0.6
COARSE = 6  # times the range: rounds so coarsely that the shift is far above the noise of 16 images


@pytest.fixture(scope="module")
def fp32(bundle):
    return lambda part: bundle.part_path(part).read_bytes()


@pytest.fixture(scope="module")
def batch(pixels):
    return PathBatch(first=0, images=pixels, keep=KEEP)


@pytest.fixture(scope="module")
def quantized(bundle, watched, collect, fp32):
    """Return a function that gives the INT8 models of all parts but the policy network, in coarse steps."""
    collector = collect(KEEP, at_least=4)

    def models(integer_activations=True):
        found = {}
        for name, part in watched.items():
            if name != "policy" and (integer_activations or part.part.kind == "block"):
                ranges = part_ranges(bundle.network, part, collector, method="min-max", percentile=99.99)
                coarse = {key: COARSE * largest for key, largest in ranges.items()}
                found[name] = quantize_part(
                    fp32(part.part),
                    part.part,
                    coarse,
                    integer_activations=integer_activations,
                    weights=part.part.kind != "head",
                )
        return found

    return models


@pytest.fixture(scope="module")
def logits(bundle, batch, fp32):
    """Return a function that runs the batch along its paths, with some parts in INT8."""

    def run(models):
        candidates = {name: CandidatePart(bundle.network.part(name), data) for name, data in models.items()}

        def run_part(part, values):
            if part.name in candidates:
                return candidates[part.name].run(values)
            return OnnxReference(fp32(part)).run({part.inputs[0].name: values})[part.outputs[0].name]

        return walk_paths(bundle.network, batch.images, batch.keep, run_part)

    return run


def test_the_mean_of_the_logits_is_that_of_fp32(bundle, batch, fp32, quantized, logits):
    before = quantized()
    after = correct_biases(bundle.network, fp32, before, batch, at_least=4, chained=True)
    expected = logits({})
    shift = np.abs(logits(before) - expected).mean(axis=0).max()
    assert np.abs((logits(after) - expected).mean(axis=0)).max() < 1e-4 < shift / 10
    assert np.square(logits(after) - expected).mean() < 0.8 * np.square(logits(before) - expected).mean()


def test_only_biases_change(bundle, batch, fp32, quantized):
    before = quantized()
    after = correct_biases(bundle.network, fp32, before, batch, at_least=4, chained=True)
    assert set(after) == set(before)
    assert {name for name in before if before[name] != after[name]} == set(before) - {"shortcut_01", "shortcut_02"}
    assert all(len(before[name]) == len(after[name]) for name in before)


def test_parts_that_stand_alone_do_not_depend_on_the_others(bundle, batch, fp32, quantized):
    models = quantized(integer_activations=False)
    together = correct_biases(bundle.network, fp32, models, batch, at_least=4, chained=False)
    alone = correct_biases(bundle.network, fp32, {"block_02": models["block_02"]}, batch, at_least=4, chained=False)
    assert alone["block_02"] == together["block_02"] != models["block_02"]


def test_a_part_that_nobody_runs_is_corrected_on_images_that_top_it_up(bundle, pixels, fp32, quantized):
    nobody = PathBatch(first=0, images=pixels, keep=np.tile([True, False, True], (16, 1)))
    models = quantized()
    after = correct_biases(bundle.network, fp32, models, nobody, at_least=4, chained=True)
    assert after["block_01"] != models["block_01"]


def test_the_images_are_bounded(bundle):
    assert n_images_for_correction(bundle.network) == 256
