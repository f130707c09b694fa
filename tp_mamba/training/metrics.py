"""What a run measures: one JSON object per line, and from it TensorBoard's events and a plot."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from tp_mamba.checkpoint.atomic import replacing_file
from tp_mamba.quoting import shown_path

METRICS: Final = "metrics.jsonl"
PLOT: Final = "losses.png"
TENSORBOARD: Final = "tensorboard"
"""Names in the folder of a run."""


def check_extras(*, tensorboard: bool, plot: bool) -> None:
    """Refuse what a package that is not installed is needed for.

    Raises:
        ValueError: one is missing.
    """
    for wanted, flag, package in (
        (tensorboard, "--tensorboard", "tensorboard"),
        (plot, "--plot", "matplotlib"),
    ):
        if wanted and find_spec(package) is None:
            raise ValueError(
                f"{flag} needs the package {package}: pip install 'tp-mamba[train]', or leave it out"
            )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run so far; a last line that a killed process left half written is left out."""
    records = []
    path = run / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class Metrics:
    """Keeps the records of a run; rank 0 has one."""

    def __init__(self, run: Path, step: int, *, tensorboard: bool = False) -> None:
        """Go on after ``step``: records of later steps, of a run that went further before it ended, are dropped."""
        self._run = run
        kept = [record for record in read_metrics(run) if record.get("step", 0) <= step]
        with replacing_file(run / METRICS) as path:
            path.write_text("".join(map(_line, kept)), encoding="utf-8")
        self._file = (run / METRICS).open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run / TENSORBOARD), purge_step=step + 1)

    def add(self, step: int, **values: float) -> None:
        """Record ``values`` of ``step``; each is a line of TensorBoard's too."""
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def plot_losses(run: Path) -> Path:
    """Draw the losses over the steps, of training and of validation, as a PNG in the folder of the run.

    Raises:
        ValueError: there are no records.
    """
    records = read_metrics(run)
    if not records:
        raise ValueError(f"{shown_path(run)} has no {METRICS} to draw: train first")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("valid_loss", "validation")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(run / PLOT))
    return run / PLOT
