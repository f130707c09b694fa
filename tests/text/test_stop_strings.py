"""Stop strings against their definition, for every way of cutting the text."""

import itertools
import random

import pytest

from tp_mamba.text.stop_strings import StopStrings


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first that completes a stop ends the text, without the longest completed."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    watcher, out = StopStrings(stops), ""
    for piece in pieces:
        out += watcher.push(piece)
        whole = reference("".join(pieces), stops)[0]
        assert whole.startswith(out), "text was given out that does not belong to the result"
        if watcher.stopped:
            return out, True
    return out + watcher.flush(), False


def test_every_cut_of_small_texts() -> None:
    rng = random.Random(0)
    for _ in range(150):
        text = "".join(rng.choices("ab", k=7))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        expected = reference(text, stops)
        for cuts in itertools.product([False, True], repeat=len(text) - 1):
            edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(text)]
            assert run([text[a:b] for a, b in itertools.pairwise(edges)], stops) == expected, (text, stops)


@pytest.mark.parametrize("piece", ["ab", "abcab", "xabcabc"])
def test_no_more_is_held_back_than_may_become_a_stop(piece: str) -> None:
    watcher = StopStrings(["abcabd"])
    held = next(n for n in range(len(piece), -1, -1) if "abcabd".startswith(piece[len(piece) - n :]))
    assert watcher.push(piece) == piece[: len(piece) - held]
    assert watcher.flush() == piece[len(piece) - held :]


def test_without_stops_everything_passes_at_once() -> None:
    watcher = StopStrings([])
    assert (watcher.push("text"), watcher.flush(), watcher.stopped) == ("text", "", False)
