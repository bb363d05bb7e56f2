"""The ways from activations to a range, by name. Loads no ONNX Runtime, so that help is quick; see `ranges`."""

METHODS = ("mse", "min-max", "percentile", "entropy")
DEFAULT_METHOD = "mse"
DEFAULT_PERCENTILE = 99.99
