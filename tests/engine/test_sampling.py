"""Sampling against transformers' logits processors, and its freedom from batch, order and rounding."""

import math

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from tp_mamba.engine.choice import NOT_FINITE, RowParams, choose, draw, penalise_repetition, token_weights
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request
from tp_mamba.engine.sampler import Sampler
from tp_mamba.engine.uniforms import UniformStream

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

FILTERS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"min_p": 0.02},
    {"min_p": 0.5},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.5, "top_k": 5, "top_p": 0.3},
]


def reference_scores(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    scores = hf.TemperatureLogitsWarper(params.temperature)(None, logits)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = hf.TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = hf.MinPLogitsWarper(params.min_p)(None, scores)
    return scores


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 97, 4001])
def test_keeps_what_transformers_keeps(vocab_size: int, filters: dict, device: str) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (3 * torch.randn(16, vocab_size, generator=generator)).to(device)
    params = SamplingParams(**{"temperature": 1.0, **filters})
    expected = reference_scores(logits.double(), params)
    weights = token_weights(logits, params)
    resolution = 2.0 ** -(52 - vocab_size.bit_length())
    # A token less likely than the likeliest by more than the resolution rounds to nothing, as documented.
    visible = (expected - expected.amax(-1, keepdim=True)).exp() > resolution / 2
    assert torch.equal(weights > 0, visible)
    probabilities = weights.double() / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(probabilities, expected.softmax(-1), rtol=0, atol=vocab_size * resolution)
    assert weights.sum(-1).max() <= 2**52


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)])
def test_top_p_at_the_very_edge(top_p: float, kept: int) -> None:
    logits, params = torch.zeros(1, 4), SamplingParams(temperature=1.0, top_p=top_p)
    assert (token_weights(logits, params) > 0).sum() == kept
    assert reference_scores(logits, params).isfinite().sum() == kept


@pytest.mark.parametrize("penalty", [0.5, 1.2, 5.0])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 53, generator=generator)
    ids = torch.randint(53, (4, 30), generator=generator)
    seen = torch.zeros(4, 53, dtype=torch.bool).scatter_(1, ids, True)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalise_repetition(logits, seen, penalty), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_draw_inverts_the_cumulative_sum(device: str) -> None:
    weights = torch.tensor([[0, 3, 0, 1, 4, 0]]).expand(6, -1).to(device)
    uniforms = torch.tensor([0.0, 2.9 / 8, 3 / 8, 0.499, 0.5, 1 - 2**-53], dtype=torch.float64, device=device)
    assert draw(weights, uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_draw_never_leaves_the_last_token_when_the_threshold_rounds_up() -> None:
    weights = torch.tensor([[2**51, 0]])
    assert draw(weights, torch.tensor([1.0], dtype=torch.float64)).tolist() == [0]


def test_frequencies_follow_the_probabilities() -> None:
    draws, params = 20_000, SamplingParams(temperature=0.7, top_p=0.9)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(5))
    stream = UniformStream(seed=1, index=0)
    uniforms = torch.tensor([stream.next() for _ in range(draws)], dtype=torch.float64)
    counts = choose(logits.expand(draws, -1), params, uniforms=uniforms).bincount(minlength=12)
    p = reference_scores(logits, params).softmax(-1)[0]
    assert counts[p == 0].sum() == 0
    z = (counts - draws * p)[p > 0] / (draws * p * (1 - p))[p > 0].sqrt()
    assert z.abs().max() < 5


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = 4 * torch.randn(9, 1000, generator=torch.Generator().manual_seed(6))
    uniforms = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    params = SamplingParams(temperature=0.9, top_k=200, top_p=0.95, min_p=0.001)
    together = choose(logits, params, uniforms=uniforms)
    alone = [choose(logits[i : i + 1], params, uniforms=uniforms[i : i + 1]).item() for i in range(9)]
    assert together.tolist() == alone


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=0.7, top_k=3),
    SamplingParams(temperature=1.9, top_k=100_000, top_p=0.9),
    SamplingParams(temperature=0.31, min_p=0.05, repetition_penalty=1.7),
    SamplingParams(temperature=1.3, top_k=40, top_p=0.33, min_p=0.01, repetition_penalty=0.6),
    SamplingParams(repetition_penalty=1.1),
    SamplingParams(temperature=3.1, repetition_penalty=1.3),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [MIXED, MIXED[1:6], MIXED[::6], [MIXED[1]] * 3, MIXED[1:3]], ids=len)
