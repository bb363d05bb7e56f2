"""INT8 parts along policy-sampled paths: ranges, Q/DQ, bias correction, part errors, and the mix of precisions."""
