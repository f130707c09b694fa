"""generation_config.json: its ends of text and its padding count, its sampling defaults do not."""

import json
from pathlib import Path

import pytest
import torch
from model_factory import greedy, save_case

from tp_mamba.model import MambaForCausalLM

PROMPT = [5, 17, 33]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A checkpoint, and what it says to the prompt if nothing ends it."""
    folder = tmp_path_factory.mktemp("model")
    return folder, greedy(save_case("mamba", folder), PROMPT, 8)


def generated(folder: Path, generation_config: object) -> tuple[list[int], str]:
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    (result,) = MambaForCausalLM.from_pretrained(folder).generate([PROMPT], max_new_tokens=8)
    return result.token_ids, result.finish_reason


def test_an_end_declared_there_alone_ends_a_text(saved: tuple[Path, list[int]]) -> None:
    folder, free = saved
    end = next(i for i in range(1, 8) if free[i] not in free[:i])
    assert generated(folder, {"eos_token_id": [96, free[end]]}) == (free[: end + 1], "eos")
    assert generated(folder, {"eos_token_id": free[end]}) == (free[: end + 1], "eos")
    model = MambaForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_ids == (free[end],), "it takes the place of config.json's"


def test_without_one_the_configs_own_counts_and_sampling_defaults_do_not(
    saved: tuple[Path, list[int]],
) -> None:
    folder, free = saved
    assert 0 not in free
    defaults = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 2, "repetition_penalty": 9.0}
    assert generated(folder, defaults) == (free, "length")
    assert MambaForCausalLM.from_pretrained(folder).config.eos_token_ids == (0,)


def test_the_id_of_padding_is_the_one_declared_there(saved: tuple[Path, list[int]]) -> None:
    """Rows of a tensor that begin with it, some more often than others, are not taken for prompts as they stand."""
    folder, _ = saved
    prompts = torch.tensor([[7, *PROMPT], [5, 6, 7, 8]])
    generated(folder, {})
    assert len(MambaForCausalLM.from_pretrained(folder).generate(prompts, max_new_tokens=1)) == 2
    generated(folder, {"pad_token_id": 7})
    with pytest.raises(ValueError, match="begin with the id 7, others do not, so it may be padding"):
        MambaForCausalLM.from_pretrained(folder).generate(prompts, max_new_tokens=1)
