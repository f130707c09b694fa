"""The recurrent state of a mixer: two tensors, checked together before either is touched."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tp_mamba.batch import NULL_SLOT, MambaMetadata
from tp_mamba.kernels.common.dtypes import ANY_FLOAT, FLOATS


class MambaState(NamedTuple):
    """One layer's recurrent state, a row for each slot; updated in place."""

    conv_state: torch.Tensor
    """``[slots, D/n, K-1]``: the last K-1 inputs of the convolution, newest last."""
    ssm_state: torch.Tensor
    """``[slots, D/n, N]``"""


NO_STATE = (None, None)


def state_for(
    name: str,
    state: MambaState | None,
    batch: MambaMetadata,
    conv_shape: tuple[int, int],
    ssm_shape: tuple[int, int],
    device: torch.device,
) -> MambaState | tuple[None, None]:
    """``state`` if ``batch`` can go on from it, two times None if no row of the batch has a slot.

    Args:
        name: the mixer's, for messages.
        conv_shape, ssm_shape: of one slot.
        device: of the hidden states.

    Raises:
        ValueError: the batch names slots that do not exist, or no state was passed for them; the two parts differ in
            their number of slots, or one has another shape than the mixer's, lies elsewhere or is no floating point.
    """
    if state is None or (batch.max_slot == NULL_SLOT and not batch.num_padded_decodes):
        if batch.num_padded_decodes:
            raise ValueError(
                f"{name}: the batch has {batch.num_padded_decodes} decode rows but no state was passed: decoding "
                "continues a state, so pass the layer's slots"
            )
        if batch.max_slot != NULL_SLOT:
            raise ValueError(
                f"{name}: slots are named but no state was passed: pass the layer's slots, or NULL_SLOT"
            )
        return NO_STATE
    conv, ssm = state
    slots = conv.shape[0] if conv.dim() else 0
    for part, tensor, shape in (("conv_state", conv, conv_shape), ("ssm_state", ssm, ssm_shape)):
        if tensor.shape != (slots, *shape):
            raise ValueError(
                f"{name}: {part} has shape {list(tensor.shape)}, it must be {[slots, *shape]}, with as many slots as "
                "conv_state: pass the layer's state from a cache made for this model"
            )
        if tensor.device != device:
            raise ValueError(
                f"{name}: {part} is on {tensor.device} and the hidden states on {device}: make the cache on the "
                "model's device"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: {part} is in {tensor.dtype}: keep states in {ANY_FLOAT}")
    if batch.max_slot >= slots:
        raise ValueError(
            f"{name}: the batch names slot {batch.max_slot} of a state with {slots} slots: pass slots that the cache's "
            "allocate() returned"
        )
    return state
