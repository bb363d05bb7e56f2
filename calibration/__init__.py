"""INT8 parts along policy-sampled paths: ranges, Q/DQ, part errors, candidates, and the choice of mixed precision."""
