"""The `report()` of a parallel model: how steps run, where the time goes, and where the memory is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastdp.engine.data_parallel import DataParallel
from fastdp.engine.timing import VERBS
from fastdp.program.base import Program
from fastdp.runtime.queue import QueueDevice
from fastdp.warn import warn_user

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

# Timed steps that a statement about the size of the work needs.
ENOUGH_STEPS = 100


@dataclass(frozen=True)
class DeviceReport:
    """One device: its rows in most of the latest batches, median seconds by verb, and bytes of the model's memory.

    Virtual devices use host memory. `spare` in `nbytes` is the snapshot for rolling back a failed update.
    `peak_nbytes` is the peak of the device's card, which virtual GPUs may share (`Report.cards`); None in host memory.
    """

    name: str
    rows: int
    seconds: dict[str, float]
    nbytes: dict[str, int]
    peak_nbytes: int | None = None


@dataclass(frozen=True)
class CardReport:
    """One GPU: the peak memory use of this process on it, in bytes.

    `engine_nbytes` is the peak of the engine's own buffers, `library_nbytes` that of the model's library (torch:
    activations and temporaries). `peak_nbytes` is their sum, an upper bound, since the two peaks may come at different
    times. CUDA's context, NCCL's buffers and the cache of the library's allocator are not included.
    """

    name: str
    devices: list[str]
    engine_nbytes: int
    library_nbytes: int
    peak_nbytes: int


@dataclass(frozen=True)
class Report(Sequence[dict[str, Any]]):
    """How a parallel model's training steps run. As a sequence: the entries of `steps`. As text: tables.

    Attributes:
        steps: for each shape of a replica's rows, how its steps run and why; or one entry that says why all run
            eagerly.
        devices: the devices, in the order of the rows; empty before the first step.
        trained: training steps so far by the current engine.
        timed: how many of the latest steps the median times cover.
        step_seconds: median seconds of a step in the engine.
        between_seconds: median seconds between steps: waiting for input, callbacks, metrics.
        overhead_seconds: median seconds of a step beyond the work of its slowest device and the update.
        optimizer: how the optimizer is applied.
        update: where it is applied, "first" or "each" device.
        cards: the GPUs of the replicas with their peak memory; empty on virtual devices in host memory.
        peak_nbytes: peak host memory of the process; None where the system does not report it.
        buckets: the number of gradient buckets.
        early_buckets: how many of them began to be reduced while a device still computed, in most of the timed steps.
        calls: for a model with its own training step, per `layer`: how many of its calls were `split`, how many ran on
            `one_device`, and `why`.
        passes: for calls of a torch module without gradients, entries like those of `steps`, each with its `mode`.
    """

    steps: list[dict[str, Any]]
    devices: list[DeviceReport] = field(default_factory=list)
    trained: int = 0
    timed: int = 0
    step_seconds: float = 0.0
    between_seconds: float = 0.0
    overhead_seconds: float = 0.0
    optimizer: str = ""
    update: str = ""
    cards: list[CardReport] = field(default_factory=list)
    peak_nbytes: int | None = None
    buckets: int = 0
    early_buckets: int = 0
    calls: list[dict[str, Any]] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: Any) -> Any:
        return self.steps[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, dicts, numbers and strings, for JSON."""
        return asdict(self)

    @property
    def too_small(self) -> str:
        """Why the work is too small to be split over devices, and what to do; empty if it is not, or not yet known.

        Splitting cannot pay if its overhead exceeds the work that it saves: the work of all devices but the slowest.
        """
        compute = [device.seconds["compute"] for device in self.devices if device.rows]
        if self.timed < ENOUGH_STEPS or len(compute) < 2:
            return ""
        saved = sum(compute) - max(compute)
        if self.overhead_seconds <= saved:
            return ""
        rows = sum(device.rows for device in self.devices)
        return (
            f"fastdp: {len(compute)} devices are slower than one would be on batches of {rows} rows: in a step, all "
            f"but the slowest compute for {_ms(saved)} ms, but splitting the work costs {_ms(self.overhead_seconds)} "
            "ms. Use a larger batch_size, or fewer devices (gpus=1)."
        )

    def __str__(self) -> str:
        parts = [self._header(), _table("How training steps run", *_how(self.steps))]
        if self.passes:
            parts.append(_table("How calls without gradients run", *_how(self.passes)))
        if self.calls:
            rows = [[str(entry[key]) for key in _CALLS] for entry in self.calls]
            parts.append(_table("Calls of layers in steps of the model's own", list(_CALLS.values()), rows))
        if self.timed:
            rows = [
                [device.name, str(device.rows), *(_ms(device.seconds[verb]) for verb in VERBS)]
                for device in self.devices
            ]
            title = f"Milliseconds in a step, median of the latest {self.timed}"
            parts.append(_table(title, ["device", "rows", *VERBS], rows))
            parts.append(
                f"A step takes {_ms(self.step_seconds)} ms; from one to the next (input, callbacks, metrics) "
                f"{_ms(self.between_seconds)} ms."
            )
        if self.timed and self.buckets > 1 and len(self.devices) > 1:
            parts.append(
                f"Of {self.buckets} buckets of gradients, {self.early_buckets} are reduced while a device still "
                "computes; communication is what comes after."
            )
        if self.devices:
            kinds = list(self.devices[0].nbytes)
            rows = [[device.name, *(_mb(device.nbytes[kind]) for kind in kinds)] for device in self.devices]
            parts.append(_table("Memory of the model, MB", ["device", *kinds], rows))
        if self.cards:
            parts.append(self._peaks())
        if self.peak_nbytes is not None:
            parts.append(f"The process has had at most {_mb(self.peak_nbytes)} MB of host memory.")
        return "\n\n".join([*parts, *([self.too_small] if self.too_small else [])])

    def _header(self) -> str:
        """Devices, steps and the update, in words."""
        if not self.devices:
            return "fastdp: no step has run yet."
        words = f"fastdp: {len(self.devices)} device{'s' * (len(self.devices) > 1)}, {self.trained} training steps."
        if self.optimizer:
            where = "on each device" if self.update == "each" else "on the first device, for all"
            words += f" The optimizer is applied {where}: {self.optimizer}."
        return words

    def _peaks(self) -> str:
        """The cards as a table, and a note on shared cards."""
        rows = [
            [card.name, " ".join(card.devices), *map(_mb, (card.engine_nbytes, card.library_nbytes, card.peak_nbytes))]
            for card in self.cards
        ]
        table = _table("Peak memory of each GPU, MB", ["gpu", "devices", "engine", "model", "together"], rows)
        shared = any(len(card.devices) > 1 for card in self.cards)
        return table + "\n  Devices on one GPU share its figure." * shared


