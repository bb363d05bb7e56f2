"""Bias correction: rounding shifts the mean of what a layer gives, and its bias takes the shift back.

Rounded weights and activations leave an error whose mean over images and pixels is not zero. It is the same for every
image, so it does not average out from block to block, but moves the logits. Here the fp32 parts and the int8 parts run
side by side along the policy's paths; each layer's bias gets the difference of the means, channel by channel, in
running order, so that later layers see what the corrected ones give.
Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2
and appendix D (empirical variant). Differs: a convolution that feeds an addition directly is corrected so that the mean
of the sum is right, which also takes back the shift of the activation that reaches the addition on the shortcut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bdtool.specs import NetworkSpec, PartSpec
from calibration.part_errors import CandidatePart
from calibration.paths import PathBatch, TopUp
from calibration.quantize import direct_operands
from calibration.walk import walk_paths

_BIASED = ("Conv", "Gemm")  # operators with a bias, their third input
_MOST_IMAGES = 256  # means settle with few images, each of which brings all of its pixels
_ACTIVATION_BYTES = 256 << 20  # of the largest activation of all images, in fp32 and in int8
_BATCH = 64


def n_images_for_correction(network: NetworkSpec) -> int:
    """Return how many images of a calibration set to correct on: few enough for bounded memory."""
    return network.images_within(_ACTIVATION_BYTES // 2, at_most=_MOST_IMAGES)


def correct_biases(
    network: NetworkSpec,
    fp32: Callable[[PartSpec], bytes],
    models: Mapping[str, bytes],
    batch: PathBatch,
    *,
    at_least: int,
    chained: bool,
    on_part: Callable[[int], None] = lambda n_parts: None,
) -> dict[str, bytes]:
    """Return the int8 models with corrected biases.

    Args:
        network: with float32 activations.
        fp32: returns the model of a part in fp32.
        models: by part name; a part without one stays fp32.
        batch: all images to correct on; with the activations that they leave they are held in memory.
        at_least: images that each part must see; others top it up, as in `TopUp.plan`.
        chained: the int8 parts run one after the other, so that each is corrected on what the corrected ones before it
            give. False corrects each on the fp32 activations: whatever runs before it may be fp32, too.
        on_part: called with the number of parts done.
    """
    corrected = dict(models)
    n_done = 0

    def run(part: PartSpec, pairs: np.ndarray) -> np.ndarray:
        """Take and return float32 [n, 2, ...]: what fp32 gives an image, and what int8 gives it."""
        nonlocal n_done
        fp32_values, expected = _outputs_and_means(part, onnx.ModelProto.FromString(fp32(part)), pairs[:, 0])
        int8_values = fp32_values
        if part.name in models:
            model = onnx.ModelProto.FromString(models[part.name])
            int8_values = _correct_part(part, model, expected, pairs[:, 1])
            corrected[part.name] = model.SerializeToString(deterministic=True)
        n_done += 1
        on_part(n_done)
        return np.stack([fp32_values, int8_values if chained else fp32_values], axis=1)

    top_up = TopUp.plan(network, batch.keep, at_least=at_least)
    images = np.stack([batch.images, batch.images], axis=1)
    walk_paths(network, images, batch.keep, run, extra=lambda part: top_up.of(part, batch))
    return corrected


def _correct_part(
    part: PartSpec, model: onnx.ModelProto, expected: Mapping[str, np.ndarray], values: np.ndarray
) -> np.ndarray:
    """Correct the biases of a model in place, one after the other; return what it then makes of `values`."""
    for bias in _corrected_tensors(model):
        _, means = _outputs_and_means(part, model, values)
        _shift_bias(model, bias, expected[bias] - means[bias])
    return _outputs_and_means(part, model, values)[0]


def _corrected_tensors(model: onnx.ModelProto) -> dict[str, str]:
    """Return the biases of a model by name, in running order: each with the tensor whose mean it is to set right."""
    direct = direct_operands(model)
    sums = {name: node.output[0] for node in model.graph.node if node.op_type == "Add" for name in node.input}
    layers = [node for node in model.graph.node if node.op_type in _BIASED and len(node.input) > 2]
    return {n.input[2]: sums[n.output[0]] if n.output[0] in direct else n.output[0] for n in layers}


def _outputs_and_means(
    part: PartSpec, model: onnx.ModelProto, values: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return what a part makes of float32 values [N, ...], and by bias the means by channel of `_corrected_tensors`."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    tensors = _corrected_tensors(model)
    missing = sorted(set(tensors.values()) - {output.name for output in probed.graph.output})
    probed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in missing)
    candidate = CandidatePart(part, probed.SerializeToString())
    results: list[np.ndarray] = []
    sums: dict[str, np.ndarray] = {}
    for first in range(0, len(values), _BATCH):
        outputs = candidate.outputs(candidate.feeds(values[first : first + _BATCH]))
        results.append(candidate.floats(outputs))
        for bias, tensor in tensors.items():
            sums[bias] = sums.get(bias, 0) + _sum_by_channel(outputs[tensor])
    return np.concatenate(results), {bias: total / len(values) for bias, total in sums.items()}


def _sum_by_channel(values: np.ndarray) -> np.ndarray:
    """Return the sum over images of the means over pixels, float64 [C], of values [N, C, ...]."""
    sums: np.ndarray = values.reshape(*values.shape[:2], -1).mean(axis=2, dtype=np.float64).sum(axis=0)
    return sums


def _shift_bias(model: onnx.ModelProto, name: str, shift: np.ndarray) -> None:
    bias = next(initializer for initializer in model.graph.initializer if initializer.name == name)
    values = numpy_helper.to_array(bias) + shift
    bias.CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
