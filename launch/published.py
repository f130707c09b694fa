"""Sizes of the published Mamba-1 checkpoints, to recognise one by its shapes."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """What tells one published model from another."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    time_step_rank: int
    state_size: int
    conv_kernel: int
    vocab_size: int


PUBLISHED = {
    Sizes(768, 1536, 24, 48, 16, 4, 50280): "state-spaces/mamba-130m",
    Sizes(1024, 2048, 48, 64, 16, 4, 50280): "state-spaces/mamba-370m",
    Sizes(1536, 3072, 48, 96, 16, 4, 50280): "state-spaces/mamba-790m",
    Sizes(2048, 4096, 48, 128, 16, 4, 50280): "state-spaces/mamba-1.4b",
    Sizes(2560, 5120, 64, 160, 16, 4, 50280): "state-spaces/mamba-2.8b",
    Sizes(4096, 8192, 64, 256, 16, 4, 65024): "tiiuae/falcon-mamba-7b",
}
