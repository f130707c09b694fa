"""Small models of transformers with weights of realistic spread, and the checkpoints they save: the oracles.

The spread matters. At their initial values D is 1, dt is tiny and the norms are 1, so a forgotten D, a missing
bias or an unused norm weight would pass unseen.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM


def randomize(module: nn.Module, seed: int) -> None:
    """Draw every parameter of a transformers model or mixer anew, each from a spread that trained models show."""
    generator = torch.Generator().manual_seed(seed)

    def normal(p: torch.Tensor, std: float, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(p.shape, generator=generator) * std + mean

    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("A_log"):
                value = (
                    torch.rand(p.shape, generator=generator) * (math.log(16) + 1) - 1
                )  # A from -16 to -0.37
            elif name.endswith("dt_proj.bias"):
                dt = 10 ** (torch.rand(p.shape, generator=generator) * 3 - 3)  # dt from 1e-3 to 1
                value = dt + torch.log(-torch.expm1(-dt))
            elif name.endswith(".D") or name == "D":
                value = normal(p, 1.0)
            elif "norm" in name:
                value = normal(p, 0.3, 1.0)
            elif name.endswith("bias"):
                value = normal(p, 0.3)
            elif "embeddings" in name or "lm_head" in name:
                value = normal(p, 1.0)
            else:
                value = normal(p, 1.2 / math.sqrt(p.shape[-1]))
            p.copy_(value)


def mamba(**sizes: Any) -> MambaForCausalLM:
    """A two-layer Mamba; ``sizes`` are fields of its configuration."""
    fields = {
        "hidden_size": 20,
        "state_size": 16,
        "conv_kernel": 4,
        "time_step_rank": 3,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "eos_token_id": 0,
    }
    config = MambaConfig(**{**fields, **sizes})
    torch.manual_seed(0)
    return _ready(MambaForCausalLM(config), seed=1)


def falcon_mamba(**sizes: Any) -> FalconMambaForCausalLM:
    """A two-layer FalconMamba with an odd inner size that its ``expand`` contradicts, as published ones do."""
    fields = {
        "hidden_size": 24,
        "intermediate_size": 37,
        "expand": 16,
        "state_size": 24,
        "conv_kernel": 3,
        "time_step_rank": 5,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "tie_word_embeddings": False,
        "eos_token_id": 11,
    }
    config = FalconMambaConfig(**{**fields, **sizes})
    torch.manual_seed(0)
    return _ready(FalconMambaForCausalLM(config), seed=2)


def _ready(model: Any, seed: int) -> Any:
    randomize(model, seed)
    model.tie_weights()
    return model.eval()


# Every published option at least once on each side: widths, state sizes, biases, ties, residual dtype.
CASES: dict[str, Any] = {
    "mamba": lambda: mamba(),
    "mamba-biased-untied": lambda: mamba(
        use_bias=True,
        use_conv_bias=False,
        tie_word_embeddings=False,
        conv_kernel=2,
        state_size=8,
        hidden_size=21,
    ),
    "mamba-v50280-n1": lambda: mamba(
        vocab_size=50280, hidden_size=9, state_size=1, conv_kernel=3, use_bias=True, time_step_rank=1
    ),
    "mamba-model-dtype-residual": lambda: mamba(residual_in_fp32=False, state_size=24, use_conv_bias=False),
    "falcon-mamba": lambda: falcon_mamba(),
    "falcon-mamba-tied": lambda: falcon_mamba(
        tie_word_embeddings=True, use_bias=True, state_size=16, conv_kernel=4, mixer_rms_eps=1e-3
    ),
}


def save_case(name: str, folder: Path) -> Any:
    """Build case ``name``, save it to ``folder`` with transformers, and return the model."""
    model = CASES[name]()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def full_forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one whole forward pass without a cache, transformers' eager path."""
    return model(input_ids=ids, use_cache=False).logits.float()


@torch.no_grad()
def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """Greedy continuation by one whole forward a token: the cached path of transformers is not an oracle."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(full_forward(model, torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]
