"""Training: packed data, the optimizer over a mesh of data and tensor-parallel ranks, checkpoints, and the loop."""
