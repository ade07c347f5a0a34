"""Where a `Monitor` writes: CSV files, TensorBoard's event files, Weights & Biases."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastdp.keras.callbacks.csv_log import CsvLog
from fastdp.keras.callbacks.event_files import EventFile


class Log(Protocol):
    """A place for rows of numbers: `row` has `kind` ("epoch" or "steps"), `epoch`, `step` and numbers by name."""

    def begin(self) -> int:
        """Begin, or go on after another `fit`. Returns the step of the last row that is there already."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row."""

    def close(self) -> None:
        """Let go of what is open. `begin` opens it again."""


def make_logs(chosen: Any, *, append: bool) -> list[Log]:
    """The logs that `Monitor(logs=...)` names.

    Raises:
        ValueError, TypeError: an unknown name, or a path that says no kind.
        ImportError: a library that one of them needs is not installed.
    """
    if chosen is None:
        return []
    if isinstance(chosen, Sequence) and not isinstance(chosen, str):
        return [log for one in chosen for log in make_logs(one, append=append)]
    if not isinstance(chosen, (str, os.PathLike)):
        raise TypeError(f"`logs` must be a name, a path, or a list of them. Received: a {type(chosen).__name__}.")
    path = Path(chosen)
    if chosen == "csv" or path.suffix.lower() == ".csv":
        return [CsvLog("monitor.csv" if chosen == "csv" else path, append=append)]
    if chosen == "wandb":
        return [WandbLog()]
    if chosen == "tensorboard":
        return [EventLog(Path("logs", "monitor"))]
    if isinstance(chosen, os.PathLike) or path.is_dir() or os.path.dirname(chosen):
        return [EventLog(path)]
    raise ValueError(
        '`logs` must be "csv", "tensorboard", "wandb", the path of a .csv file, the path of a folder for TensorBoard '
        f"(./{chosen}), or a list of them. Received: {chosen!r}."
    )


class EventLog:
    """Scalars for TensorBoard: rows of epochs as `monitor_epoch/...` by epoch, others as `monitor/...` by step.

    Args:
        folder: of the event files.
    """

    def __init__(self, folder: Path) -> None:
        self._file = EventFile(folder, f"Monitor(logs={str(folder)!r})")

    def begin(self) -> int:
        """Event files do not tell what is in them."""
        return 0

    def write(self, row: Mapping[str, Any]) -> None:
        """Add its numbers."""
        by_epoch = row["kind"] == "epoch"
        prefix = "monitor_epoch" if by_epoch else "monitor"
        numbers = {f"{prefix}/{name}": value for name, value in _numbers(row).items()}
        self._file.scalars(numbers, row["epoch" if by_epoch else "step"])
        self._file.flush()

    def close(self) -> None:
        """End the event file."""
        self._file.close()


class WandbLog:
    """Numbers for Weights & Biases: those of epochs as `fastdp/epoch/...`, others as `fastdp/...`, over `fastdp/step`.

    It writes to the run that is active, or begins one with `wandb.init()`, which it then ends.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ImportError(
                'Monitor(logs="wandb") needs the package wandb, which is not installed. Install it with: '
                "pip install 'fastdp[wandb]'"
            )
        self._wandb = importlib.import_module("wandb")
        self._run: Any = None
        self._own = False

    def begin(self) -> int:
        """Find the active run, or begin one."""
        if self._run is None:
            self._own = self._wandb.run is None
            self._run = self._wandb.init() if self._own else self._wandb.run
            self._run.define_metric("fastdp/step", hidden=True)
            self._run.define_metric("fastdp/*", step_metric="fastdp/step")
        return 0

    def write(self, row: Mapping[str, Any]) -> None:
        """Add its numbers."""
        prefix = "fastdp/epoch" if row["kind"] == "epoch" else "fastdp"
        numbers = {f"{prefix}/{name}": value for name, value in _numbers(row).items()}
        self._run.log({"fastdp/step": row["step"], **numbers})

    def close(self) -> None:
        """End the run that it has begun."""
        run, self._run = self._run, None
        if run is not None and self._own:
            run.finish()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What was measured, without the row's place in the run."""
    place = ("kind", "time", "epoch", "step")
    return {name: value for name, value in row.items() if name not in place and isinstance(value, (int, float))}
