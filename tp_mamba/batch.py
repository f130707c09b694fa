"""What a packed batch is made of: which tokens belong to which sequence, and where each one keeps its state.

A packed batch ``[T, H]`` holds its decode tokens first, one per sequence, and its prefill tokens after them,
sequence by sequence. Decode rows may be padded up to a fixed count, so that a captured graph can be replayed
for fewer sequences; the padding rows point at :data:`NULL_SLOT` and change no state.

Letters: ``T`` packed tokens, ``S`` sequences (padding rows counted), ``D`` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

NULL_SLOT = -1
"""The state index of a row without a slot: its state is neither read nor written."""

# Every piece of a staged buffer starts on a multiple of this many bytes. Triton compiles one kernel for
# pointers that divide by 16 and another for those that do not: pieces packed tightly would recompile as the
# batch changes its make-up.
_ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MambaMetadata:
    """The make-up of one packed batch, with ``S = num_padded_decodes + num_prefills`` rows.

    Counts are host integers; the tensors that each layer reads lie on the device, cut once per batch. What spans both
    kinds of rows is derived when it is asked for. Made by :class:`MambaMetadataBuilder`.
    """

    num_decodes: int
    """Sequences that advance by one token."""
    num_padded_decodes: int
    """Decode rows of the batch, padding rows included; at least ``num_decodes``."""
    num_prefills: int
    """Sequences, or pieces of one, that are taken in several tokens at a time."""
    num_prefill_tokens: int
    """The sum of their lengths."""
    max_slot: int
    """The highest slot of any row, :data:`NULL_SLOT` if none has one; known without asking the device."""
    decode_state_indices: torch.Tensor | None
    """``[num_padded_decodes]`` int32: each decode row's slot; None for a batch made without any."""
    prefill_query_start_loc: torch.Tensor
    """``[num_prefills + 1]`` int32, counted from the first prefill token."""
    prefill_has_initial_states: torch.Tensor | None
    """``[num_prefills]`` bool; None: no prefill continues a state."""
    prefill_state_indices: torch.Tensor | None
    """``[num_prefills]`` int32; None: no prefill has a slot."""

    @property
    def num_tokens(self) -> int:
        """``T``: the rows of the packed hidden states, padding included."""
        return self.num_padded_decodes + self.num_prefill_tokens

    @property
    def query_start_loc(self) -> torch.Tensor:
        """``[S + 1]`` int32: row ``s`` holds tokens ``query_start_loc[s]`` up to ``query_start_loc[s + 1]``."""
        starts = self.prefill_query_start_loc
        rows = torch.arange(self.num_padded_decodes, dtype=torch.int32, device=starts.device)
        return torch.cat([rows, starts + self.num_padded_decodes])

    @property
    def has_initial_states(self) -> torch.Tensor:
        """``[S]`` bool: the row continues from the state in its slot (decode rows do; padding rows do not)."""
        device, initial = self.prefill_query_start_loc.device, self.prefill_has_initial_states
        if initial is None:
            initial = torch.zeros(self.num_prefills, dtype=torch.bool, device=device)
        return torch.cat([torch.arange(self.num_padded_decodes, device=device) < self.num_decodes, initial])

    @property
    def state_indices(self) -> torch.Tensor:
        """``[S]`` int32: each row's slot in the state cache, :data:`NULL_SLOT` for none."""
        device, counts = self.prefill_query_start_loc.device, (self.num_padded_decodes, self.num_prefills)
        slots = (self.decode_state_indices, self.prefill_state_indices)
        return torch.cat(
            [
                torch.full((count,), NULL_SLOT, dtype=torch.int32, device=device) if part is None else part
                for part, count in zip(slots, counts, strict=True)
            ]
        )


def whole_sequences(count: int, length: int, device: torch.device) -> MambaMetadata:
    """``count`` sequences of ``length`` tokens, each from its beginning, that leave no state; all by device operations.

    Sequences without tokens need no row.
    """
    count = count if length else 0
    starts = torch.arange(0, count * length + 1, max(length, 1), dtype=torch.int32, device=device)
    return MambaMetadata(
        num_decodes=0,
        num_padded_decodes=0,
        num_prefills=count,
        num_prefill_tokens=count * length,
        max_slot=NULL_SLOT,
        decode_state_indices=None,
        prefill_query_start_loc=starts,
        prefill_has_initial_states=None,
        prefill_state_indices=None,
    )


