"""Tensor parallelism itself: the group, its collectives, and how tensors are cut over the ranks."""
