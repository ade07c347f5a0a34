"""What the demo prints and writes: tables, a picture of the curves, and the result for programs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdp._version import __version__
from fastdp.cli.demo.training import Run
from fastdp.cli.optional import load


def loss_difference(runs: Sequence[Run]) -> float:
    """The largest difference between the runs' training losses in any epoch."""
    losses = np.array([run.history["loss"] for run in runs])
    return float(np.ptp(losses, axis=0).max())


def print_tables(runs: Sequence[Run]) -> None:
    """Print losses per epoch, then accuracy and speed, then rows and time of each device in a step."""
    console, tables = load("rich.console", "keras").Console(), load("rich.table", "keras")
    losses = tables.Table("epoch", *(run.label for run in runs), "difference", title="Training loss")
    for epoch, values in enumerate(zip(*(run.history["loss"] for run in runs), strict=True), 1):
        difference = max(values) - min(values)
        losses.add_row(str(epoch), *(f"{value:.6f}" for value in values), f"{difference:.1e}")
    summary = tables.Table("run", "test accuracy", "samples/s", title="Accuracy, and speed of warm steps")
    for run in runs:
        summary.add_row(run.label, f"{run.accuracy:.4f}", f"{run.samples_per_second:,.0f}")
    work = tables.Table("run", "device", "rows", "ms", title="Forward and backward of one full batch")
    for run in runs:
        for device in run.devices:
            work.add_row(run.label, device.name, str(device.rows), f"{device.milliseconds:.2f}")
    for table in (losses, summary, work):
        console.print(table)


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Draw training loss and test accuracy of all runs into a PNG file. Needs no display."""
    figure = load("matplotlib.figure", "demo").Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    styles = ["-", "--"]
    for panel, key, title in zip(panels, ("loss", "val_accuracy"), ("training loss", "test accuracy"), strict=True):
        for run, style, width in zip(runs, styles, (4.0, 1.5), strict=False):
            values = run.history[key]
            panel.plot(range(1, len(values) + 1), values, style, label=run.label, linewidth=width)
        panel.set_title(title)
        panel.set_xlabel("epoch")
        panel.legend()
    load("matplotlib.backends.backend_agg", "demo").FigureCanvasAgg(figure).print_png(path)


def result(runs: Sequence[Run], devices: Sequence[str]) -> dict[str, Any]:
    """The result for `--json`; `accuracy` is from the run on all devices, `samples_per_second` is by their number."""
    return {
        "accuracy": round(runs[-1].accuracy, 4),
        "max_loss_difference": loss_difference(runs),
        "samples_per_second": {str(len(run.devices)): round(run.samples_per_second, 1) for run in runs},
        "devices": list(devices),
        "versions": _versions(),
    }


def _versions() -> dict[str, Any]:
    """The versions of Python and the libraries."""
    libraries = {name: str(load(name, "keras").__version__) for name in ("keras", "torch", "numpy")}
    return {"fastdp": __version__, "python": platform.python_version(), **libraries}
