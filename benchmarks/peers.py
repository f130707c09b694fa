"""What our times are held against beside the hardware: other programs' times, and our goals.

Recorded once, none of it measured when a benchmark runs.

* GPU: one NVIDIA H200 (141 GB), torch 2.11.0+cu130, Triton 3.6.0, bfloat16, N = 16, medians. "vLLM" is the compiled
  library and the Triton kernels of vLLM 0.33.0, called as its mixer calls them; "vLLM kernel" is its scan kernel
  alone, without the copies around it. "mamba_ssm" is the CUDA kernel of state-spaces/mamba, on a dense,
  channel-major batch. "cuBLAS" is ``torch.nn.functional.linear`` with weights from memory. "GEMMs" are the four
  projections of a layer and nothing else.
* CPU: two cores, float32; "transformers" is transformers 5.23, "GEMMs" the projections alone.

Shapes are those of falcon-mamba-7b (H 4096, D 8192, R 256; D 4096 is the share of one of two ranks) and, on the CPU,
of mamba-130m.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One row of a table, in the table's unit."""

    must: float | None = None
    stretch: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    """Recorded times by program."""


def _rows(names: tuple[str, ...], table: dict[tuple[int, ...], tuple[float | None, ...]]) -> dict:
    """``{sizes: (must, stretch, a time by each of names)}`` as targets."""
    return {
        sizes: Target(
            must=must,
            stretch=stretch,
            peers={name: time for name, time in zip(names, times, strict=True) if time is not None},
        )
        for sizes, (must, stretch, *times) in table.items()
    }


SCAN: dict[tuple[int, int, int], Target] = _rows(
    ("vLLM", "vLLM kernel", "mamba_ssm"),
    {
        (1, 8192, 8192): (0.80, 0.50, 4.22, 3.06, 1.42),
        (16, 512, 8192): (0.52, 0.42, 12.8, 11.7, 1.05),
        (64, 128, 4096): (0.30, 0.22, 23.5, 22.9, None),
        (1, 8192, 4096): (0.60, 0.35, 2.22, 1.57, 0.72),
        (1, 2048, 4096): (0.17, 0.10, 0.59, 0.41, None),
        (1, 32768, 4096): (2.2, 1.3, 9.73, 7.46, 2.98),
    },
)
"""Forward scan with softplus, D skip and gate, by (sequences, tokens of each, D); milliseconds."""

SCAN_BACKWARD: dict[tuple[int, int, int], Target] = _rows(
    ("mamba_ssm",),
    {
        (1, 8192, 8192): (2.5, 1.7, 4.99),
        (16, 512, 8192): (2.1, 1.5, 4.13),
        (4, 2048, 5120): (1.5, 1.1, 2.87),
        (1, 8192, 4096): (1.5, 1.0, 2.68),
    },
)
"""Backward scan with softplus, D skip and gate, by (sequences, tokens of each, D); milliseconds."""

LAYER: dict[tuple[int, int, int], Target] = _rows(
    ("vLLM", "GEMMs"),
    {
        (1, 8192, 8192): (3.7, 3.2, 6.60, 2.51),
        (16, 512, 8192): (3.4, 3.0, 15.3, 2.54),
        (1, 2048, 8192): (1.0, 0.85, 1.74, 0.63),
        (1, 8192, 4096): (2.1, 1.7, 3.45, 1.29),
        (16, 512, 4096): (1.8, 1.55, 7.72, 1.27),
    },
)
"""One mixer, prefill, by (sequences, tokens of each, D); milliseconds."""

DECODE: dict[tuple[int, int], Target] = _rows(
    ("vLLM",),
    {
        (1, 8192): (62, 55, 82.9),
        (8, 8192): (66, 58, 91.6),
        (32, 8192): (80, 70, 114.2),
        (128, 8192): (125, 105, 163.4),
        (256, 8192): (190, 155, 239.5),
        (1, 4096): (38, 31, 62.5),
        (8, 4096): (41, 33, 69.7),
        (32, 4096): (50, 40, 79.5),
        (128, 4096): (75, 62, 105.7),
        (256, 4096): (110, 92, 143.4),
    },
)
"""One layer's decode step, residual add and norm included, by (batch, D); microseconds."""