# The columns of the table and their titles; `why` is last, since it is long.
_COLUMNS = {
    "mode": "mode",
    "how": "how",
    "rows": "rows",
    "of": "of batch",
    "steps": "steps",
    "operations": "operations",
    "trace_seconds": "traced in s",
    "compile_seconds": "compiled in s",
    "load_seconds": "loaded in s",
    "segments": "segments",
    "whole_steps": "as one graph",
    "record_seconds": "recorded in s",
    "why": "why",
}
_CALLS = {"layer": "layer", "split": "on all devices", "one_device": "on one device", "why": "why"}


def _how(entries: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Entries of `steps` or `passes` as a table."""
    known = [key for key in _COLUMNS if any(key in entry for entry in entries)]
    return [_COLUMNS[key] for key in known], [[_cell(entry.get(key, "")) for key in known] for entry in entries]


def make_report(
    engine: DataParallel[Program] | None,
    steps: list[dict[str, Any]],
    *,
    library_nbytes: Callable[[QueueDevice], int] = lambda device: 0,
    further_devices: Sequence[QueueDevice] = (),
    calls: Sequence[dict[str, Any]] = (),
    passes: Sequence[dict[str, Any]] = (),
) -> Report:
    """Make the report of an engine with these entries about its steps. Without an engine it has only the entries.

    Args:
        calls, passes: these entries of the report.
        library_nbytes: gives the peak memory of the model's library on a device's card, without the engine's memory.
        further_devices: the devices of replicas that span several, other than the engine's.
    """
    if engine is None:
        return Report(steps, passes=list(passes))
    times = engine.times
    cards = _cards([*engine.devices, *further_devices], library_nbytes)
    peaks = {card.name: card.peak_nbytes for card in cards}
    devices = []
    for rank, replica in enumerate(engine.replicas):
        found = times.device(rank)
        memory = replica.memory
        device = replica.device
        nbytes = {
            "variables": memory.variables.nbytes,
            "slots": memory.slots.nbytes,
            "gradients": memory.gradients.nbytes,
            "spare": engine.rollback.nbytes if rank == 0 else 0,
        }
        devices.append(DeviceReport(device.name, found.rows, found.seconds, nbytes, peaks.get(device.space)))
    return Report(
        steps,
        devices,
        trained=times.steps,
        timed=times.timed,
        step_seconds=times.step,
        between_seconds=times.between,
        overhead_seconds=times.overhead,
        optimizer=engine.group.program.update_how,
        update=engine.update,
        cards=cards,
        peak_nbytes=_peak_nbytes(),
        buckets=len(engine.group.buckets),
        early_buckets=times.early,
        calls=list(calls),
        passes=list(passes),
    )


def _cards(devices: Sequence[QueueDevice], library_nbytes: Callable[[QueueDevice], int]) -> list[CardReport]:
    """The GPUs of these devices, in their order."""
    by_card: dict[str, list[Any]] = {}
    for device in devices:
        if device.on_gpu:
            by_card.setdefault(device.space, []).append(device)
    cards = []
    for name, there in by_card.items():
        engine, library = there[0].peak_nbytes, library_nbytes(there[0])
        cards.append(CardReport(name, [device.name for device in there], engine, library, engine + library))
    return cards


class SmallWorkWarning:
    """Warns once that a model's work is too small for its devices."""

    def __init__(self) -> None:
        self._said = False

    def check(self, engine: DataParallel[Program] | None) -> None:
        """Warn if this engine's work is known to be too small, unless already done."""
        if self._said or engine is None or len(engine.devices) < 2 or engine.times.timed < ENOUGH_STEPS:
            return
        message = make_report(engine, []).too_small
        if message:
            self._said = True
            warn_user(message)


def _peak_nbytes() -> int | None:
    """The largest resident size that this process has had."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}"


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """A title and aligned columns: numbers to the right, words to the left."""
    cells = [header, *rows]
    lines = [title]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    words = [any(not _is_number(row[i]) for row in rows) for i in range(len(header))]
    for row in cells:
        padded = [
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(row, widths, words, strict=True)
        ]
        lines.append(("  " + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    return not text.strip("0123456789.,-")
