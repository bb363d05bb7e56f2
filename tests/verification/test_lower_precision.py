"""What parts of a lower precision are compared on: the activations of the paths that they were calibrated for."""

import numpy as np

from bdtool.data.synthetic import synthetic_images
from bdtool.runtime.preprocess import preprocess
from bdtool.torch_classifier import TorchClassifier
from bdtool.verification.lower_precision import flips_bound, path_probes
from export.bundle import Bundle


def test_probes_follow_the_paths(tiny):
    network = Bundle.open(tiny.bundle).network
    pixels = preprocess(synthetic_images(2, height=32, width=32), network.preprocessing)
    keep = np.array([[True, False, True], [True, False, False]])
    found = {
        probe.part.name: probe for probe in path_probes(TorchClassifier(tiny.model).run_part, network, pixels, keep)
    }
    assert set(found) == {part.name for part in network.parts}
    dropped = found["shortcut_01"].expected["y"]  # both images drop block 1
    assert np.array_equal(found["block_02"].feeds["x"], dropped[:1])
    assert np.array_equal(found["shortcut_02"].feeds["x"], dropped[1:])
    assert np.array_equal(found["block_01"].feeds["x"], found["block_00"].expected["y"])  # nobody keeps it: all run it
    expected = TorchClassifier(tiny.model).run(pixels, policy=np.ones_like(keep)).logits
    np.testing.assert_allclose(found["full"].expected["logits"], expected, atol=1e-5, rtol=1e-5)


def test_more_flips_than_measured_are_noise_up_to_a_bound():
    assert flips_bound(0.0, 100) * 100 >= 1  # a single bit
    assert 0.01 < flips_bound(0.01, 1000) < 0.02
    assert flips_bound(0.01, 10_000) < flips_bound(0.01, 1000)
