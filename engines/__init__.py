"""Inference backends, one a file: build engines from ONNX parts, load them and run them."""
