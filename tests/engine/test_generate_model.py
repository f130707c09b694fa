"""Greedy and sampled generation with the real model, against transformers' whole forward for every token."""

from pathlib import Path

import pytest
import torch
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM, set_seed
from transformers.generation import LogitsProcessorList
from transformers.generation import logits_process as hf

from tp_mamba.engine.generate import generate
from tp_mamba.engine.params import SamplingParams
from tp_mamba.model import MambaForCausalLM as OurModel

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT_LENGTHS = [1, 11, 4]
NEW_TOKENS = 8


@pytest.fixture(scope="module", params=["mamba", "falcon_mamba"])
def oracle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, Path]:
    """A two-layer transformers model whose states matter, and the folder it was saved in."""
    config_class, model_class = {
        "mamba": (MambaConfig, MambaForCausalLM),
        "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM),
    }[request.param]
    set_seed(17)
    config = config_class(
        vocab_size=97, hidden_size=24, state_size=8, num_hidden_layers=2, conv_kernel=4, time_step_rank=3,
        expand=2, eos_token_id=96, tie_word_embeddings=False,
    )  # fmt: skip
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name and "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "dt_proj.bias" in name else 0.3))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(96, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@torch.no_grad()
def by_whole_forwards(model: torch.nn.Module, prompt: list[int], penalty: float) -> list[int]:
    ids = list(prompt)
    processors = LogitsProcessorList([hf.RepetitionPenaltyLogitsProcessor(penalty)])
    for _ in range(NEW_TOKENS):
        input_ids = torch.tensor([ids])
        logits = processors(input_ids, model(input_ids, use_cache=False).logits[:, -1])
        ids.append(logits.argmax(-1).item())
        if ids[-1] == 96:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_is_transformers(oracle: tuple[torch.nn.Module, Path], penalty: float, device: str) -> None:
    reference, folder = oracle
    model = OurModel.from_pretrained(folder, device=device)
    params = SamplingParams(max_new_tokens=NEW_TOKENS, repetition_penalty=penalty)
    expected = [by_whole_forwards(reference, prompt, penalty) for prompt in prompts()]
    assert len({token for ids in expected for token in ids}) > 8, "this model says the same whatever it reads"
    assert [result.token_ids for result in model.generate(prompts(), params)] == expected


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_and_batches_of_the_real_model(oracle: tuple[torch.nn.Module, Path], device: str) -> None:
    model = OurModel.from_pretrained(oracle[1], device=device)
    params = SamplingParams(
        max_new_tokens=NEW_TOKENS, temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=3
    )
    together = generate(model, prompts(), params)
    for limits in (
        {"max_prefill_tokens": 4},
        {"max_batch_size": 1},
        {"max_batch_size": 2, "max_prefill_tokens": 1},
    ):
        assert generate(model, prompts(), params, **limits) == together, limits
