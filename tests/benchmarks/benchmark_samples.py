"""Tiny instances of every benchmark's workload."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import tp_mamba.mixer
import tp_mamba.model
from benchmarks import (
    backward,
    checking,
    collectives,
    conv,
    cpu,
    decode,
    gemm,
    layer,
    limits,
    long,
    norm,
    peers,
    scan,
    scan_backward,
    state_update,
    whole,
)
from benchmarks.case import Case, Workload
from benchmarks.ceilings import H200
from benchmarks.timing import Samples
from tp_mamba.config import MambaConfig
from tp_mamba.parallel import communicate

TINY = MambaConfig(
    model_type="falcon_mamba",
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    state_size=4,
    conv_kernel=4,
    time_step_rank=3,
    vocab_size=61,
    tie_word_embeddings=False,
    mixer_norm="weightless",
)

TINY_TIED = dataclasses.replace(TINY, model_type="mamba", mixer_norm="none", tie_word_embeddings=True)

# What is built, and the function whose result goes wrong to see that the check would notice.
WORKLOADS: dict[str, tuple[Callable[..., Workload], Any, str]] = {
    "scan, full": (
        partial(scan.build, sequences=3, length=9, channels=10, form="full", states=4),
        scan,
        "selective_scan_fn",
    ),
    "scan, mixer": (
        partial(scan.build, sequences=1, length=30, channels=10, form="mixer", states=4),
        scan,
        "selective_scan_fn",
    ),
    "scan backward, full": (
        partial(scan_backward.build, sequences=3, length=9, channels=10, form="full", states=4),
        scan_backward,
        "backward",
    ),
    "scan backward, mixer": (
        partial(scan_backward.build, sequences=1, length=70, channels=10, form="mixer", states=4),
        scan_backward,
        "backward",
    ),
    "conv": (partial(conv.build_forward, sequences=3, length=9, channels=10), conv, "causal_conv1d_fn"),
    "conv update": (partial(conv.build_update, batch=5, channels=10, copies=3), conv, "causal_conv1d_update"),
    "state update, full": (
        partial(state_update.build, batch=5, channels=10, form="full", states=4, copies=3),
        state_update,
        "selective_state_update",
    ),
    "state update, mixer": (
        partial(state_update.build, batch=1, channels=10, form="mixer", states=4, copies=2),
        state_update,
        "selective_state_update",
    ),
    "backward of the convolution": (
        partial(backward.build_convolution, sequences=2, length=9, channels=12),
        backward,
        "convolution",
    ),
    "backward of the norm": (
        partial(backward.build_added_norm, tokens=7, hidden=24),
        backward,
        "added_norm",
    ),
    "backward of the time steps": (
        partial(backward.build_time_steps, tokens=7, channels=12, rank=6),
        backward,
        "time_steps",
    ),
    "add and norm": (partial(norm.build_add, tokens=7, hidden=24, copies=2), norm, "add_rms_norm"),
    "split and norms": (partial(norm.build_split, tokens=7, rank=6, states=4, copies=2), norm, "split_dt_bc"),
    "sum and norm": (
        partial(collectives.build, rows=7, form="ours", hidden=24),
        communicate,
        "add_rms_norm",
    ),
    "sum and split": (
        partial(collectives.build, rows=7, form="NCCL, split", rank=6),
        communicate,
        "split_dt_bc",
    ),
    "dt_proj and softplus": (
        partial(gemm.build_linear_softplus, tokens=7, channels=20, rank=8, copies=2),
        gemm,
        "linear_softplus",
    ),
    "wide product": (
        partial(gemm.build_product, batch=3, rows=20, columns=32, wide=True, copies=2),
        gemm,
        "_wide_product",
    ),
    "our wide product": (
        partial(gemm.build_product, batch=3, rows=20, columns=32, wide=True, ours=True, copies=2),
        gemm,
        "skinny_linear",
    ),
    "our product": (
        partial(gemm.build_product, batch=3, rows=20, columns=32, wide=False, ours=True, copies=2),
        gemm,
        "skinny_linear",
    ),
    "product": (
        partial(gemm.build_product, batch=3, rows=20, columns=32, wide=False, copies=2),
        gemm,
        "_product",
    ),
    "layer": (
        partial(layer.build, sequences=3, length=15, channels=160, hidden=96, rank=6),
        tp_mamba.mixer.MambaMixer,
        "forward",
    ),
    "decode": (
        partial(decode.build, batch=17, channels=160, hidden=96, rank=6, states=4, layers=3),
        tp_mamba.mixer.MambaMixer,
        "forward",
    ),
    "long, kernels": (
        partial(long.build_kernels, tokens=40, channels=10, checked=4, states=4),
        long,
        "causal_conv1d_fn",
    ),
    "long, layer": (
        partial(long.build_layer, tokens=70, channels=160, chunk=32, prefix=16, hidden=96, rank=6),
        tp_mamba.mixer.MambaMixer,
        "forward",
    ),
    "long, memory": (
        partial(long.build_memory, config=TINY, chunk=16, short=40, long=100),
        tp_mamba.model.MambaForCausalLM,
        "forward_packed",
    ),
    "whole decode": (
        partial(whole.build_decode, batch=3, replay=False, config=TINY),
        tp_mamba.model.MambaForCausalLM,
        "forward_packed",
    ),
    "whole prefill": (
        partial(whole.build_prefill, tokens=20, replay=True, checked=16, config=TINY),
        tp_mamba.model.MambaForCausalLM,
        "forward_packed",
    ),
    "cpu prefill": (
        partial(cpu.build_prefill, tokens=20, config=TINY_TIED),
        tp_mamba.model.MambaForCausalLM,
        "forward",
    ),
    "cpu decode": (
        partial(cpu.build_decode, prompt=6, new=5, config=TINY_TIED),
        tp_mamba.model.MambaForCausalLM,
        "forward_packed",
    ),
}


@torch.no_grad()
def built(name: str) -> Workload:
    return WORKLOADS[name][0](torch.Generator().manual_seed(5))


def toy(
    name: str,
    *,
    error: float = 0.0,
    measure: Callable[[int], Samples] | None = None,
    own_limit: float | None = None,
    **fields: Any,
) -> Case:
    """A case of one output, off by ``error``, whose samples are 2, 3, 4, .. ms."""

    def build(generator: torch.Generator) -> Workload:
        exact = torch.randn(100, generator=generator, dtype=torch.float64)
        return Workload(
            check=lambda: [checking.compare("out", (exact * (1 + error)).float(), exact)],
            measure=measure or (lambda samples: Samples(tuple(1e-3 * (i + 2) for i in range(samples)))),
            limit=own_limit,
        )

    defaults = {
        "unit": "ms",
        "sizes": {"batch": 1, "D": 8},
        "limit": limits.by_bytes(1e-3 * H200.bandwidth),
        "target": peers.Target(must=3.5, stretch=3.0, peers={"vLLM": 7.0}),
        "work": (7, "tokens"),
    }
    return Case(name=name, build=build, **{**defaults, **fields})