def test_rows_of_different_parameters_choose_as_each_does_alone(
    rows: list[SamplingParams], device: str
) -> None:
    generator = torch.Generator().manual_seed(14)
    sampler = Sampler(len(rows), 1000, 990, torch.device(device))
    for repeat in range(12):
        logits = (4 * torch.randn(len(rows), 1000, generator=generator)).to(device)
        requests = [
            Request(i, prompt, params, position=100 * repeat + i, slot=i)
            for i, (prompt, params) in enumerate(
                zip(torch.randint(990, (len(rows), 300), generator=generator).tolist(), rows, strict=True)
            )
        ]
        alone = []
        for row, request in enumerate(requests):
            params, seen = request.params, torch.zeros(1, 990, dtype=torch.bool, device=device)
            seen[0, request.prompt] = True
            uniform = UniformStream(params.seed, request.position).next()
            uniforms = torch.tensor([uniform], dtype=torch.float64, device=device)
            alone += choose(
                logits[row : row + 1, :990],
                params,
                seen=seen if params.repetition_penalty != 1 else None,
                uniforms=uniforms if params.temperature else None,
            ).tolist()
            sampler.begin(request)
        assert sampler.sample(logits, requests).tolist() == alone


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_a_column_of_parameters_are_those_of_the_numbers(device: str) -> None:
    """To the last bit, which the tokens above need not show."""
    logits = (4 * torch.randn(5, 400, generator=torch.Generator().manual_seed(15))).to(device)
    rows = MIXED[1:6]

    def column(name: str) -> torch.Tensor:
        values = [[getattr(params, name)] for params in rows]
        return torch.tensor(values, device=device, dtype=torch.int64 if name == "top_k" else torch.float64)

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    params = RowParams(**{name: column(name) for name in names}, largest_k=100_000)
    seen = logits > 1
    penalised = penalise_repetition(logits, seen, params.repetition_penalty)
    weights = token_weights(logits, params)
    for i, each in enumerate(rows):
        assert torch.equal(weights[i], token_weights(logits[i : i + 1], each)[0])
        alone = penalise_repetition(logits[i : i + 1], seen[i : i + 1], each.repetition_penalty)
        assert torch.equal(penalised[i], alone[0])


def test_rounding_noise_in_the_logits_hardly_ever_changes_the_token() -> None:
    logits = 4 * torch.randn(2000, 500, generator=torch.Generator().manual_seed(8))
    noise = 1 + 1e-6 * torch.randn(2000, 500, generator=torch.Generator().manual_seed(9))
    uniforms = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    params = SamplingParams(temperature=1.0)
    changed = choose(logits, params, uniforms=uniforms) != choose(logits * noise, params, uniforms=uniforms)
    assert changed.float().mean() < 1e-3


@pytest.mark.gpu
def test_gpu_and_cpu_choose_the_same_tokens() -> None:
    logits = 4 * torch.randn(512, 50_000, generator=torch.Generator().manual_seed(11))
    uniforms = torch.rand(512, dtype=torch.float64, generator=torch.Generator().manual_seed(12))
    params = SamplingParams(temperature=0.9, top_k=2000, top_p=0.99, min_p=1e-4)
    on_gpu = choose(logits.cuda(), params, uniforms=uniforms.cuda())
    assert on_gpu.cpu().equal(choose(logits, params, uniforms=uniforms))


@pytest.mark.gpu
def test_sampling_on_a_gpu_is_deterministic_by_torchs_own_account() -> None:
    logits = torch.randn(1, 5000, device="cuda")
    uniforms = torch.rand(1, dtype=torch.float64, device="cuda")
    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01)
    torch.use_deterministic_algorithms(True)
    try:
        choose(logits, params, uniforms=uniforms)
    finally:
        torch.use_deterministic_algorithms(False)


