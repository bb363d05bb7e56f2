"""The parity ladder of a bundle, from digests to the accuracy, and what each rung compares."""
