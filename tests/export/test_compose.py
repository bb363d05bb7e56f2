"""Composed models compute what their parts compute one after the other."""

import numpy as np
import onnx
import pytest

from export.bundle import Bundle
from export.check import OnnxReference
from export.compose import compose_parts


def _compose(bundle, keep):
    """Compose the path of one keep vector, as a caller of `compose_parts` would."""
    network, chosen = bundle.network, [bundle.network.require("stem")]
    for k, kept in enumerate(keep):
        part = network.blocks[k] if kept else network.shortcut(k)
        chosen += [] if part is None else [part]
    chosen.append(network.require("head"))
    return compose_parts("path", [(part, bundle.part_path(part).read_bytes()) for part in chosen])


@pytest.mark.parametrize("bits", ["000", "010", "101", "110", "111"])
def test_composed_path_equals_masked_forward(tiny, preprocessed, torch_logits, bits):
    images = preprocessed(tiny.model, 3)
    keep = np.array([[bit == "1" for bit in bits]] * 3)
    reference = OnnxReference(_compose(Bundle.open(tiny.bundle), keep[0]))
    expected = torch_logits(tiny.model, images, keep)
    np.testing.assert_allclose(reference.run({"image": images})["logits"], expected, atol=1e-5, rtol=1e-5)


def test_composing_all_kept_blocks_gives_full(tiny, preprocessed):
    bundle = Bundle.open(tiny.bundle)
    images = preprocessed(tiny.model, 2)
    full = OnnxReference(bundle.part_path(bundle.network.require("full")).read_bytes())
    composed = OnnxReference(_compose(bundle, [True] * 3))
    np.testing.assert_array_equal(composed.run({"image": images})["logits"], full.run({"image": images})["logits"])


def test_inner_stretch_keeps_its_own_input_and_output_names(tiny):
    bundle = Bundle.open(tiny.bundle)
    parts = bundle.network.blocks[:2]
    data = compose_parts("stretch", [(part, bundle.part_path(part).read_bytes()) for part in parts])
    graph = onnx.ModelProto.FromString(data).graph
    assert [info.name for info in graph.input] == ["x"]
    assert [info.name for info in graph.output] == ["y"]
    assert "Identity" not in {node.op_type for node in graph.node}
