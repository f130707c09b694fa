"""Numbers that the plain-torch paths of the scan and of its one-step update share, so that both round alike."""

LOG2_E = 1.4426950408889634
"""``exp(x) = exp2(x * LOG2_E)``: torch has exp2 at four times the speed of exp on a CPU. The time step takes the
factor."""

MATMUL_STATES = 32
"""States summed by a matrix product, which adds one after the other; above, ``sum`` adds by a tree and rounds less."""
