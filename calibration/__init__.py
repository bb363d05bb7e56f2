"""INT8 and FP16 parts along policy-sampled paths: ranges, Q/DQ, typed parts, and the choice of mixed precision."""
