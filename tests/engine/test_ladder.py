"""Which capacity a step is padded to."""

import pytest

from tp_mamba.engine.ladder import MAX_TOKENS, Ladder, Rung


@pytest.mark.parametrize(
    ("slots", "budget"), [(1, 1), (1, 8192), (3, 5), (32, 64), (100, 300), (256, 8192), (300, 1)]
)
def test_every_step_finds_the_least_rung_that_holds_it(slots: int, budget: int) -> None:
    ladder = Ladder(slots, budget)
    rungs = ladder.rungs()
    assert rungs[0] == ladder.largest
    assert len(set(rungs)) == len(rungs)
    for rows in range(1, slots + 1):
        rung = ladder.for_step(rows, rows, decodes=True)
        assert rung in rungs
        assert rung == min(r for r in rungs if r.decodes and r.sequences >= rows)
    for tokens in {1, 2, 15, 16, 17, 100, 255, 256, 257, 321, 1000, MAX_TOKENS, slots + budget} - {0}:
        for sequences in {1, 2, 8, 9, 64, 65, slots}:
            if sequences > min(tokens, slots) or tokens > slots + budget:
                continue
            rung = ladder.for_step(tokens, sequences, decodes=False)
            if tokens > MAX_TOKENS:
                assert rung is None
                continue
            assert rung in rungs
            fitting = [r for r in rungs if not r.decodes and r.tokens >= tokens and r.sequences >= sequences]
            assert rung == min(fitting)


def test_padding_is_bounded() -> None:
    """A padded token costs as much as a real one from some 256 tokens on; a padded row of a decode step little."""
    ladder = Ladder(256, 8192)
    for tokens in range(257, MAX_TOKENS + 1):
        assert ladder.for_step(tokens, 1, decodes=False).tokens <= 1.25 * tokens
    for rows in range(33, 257):
        assert ladder.for_step(rows, rows, decodes=True).sequences <= 1.5 * rows


def test_a_long_prompt_is_not_cut_like_a_batch() -> None:
    """The scan's launch follows from the number of sequences."""
    ladder = Ladder(256, 8192)
    assert ladder.for_step(2000, 1, decodes=False) == Rung(2048, 1, decodes=False)
    assert ladder.for_step(2000, 200, decodes=False) == Rung(2048, 256, decodes=False)
