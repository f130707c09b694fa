"""The sizes and the activation that the kernels serve: one home for the limits and for the sentences that refuse."""

from __future__ import annotations

MAX_STATE_SIZE = 256
"""Largest state size N: the states of 32 channels stay in the registers of one program up to here."""

MIN_CONV_WIDTH, MAX_CONV_WIDTH = 2, 4
"""Widths K of the convolution: the taps that Mamba's checkpoints have, unrolled in the kernels."""

ACTIVATIONS = ("silu", "swish")
"""Names of one function, ``x * sigmoid(x)``."""


def check_state_size(what: str, n: int, error: type[ValueError] = ValueError) -> None:
    """Raise ``error`` for a state size N outside ``1..256``; ``what`` begins the sentence, as in ``op: A``."""
    if not 1 <= n <= MAX_STATE_SIZE:
        raise error(
            f"{what} has a state size N of {n} but N must be 1 to {MAX_STATE_SIZE}; use a smaller state"
        )


def check_conv_width(what: str, width: int, error: type[ValueError] = ValueError) -> None:
    """Raise ``error`` for a convolution width K outside ``2..4``; ``what`` begins the sentence."""
    if not MIN_CONV_WIDTH <= width <= MAX_CONV_WIDTH:
        raise error(
            f"{what} has a convolution width K of {width} but K must be {MIN_CONV_WIDTH} to {MAX_CONV_WIDTH}; "
            "use another convolution"
        )


def check_activation(what: str, activation: object, error: type[ValueError] = ValueError) -> None:
    """Raise ``error`` unless ``activation`` is one of :data:`ACTIVATIONS`; ``what`` begins the sentence."""
    if activation not in ACTIVATIONS:
        raise error(f'{what} has the unknown activation {activation!r}; use "silu", also called "swish"')
