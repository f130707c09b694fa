"""vLLM's four functions, in the order of its version 0.33 and, where that differs, of older versions too.

One slot number means no slot: the null block 0 of newer versions (``null_block_id``), or -1 of older ones
(``pad_slot_id``). Slot lists may be longer than a batch has sequences: the rest is ignored.
"""

from tp_mamba.kernels.compat.vllm.convolution import causal_conv1d_fn, causal_conv1d_update
from tp_mamba.kernels.compat.vllm.scan import selective_scan_fn
from tp_mamba.kernels.compat.vllm.step import selective_state_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "selective_scan_fn", "selective_state_update"]
