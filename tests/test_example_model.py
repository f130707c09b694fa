"""The trained model in examples/: its size, that it has learned, and that transformers computes the same from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tp_mamba import MambaForCausalLM, SamplingParams, load_tokenizer
from tp_mamba.parallel.group import TensorParallel

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FOLDER = EXAMPLES / "shakespeare-mamba-hf"
PROMPT = "ROMEO:\nO, "


@pytest.fixture(scope="module")
def model() -> MambaForCausalLM:
    return MambaForCausalLM.from_pretrained(FOLDER, TensorParallel(device="cpu"), torch.float32)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6_000_000


def test_it_has_learned(model: MambaForCausalLM) -> None:
    (recorded,) = re.findall(r"Validation loss \*\*([0-9.]+)\*\*", (EXAMPLES / "README.md").read_text())
    assert float(recorded) <= 1.55
    text = (EXAMPLES / "tinyshakespeare.txt").read_bytes()
    valid = torch.tensor(list(text[round(len(text) * 0.9) :][: 6 * 1024 + 1]))
    loss = model.loss(valid[:-1].view(6, 1024), valid[1:].view(6, 1024)).item()
    assert abs(loss - float(recorded)) < 0.2  # a twentieth of what the record is about


def test_transformers_goes_on_in_the_same_words(model: MambaForCausalLM) -> None:
    tokenizer = load_tokenizer(FOLDER)
    ids = tokenizer.encode(PROMPT).ids
    assert AutoTokenizer.from_pretrained(FOLDER)(PROMPT).input_ids == ids == list(PROMPT.encode())
    (ours,) = model.generate([ids], SamplingParams(max_new_tokens=60), tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([[*ids, *ours.token_ids]]), use_cache=False).logits[0]
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == list(ours.token_ids)
    words = re.findall(r"[a-z]+", ours.text.lower())
    assert {"the", "and", "to", "of", "a", "i", "my", "that", "you", "is", "in", "not"} & set(words)
