"""What `/metrics` tells, in Prometheus's text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Histogram:
    """Counts of values up to each of a few bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count ``value``."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Its samples under ``name``."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.9g}"
        yield f"{name}_count {total}"


class Metrics:
    """The numbers of one server; whoever knows one sets it, on the loop's thread."""

    def __init__(self) -> None:
        self.running = self.waiting = self.slots = self.open = self.connections = 0
        self.prompt_tokens = self.new_tokens = self.reused_tokens = 0
        self.finished: Counter[str] = Counter()
        """Texts by the reason of their end, ``"abort"`` where nobody wanted the rest."""
        self.answers: Counter[int] = Counter()
        """HTTP answers by status."""
        self.first_token = Histogram(_LATENCY)
        self.per_token = Histogram(_PER_TOKEN)
        self.whole = Histogram(_WHOLE)

    def text(self) -> str:
        """All of it, as a scraper reads it."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        gauges = (
            ("requests_running", "Requests that have a state slot.", self.running),
            ("requests_waiting", "Requests that wait for a state slot.", self.waiting),
            ("requests_open", "Requests whose answers are not finished.", self.open),
            (
                "http_requests_open",
                "HTTP requests that are being answered, this one included.",
                self.connections,
            ),
            ("state_slots", "Sequences that run at a time.", self.slots),
        )
        for name, text, value in gauges:
            yield from _head(name, text, "gauge")
            yield f"tp_mamba_{name} {value}"
        counters = (
            ("prompt_tokens_total", "Tokens of the prompts taken on.", self.prompt_tokens),
            ("new_tokens_total", "Tokens made.", self.new_tokens),
            (
                "prefix_cache_hit_tokens_total",
                "Prompt tokens that a kept state stood for.",
                self.reused_tokens,
            ),
        )
        for name, text, value in counters:
            yield from _head(name, text, "counter")
            yield f"tp_mamba_{name} {value}"
        yield from _head("texts_finished_total", "Texts that have ended, by reason.", "counter")
        for reason, count in sorted(self.finished.items()):
            yield f'tp_mamba_texts_finished_total{{reason="{reason}"}} {count}'
        yield from _head("http_answers_total", "HTTP answers, by status.", "counter")
        for status, count in sorted(self.answers.items()):
            yield f'tp_mamba_http_answers_total{{status="{status}"}} {count}'
        histograms = (
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", self.first_token),
            ("time_per_output_token_seconds", "Between two tokens of one text, its mean.", self.per_token),
            ("request_seconds", "From a request's arrival to the end of its text.", self.whole),
        )
        for name, text, histogram in histograms:
            yield from _head(name, text, "histogram")
            yield from histogram.lines(f"tp_mamba_{name}")


def _head(name: str, text: str, kind: str) -> Iterator[str]:
    yield f"# HELP tp_mamba_{name} {text}"
    yield f"# TYPE tp_mamba_{name} {kind}"
