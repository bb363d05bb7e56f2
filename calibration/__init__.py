"""Room for INT8 and FP16 calibration along policy-sampled paths; it holds no code yet."""