def packed_sequences(lengths: Sequence[int], device: torch.device | str) -> MambaMetadata:
    """Sequences of ``lengths`` tokens, packed one after the other, each from its beginning, that leave no state.

    Raises:
        ValueError: a length below 1.
    """
    count = len(lengths)
    return MambaMetadataBuilder(device).build(
        prefill_slots=[NULL_SLOT] * count, prefill_lengths=lengths, has_initial_states=[False] * count
    )


def next_tokens(ids_T: torch.Tensor, metadata: MambaMetadata, missing: int) -> torch.Tensor:
    """For each of the packed ``ids [T]`` the one that follows in its sequence, ``missing`` after the last, int64."""
    following = torch.roll(ids_T.long(), -1)
    following[metadata.query_start_loc[1:].long() - 1] = missing
    return following


_TORCH_DTYPES = {
    np.bool_: torch.bool,
    np.int32: torch.int32,
    np.int64: torch.int64,
    np.float64: torch.float64,
}


def copy_to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The one-dimensional ``arrays`` (bool, int32, int64 or float64) on ``device``, by one copy.

    On a GPU the copy comes from pinned memory and nothing waits for it. The results are views of one buffer,
    each aligned to 16 bytes.
    """
    offsets = list(accumulate((-(-a.nbytes // _ALIGNMENT) * _ALIGNMENT for a in arrays), initial=0))
    staged = torch.zeros(offsets[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for offset, array in zip(offsets, arrays, strict=False):
        staged.numpy()[offset : offset + array.nbytes] = array.view(np.uint8)
    buffer = staged.to(device, non_blocking=True)
    return [
        buffer[offset : offset + a.nbytes].view(_TORCH_DTYPES[a.dtype.type])
        for offset, a in zip(offsets, arrays, strict=False)
    ]


class MambaMetadataBuilder:
    """Builds the :class:`MambaMetadata` of packed batches on one device."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def build(
        self,
        *,
        decode_slots: Sequence[int] = (),
        prefill_slots: Sequence[int] = (),
        prefill_lengths: Sequence[int] = (),
        has_initial_states: Sequence[bool] = (),
        num_padded_decodes: int | None = None,
    ) -> MambaMetadata:
        """Describe a batch of ``len(decode_slots)`` decode tokens, then ``len(prefill_slots)`` prefills.

        Everything reaches the device in one copy, from pinned memory to a GPU, and nothing waits for it.

        Args:
            decode_slots: state slot of each decoding sequence.
            prefill_slots: state slot of each prefill; :data:`NULL_SLOT` keeps no state.
            prefill_lengths: tokens of each prefill.
            has_initial_states: for each prefill, whether it continues from the state in its slot (a later
                piece of a prompt) or starts from nothing.
            num_padded_decodes: decode rows to lay out; the decodes alone by default.

        Raises:
            ValueError: the three prefill lists differ in length, a length is negative, a slot is below
                :data:`NULL_SLOT` or belongs to two rows, or there are more decodes than
                ``num_padded_decodes``.
        """
        num_decodes, num_prefills = len(decode_slots), len(prefill_slots)
        padded = num_decodes if num_padded_decodes is None else num_padded_decodes
        _check(decode_slots, prefill_slots, prefill_lengths, has_initial_states, padded)

        padding = [NULL_SLOT] * (padded - num_decodes)
        starts = list(accumulate(prefill_lengths, initial=0))
        ints = [np.asarray(v, dtype=np.int32) for v in ([*decode_slots, *padding], starts, prefill_slots)]
        decode_indices, prefill_starts, prefill_indices, initial = copy_to_device(
            [*ints, np.asarray(has_initial_states, dtype=np.bool_)], self.device
        )
        return MambaMetadata(
            num_decodes=num_decodes,
            num_padded_decodes=padded,
            num_prefills=num_prefills,
            num_prefill_tokens=starts[-1],
            max_slot=max((*decode_slots, *prefill_slots), default=NULL_SLOT),
            decode_state_indices=decode_indices,
            prefill_query_start_loc=prefill_starts,
            prefill_has_initial_states=initial,
            prefill_state_indices=prefill_indices,
        )


