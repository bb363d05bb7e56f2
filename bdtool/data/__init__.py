"""Images in: files, data sets and synthetic pictures become uint8 batches of the network's input size."""