def test_greedy_is_the_argmax_after_the_penalty() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.9], [-1.0, -3.0, -2.0]])
    seen = torch.tensor([[False, True, False], [True, False, False]])
    assert choose(logits, SamplingParams()).tolist() == [1, 0]
    assert choose(logits, SamplingParams(repetition_penalty=3.0), seen=seen).tolist() == [2, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_that_are_not_finite_are_told_apart(temperature: float, bad: float) -> None:
    logits = torch.randn(3, 20)
    logits[1, 4] = bad
    uniforms = torch.full((3,), 0.5, dtype=torch.float64) if temperature else None
    tokens = choose(logits, SamplingParams(temperature=temperature), uniforms=uniforms)
    assert (tokens == NOT_FINITE).tolist() == [False, True, False]


def test_extreme_temperatures_stay_in_range() -> None:
    logits = 30 * torch.randn(4, 50, generator=torch.Generator().manual_seed(13))
    uniforms = torch.tensor([0.0, 0.3, 0.9, 1 - 2**-53], dtype=torch.float64)
    cold = choose(logits, SamplingParams(temperature=1e-6), uniforms=uniforms)
    assert cold.equal(logits.argmax(-1))
    hot = choose(logits, SamplingParams(temperature=1e30), uniforms=uniforms)
    assert hot.tolist() == [0, 15, 45, 49]


def test_uniforms_are_fixed_by_seed_and_index_alone() -> None:
    def numbers(seed: int, index: int) -> list[float]:
        stream = UniformStream(seed, index)
        return [stream.next() for _ in range(200)]

    first = numbers(0, 0)
    assert first == numbers(0, 0)
    assert not set(first) & (set(numbers(0, 1)) | set(numbers(1, 0)) | set(numbers(2**64 - 1, 0)))
    assert all(0 <= u < 1 for u in first)
    assert abs(sum(first) / 200 - 0.5) < 5 / math.sqrt(12 * 200)
    # Pinned: a text made once must be made again by every later version.
    assert numbers(1234, 5)[:3] == PINNED


PINNED = [0.5762450189723225, 0.31977111332753083, 0.47519711552752286]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 makes nothing"),
        ({"temperature": -0.1}, "temperature=-0.1 is out of range"),
        ({"temperature": 1e-9}, "temperature=1e-09 is out of range"),
        ({"temperature": math.inf}, "temperature=inf is out of range"),
        ({"temperature": math.nan}, "temperature=nan is out of range"),
        ({"top_k": -1}, "top_k=-1 is negative"),
        ({"top_p": 0.0}, "top_p=0.0 is out of range"),
        ({"top_p": 1.01}, "top_p=1.01 is out of range"),
        ({"top_p": math.nan}, "top_p=nan is out of range"),
        ({"min_p": -0.1}, "min_p=-0.1 is out of range"),
        ({"min_p": 1.5}, "min_p=1.5 is out of range"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is out of range"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf is out of range"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"seed": 2**64}, "seed=18446744073709551616 is out of range"),
        ({"stop": "end"}, "stop='end' is one string: give a tuple"),
        ({"stop": ("a", "")}, "stop holds an empty string"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, which is not an integer: give a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True, which is not an integer"),
        ({"max_new_tokens": torch.tensor(3.0)}, r"max_new_tokens is tensor\(3.\), which is not an integer"),
        ({"top_k": 2.0}, "top_k is 2.0, which is not an integer"),
        ({"seed": 1.5}, "seed is 1.5, which is not an integer"),
        ({"seed": torch.tensor(True)}, r"seed is tensor\(True\), which is not an integer"),
        ({"seed": "1"}, "seed is '1', which is not an integer"),
        ({"stop_token_ids": (3, 4.0)}, "an id of stop_token_ids is 4.0, which is not an integer"),
        ({"stop_token_ids": 3}, "stop_token_ids=3 is one value: give a tuple"),
    ],
)
def test_parameters_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_integers_of_numpy_and_torch_become_ints() -> None:
    given = SamplingParams(
        max_new_tokens=np.int32(5),
        top_k=torch.tensor(3),
        seed=np.uint64(2**64 - 1),
        stop_token_ids=[np.int64(7)],
    )
    plain = SamplingParams(max_new_tokens=5, top_k=3, seed=2**64 - 1, stop_token_ids=(7,))
    assert repr(given) == repr(plain)
