"""Tensor-parallel building blocks: linear layers, the embedding and language-model head, RMSNorm."""
