"""Tensor-parallel Mamba-1 in PyTorch."""