STATE_UPDATE: dict[tuple[int, int], Target] = _rows(
    ("vLLM",), {(1, 8192): (None, None, 5.1), (32, 8192): (None, None, 16.3), (256, 8192): (None, None, 93.8)}
)
"""The one-token update of the SSM state, by (batch, D); microseconds. Its goal is ``BYTE_MUST`` times the limit."""

BYTE_MUST = {"conv": 1.3, "update": 1.25}
"""How many times their byte limit the convolution (from 2048 tokens) and one-token updates (from batch 32) may take."""

WEIGHTS: dict[str, tuple[int, int]] = {
    "in_proj": (16384, 4096),
    "in_proj, two ranks": (8192, 4096),
    "x_proj": (288, 8192),
    "x_proj, two ranks": (288, 4096),
    "dt_proj": (8192, 256),
    "dt_proj, two ranks": (4096, 256),
    "out_proj": (4096, 8192),
    "out_proj, two ranks": (4096, 4096),
    "lm_head": (65024, 4096),
}
"""The projections of falcon-mamba-7b, (outputs, inputs)."""

GEMM: dict[tuple[str, int], Target] = {
    (name, batch): Target(peers={"cuBLAS": time})
    for name, times in {
        "in_proj": (35.4, 35.8, 36.6, 36.9),
        "in_proj, two ranks": (19.7, 19.8, 20.6, 21.6),
        "x_proj": (6.8, 6.9, 7.0, 8.3),
        "x_proj, two ranks": (6.1, 6.3, 6.5, 6.8),
        "dt_proj": (4.0, 4.0, 4.2, 4.4),
        "out_proj": (21.3, 22.1, 23.1, 24.3),
        "out_proj, two ranks": (13.0, 13.0, 13.7, 12.5),
        "lm_head": (130, 132, 134, 144),
    }.items()
    for batch, time in zip((1, 8, 32, 64), times, strict=True)
}
"""Products of few rows, by (weight, batch); microseconds."""

MEMORY = Target(must=1.05, stretch=1.0)
"""Peak memory of chunked prefill at 131,072 tokens over that at 16,384."""

WHOLE: dict[tuple[str, int, int], Target] = {
    ("decode", 1, 1): Target(must=5.8, stretch=5.2),
    ("decode", 32, 1): Target(must=7.3, stretch=6.4),
    ("decode", 128, 1): Target(must=11.2, stretch=9.6),
    ("decode", 1, 2): Target(must=3.5, stretch=3.0),
    ("decode", 32, 2): Target(must=4.5, stretch=3.9),
    ("decode", 128, 2): Target(must=6.7, stretch=6.0),
    ("prefill", 2048, 1): Target(must=50, stretch=46),
    ("prefill", 2048, 2): Target(must=31, stretch=28),
    ("prefill", 8192, 1): Target(must=205, stretch=190),
    ("prefill", 8192, 2): Target(must=126, stretch=114),
}
"""falcon-mamba-7b as a user gets it, by (what, batch or tokens, GPUs); milliseconds, and unlike the others on H100s."""

WHOLE_ON_H200: dict[tuple[str, int, int], Target] = {
    ("decode", 1, 1): Target(must=4.2, stretch=3.65),
    ("decode", 1, 2): Target(must=2.7, stretch=2.1),
    ("decode", 32, 1): Target(must=5.2, stretch=4.5),
    ("decode", 32, 2): Target(must=3.5, stretch=2.7),
    ("prefill", 8192, 1): Target(must=240, stretch=205),
    ("prefill", 8192, 2): Target(must=140, stretch=115),
}
"""The same on H200s, whose memory is faster by two fifths, as far as goals were set."""

COLLECTIVES: dict[int, Target] = {
    1: Target(must=5, stretch=3),
    32: Target(must=6.5, stretch=4.5),
    256: Target(must=16, stretch=12),
    8192: Target(must=210),
}
"""All-reduce over two GPUs, residual add and norm included, by rows of 4096 in bfloat16; microseconds."""

CPU_PREFILL: dict[int, Target] = {
    512: Target(must=1.0, stretch=0.7, peers={"transformers": 3.39, "GEMMs": 0.38}),
    2048: Target(must=4.5, stretch=3.0, peers={"transformers": 17.1, "GEMMs": 1.68}),
}
"""mamba-130m on two cores, by tokens; seconds."""

CPU_DECODE = Target(must=1e3 / 32, stretch=1e3 / 45, peers={"transformers": 1e3 / 24})
"""Greedy decode at 32, 45 and 24 tokens per second; milliseconds per token."""
