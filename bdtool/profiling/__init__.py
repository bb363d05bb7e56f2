"""Latency of strategies, side by side in one run, with what a reader needs to trust the figures."""
