"""From PyTorch modules to a bundle of ONNX parts: export, composition, numeric checks and the bundle format."""