def _check(
    decode_slots: Sequence[int],
    prefill_slots: Sequence[int],
    prefill_lengths: Sequence[int],
    has_initial_states: Sequence[bool],
    num_padded_decodes: int,
) -> None:
    """Refuse what :meth:`MambaMetadataBuilder.build` documents as wrong."""
    if not len(prefill_slots) == len(prefill_lengths) == len(has_initial_states):
        raise ValueError(
            f"got {len(prefill_slots)} prefill_slots, {len(prefill_lengths)} prefill_lengths and "
            f"{len(has_initial_states)} has_initial_states: give one of each per prefill"
        )
    for i, length in enumerate(prefill_lengths):
        if length < 1:
            raise ValueError(
                f"prefill {i} has length {length}: a prefill takes in at least one token, leave it out"
            )
    for i, (slot, initial) in enumerate(zip(prefill_slots, has_initial_states, strict=True)):
        if initial and slot == NULL_SLOT:
            raise ValueError(
                f"prefill {i} continues a state but has no slot: give the slot that holds the state"
            )
    if num_padded_decodes < len(decode_slots):
        raise ValueError(
            f"num_padded_decodes={num_padded_decodes} is below the {len(decode_slots)} decodes of the batch: "
            "padding adds rows, it cannot drop any"
        )
    seen: set[int] = set()
    for slot in (*decode_slots, *prefill_slots):
        if slot < NULL_SLOT:
            raise ValueError(
                f"state slot {slot} does not exist: slots count from 0, and {NULL_SLOT} means no slot"
            )
        if slot in seen:
            raise ValueError(
                f"state slot {slot} is given to two rows of the batch: two sequences cannot share a state"
            )
        if slot != NULL_SLOT:
            seen.add(slot)


class PrefillDecodeSplit(NamedTuple):
    """The two kinds of a packed batch, each with its own tokens and its own part of the metadata; all views.

    ``P`` is ``num_padded_decodes``, ``F`` is ``num_prefills``, ``T_p`` is ``num_prefill_tokens``.
    """

    hidden_states_BC_p: torch.Tensor  # noqa: N815 (vLLM's name)
    """``[T_p, D]``"""
    hidden_states_BC_d: torch.Tensor  # noqa: N815
    """``[P, D]``"""
    gate_p: torch.Tensor
    """``[T_p, D]``"""
    gate_d: torch.Tensor
    """``[P, D]``"""
    state_indices_tensor_p: torch.Tensor | None
    """``[F]`` int32; None where no prefill has a slot"""
    state_indices_tensor_d: torch.Tensor | None
    """``[P]`` int32; None for a batch made without decode rows"""
    query_start_loc_p: torch.Tensor
    """``[F + 1]`` int32, counted from the first prefill token"""
    has_initial_states_p: torch.Tensor | None
    """``[F]`` bool; None where no prefill continues a state"""


def check_rows(what: str, rows: int, metadata: MambaMetadata) -> None:
    """Raise ValueError unless a packed batch of ``rows`` rows, ``what`` in the sentence, is what metadata describes."""
    if rows != metadata.num_tokens:
        raise ValueError(
            f"{what} has {rows} rows but the metadata describes {metadata.num_tokens} tokens "
            f"({metadata.num_padded_decodes} decode rows, {metadata.num_prefill_tokens} prefill tokens): "
            "pass the metadata built for this batch"
        )


def split_batch_to_prefill_and_decode(
    hidden_states_BC: torch.Tensor, gate: torch.Tensor, metadata: MambaMetadata
) -> PrefillDecodeSplit:
    """Cut ``hidden_states_BC [T, D]`` and ``gate [T, D]`` after the decode rows; nothing is copied.

    Raises:
        ValueError: either tensor has other than ``metadata.num_tokens`` rows.
    """
    check_rows("hidden_states_BC", len(hidden_states_BC), metadata)
    check_rows("gate", len(gate), metadata)
    cut = metadata.num_padded_decodes
    return PrefillDecodeSplit(
        hidden_states_BC_p=hidden_states_BC[cut:],
        hidden_states_BC_d=hidden_states_BC[:cut],
        gate_p=gate[cut:],
        gate_d=gate[:cut],
        state_indices_tensor_p=metadata.prefill_state_indices,
        state_indices_tensor_d=metadata.decode_state_indices,
        query_start_loc_p=metadata.prefill_query_start_loc,
        has_initial_states_p=metadata.prefill_has_initial_states,
    )
