"""What a run leaves for a reader besides the artifact: its curve with times, a plot, TensorBoard's files."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.distill.meter import Meter
from compress.errors import UnsupportedError
from compress.files import write_bytes_atomically

CSV, PLOT = "training.csv", "loss.svg"
COLUMNS = (
    "step", "tokens", "loss", "divergence", "cross_entropy", "hidden", "rate", "norm", "tokens_per_second", "mfu",
)  # fmt: skip


class RunReport:
    """Writes into `folder` as the run goes. tensorboard: event files as well.

    UnsupportedError, with the command that installs it, without tensorboard.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._rows: list[dict[str, Any]] = []
        self._board = _board(folder) if tensorboard else None

    def record(self, record: Mapping[str, float], meter: Meter) -> None:
        """One update; see `train.Training`."""
        speed = {"tokens_per_second": meter.tokens_per_second, "mfu": meter.mfu}
        row = {**record, "tokens": record["step"] * meter.tokens, **speed}
        self._rows.append(row)
        if self._board is not None:
            for name in COLUMNS[2:]:
                if row[name] is not None:
                    self._board.add_scalar(name, row[name], int(record["step"]))

    def finish(self, curve: Sequence[Mapping[str, float]], looks: Sequence[Mapping[str, float]]) -> list[Path]:
        """Write the CSV, and the plot where matplotlib is installed; returns what was written."""
        lines = [",".join(COLUMNS)] + [",".join(_cell(row[c]) for c in COLUMNS) for row in self._rows]
        write_bytes_atomically(self.folder / CSV, ("\n".join(lines) + "\n").encode())
        written = [self.folder / CSV]
        plot = loss_plot(curve, looks)
        if plot is not None:
            write_bytes_atomically(self.folder / PLOT, plot.encode())
            written.append(self.folder / PLOT)
        if self._board is not None:
            for look in looks:
                self._board.add_scalar("watched_perplexity", look["perplexity"], int(look["step"]))
            self._board.close()
        return written


def _cell(value: float | None) -> str:
    return "" if value is None else repr(value)


def _board(folder: Path) -> Any:
    try:
        module = importlib.import_module("torch.utils.tensorboard")
    except ImportError as e:
        raise UnsupportedError(
            '--tensorboard needs tensorboard, which is not installed; pip install "compress-toolkit[distill]"'
        ) from e
    return module.SummaryWriter(str(folder))


def loss_plot(curve: Sequence[Mapping[str, float]], looks: Sequence[Mapping[str, float]]) -> str | None:
    """The loss over tokens, and the watched text's perplexity, as SVG; None without matplotlib, or nothing to draw.

    curve: records with `tokens` and `loss`. looks: with `tokens` and `perplexity`.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not curve:
        return None
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "loss", "axes.grid": True}):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([r["tokens"] for r in curve], [r["loss"] for r in curve], color="#e69f00", label="loss")
        axes.set_xlabel("tokens")
        axes.set_ylabel("loss, nats a token")
        if all(r["loss"] > 0 for r in curve):
            axes.set_yscale("log")
        if looks:
            right = axes.twinx()
            right.plot([r["tokens"] for r in looks], [r["perplexity"] for r in looks], "o-", color="#56b4e9")
            right.set_ylabel("watched text: perplexity (o)")
            right.grid(visible=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
