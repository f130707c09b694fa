"""What callers may pass for prompts and parameters, and what each wrong thing is told."""

import math

import numpy as np
import pytest
import torch
from toy_model import ToyModel, prompts_of

from tp_mamba.engine.generate import generate, stream
from tp_mamba.engine.params import SamplingParams

PARAMS = SamplingParams(max_new_tokens=4)


def test_a_tensor_of_ids_as_transformers_users_pass_it() -> None:
    rows = prompts_of([5, 5, 5])
    expected = generate(ToyModel(), rows, PARAMS)
    assert generate(ToyModel(), torch.tensor(rows), max_new_tokens=4) == expected
    assert generate(ToyModel(), np.array(rows), max_new_tokens=4) == expected
    assert generate(ToyModel(), torch.tensor(rows[0]), max_new_tokens=4) == expected[:1]
    assert generate(ToyModel(), torch.tensor(rows[:1], dtype=torch.int32), PARAMS) == expected[:1]


def test_what_a_mask_says_is_padding_is_left_out() -> None:
    rows = prompts_of([3, 5])
    expected = generate(ToyModel(), rows, PARAMS)
    left, right = torch.tensor([[0, 0, *rows[0]], rows[1]]), torch.tensor([[*rows[0], 0, 0], rows[1]])
    left_mask, right_mask = [[0, 0, 1, 1, 1], [1] * 5], [[1, 1, 1, 0, 0], [1] * 5]
    for ids, mask in ((left, left_mask), (right, right_mask)):
        assert generate(ToyModel(), ids, PARAMS, attention_mask=torch.tensor(mask)) == expected
    one = torch.tensor(rows[0])
    assert generate(ToyModel(), one, PARAMS, attention_mask=torch.ones(3)) == expected[:1]


@pytest.mark.parametrize(("where", "row"), [("begin", [7, 5, 6]), ("end", [5, 6, 7])])
def test_rows_that_may_be_padded_are_refused_without_a_mask(where: str, row: list[int]) -> None:
    ids = torch.tensor([row, [1, 2, 3]])
    with pytest.raises(
        ValueError, match=f"some rows of prompts {where} with the id 7, others do not, so it may"
    ):
        stream(ToyModel(eos=(7,)), ids, PARAMS)
    padded = ToyModel(eos=(3,))
    padded.config.pad_token_id = 7
    with pytest.raises(ValueError, match=f"some rows of prompts {where} with the id 7"):
        stream(padded, ids, PARAMS)
    # A token that every row has there, or a list of prompts, is what it says it is.
    both = torch.tensor([row, row])
    assert generate(ToyModel(eos=(7,)), both, PARAMS) == generate(ToyModel(eos=(7,)), [row, row], PARAMS)
    assert len(generate(ToyModel(eos=(7,)), [row, [1, 2, 3]], PARAMS)) == 2


def test_keywords_replace_fields_of_params() -> None:
    model, prompts = ToyModel(), prompts_of([3, 4])
    params = SamplingParams(max_new_tokens=9, temperature=0.9, seed=5)
    expected = generate(model, prompts, SamplingParams(max_new_tokens=2, temperature=0.9, seed=5))
    assert generate(model, prompts, params, max_new_tokens=2) == expected
    assert generate(model, prompts, [params, params], max_new_tokens=2) == expected
    assert generate(model, prompts, max_new_tokens=2, temperature=0.9, seed=5) == expected


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (torch.tensor(3), {}, r"got prompts of shape \[\]: token ids are \[B, L\] or \[L\]"),
        (torch.zeros(2, 0, dtype=torch.long), {}, r"got prompts of shape \[2, 0\]"),
        (torch.zeros(1, 1, 1, dtype=torch.long), {}, r"got prompts of shape \[1, 1, 1\]"),
        (torch.zeros(1, 2), {}, r"a token id of prompt 0 is 0.0, which is not an integer"),
        (
            torch.ones(1, 2).long(),
            {"attention_mask": torch.ones(2)},
            r"attention_mask is \[2\] beside prompts",
        ),
        (torch.ones(1, 2).long(), {"attention_mask": torch.zeros(1, 2)}, "prompt 0 is empty"),
        ([[1]], {"attention_mask": torch.ones(1, 1)}, "attention_mask was given with a list of prompts"),
        (3, {}, "prompts is 3: give a list of prompts, or a tensor"),
        ([np.int64(3)], {}, "prompt 0 is .*3.*: a prompt is a sequence of token ids"),
        ([[1]], {"do_sample": True}, "do_sample is no option of generation: there are max_new_tokens, temp"),
        ([[1]], {"params": 5}, r"params is 5: give SamplingParams\(...\), one for each prompt in a list, or"),
        ([[1]], {"params": {"seed": 1}}, "params is {'seed': 1}: give SamplingParams"),
        (
            [[1], [2]],
            {"params": [PARAMS]},
            "got 1 SamplingParams for 2 prompts: give one for all, or one for",
        ),
        ([[1]], {"params": [3]}, "params is 3: give SamplingParams"),
        ([[1]], {"temperature": "0.5"}, "temperature is '0.5', which is not a number"),
    ],
)
def test_wrong_prompts_and_options_are_refused(prompts: object, options: dict, message: str) -> None:
    model = ToyModel()
    with pytest.raises(ValueError, match=message):
        stream(model, prompts, **options)  # type: ignore[arg-type]
    assert not model.caches


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize(
    "value", ["0.5", None, True, [0.5], 1j, np.array([0.5, 0.6]), torch.ones(2), 10**400]
)
def test_numbers_are_numbers(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*which is not a number: give one, as in 0.5") as error:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert error.value.__cause__ is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop": (1,)}, "stop holds 1, which is not a string: give strings, or ids as stop_token_ids"),
        ({"stop": None}, r"stop=None holds no strings: give a tuple of them, \(\) for none"),
        ({"stop": 3}, "stop=3 holds no strings"),
        ({"stop": (b"x",)}, "stop holds b'x', which is not a string"),
        ({"stop_token_ids": None}, "stop_token_ids=None is one value"),
        ({"stop_token_ids": "12"}, "an id of stop_token_ids is '1', which is not an integer"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no': give True or False"),
        ({"ignore_eos": None}, "ignore_eos is None: give True or False"),
        ({"max_new_tokens": None}, "max_new_tokens is None, which is not an integer"),
    ],
)
def test_every_field_is_checked_for_its_type(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_numbers_of_numpy_and_torch_become_floats() -> None:
    given = SamplingParams(temperature=np.float32(0.5), top_p=torch.tensor(0.25), min_p=0, stop=["a"])
    assert repr(given) == repr(SamplingParams(temperature=0.5, top_p=0.25, min_p=0.0, stop=("a",)))
    assert math.copysign(1, SamplingParams(temperature=0).temperature) == 1
