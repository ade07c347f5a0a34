"""The `report()` of a parallel model: how steps run, where the time goes, and where the memory is."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastdp.engine.timing import VERBS
from fastdp.rendering.blocks import Block, Paragraph, Table
from fastdp.rendering.html import as_html
from fastdp.rendering.terminal import in_terminal, renderables
from fastdp.rendering.text import as_text

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


@dataclass(frozen=True, repr=False)
class Report(Sequence[dict[str, Any]]):
    """How a parallel model's training steps run. As a sequence: the entries of `steps`. As text: tables.

    `str` is plain text. In a terminal, `repr` (what Python shows for `parallel.report()`) and `show()` have
    colors and bars, by the library rich; in a notebook the report is HTML. `line` is the report in one line.

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
        update: where it is applied, "first" or "each" device, or "parts": each updates its part.
        cards: the GPUs of the replicas with their peak memory; empty on virtual devices in host memory.
        peak_nbytes: peak host memory of the process; None where the system does not report it.
        buckets: the number of gradient buckets.
        early_buckets: how many of them began to be reduced while a device still computed, in most of the timed steps.
        calls: for a model with its own training step, per `layer`: how many of its calls were `split`, how many ran on
            `one_device`, and `why`.
        passes: for calls of a torch module without gradients, entries like those of `steps`, each with its `mode`.
        inputs: how the batches of the latest `fit` came, for each `array` in a file, or all in one entry: `how`; how
            many `batches`, of which a thread took `read_ahead` before they were asked for; the `waited_seconds` of the
            loop, the `wait_per_step`, and the `share` of the time from the first batch to the last. For torch modules:
            of each `DeviceDataset` so far, in its train steps and calls.
        faults: what happened to devices: which ran out of memory, and which were lost or came back.
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
    inputs: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: Any) -> Any:
        return self.steps[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, dicts, numbers and strings, for JSON."""
        return asdict(self)

    # What people see.

    def __str__(self) -> str:
        return as_text(self._blocks())

    def __repr__(self) -> str:
        blocks = self._blocks()
        return in_terminal(blocks) or as_text(blocks)

    def show(self) -> None:
        """Print it: with colors and bars in a terminal where rich is installed, as plain text elsewhere."""
        sys.stdout.write(f"{self!r}\n")

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield from renderables(self._blocks(), options.max_width)

    def _repr_html_(self) -> str:
        return as_html(self._blocks())

    @property
    def line(self) -> str:
        """Devices, steps, time of a step, throughput and how steps run, in one line."""
        if not self.devices:
            return "fastdp: no step has run yet."
        words = self._size()
        if self.timed and self.step_seconds > 0:
            rows, seconds = sum(device.rows for device in self.devices), self.step_seconds + self.between_seconds
            words += f"; {rows} rows in {_ms(self.step_seconds)} ms, {_ms(self.between_seconds)} ms between steps: "
            words += f"{rows / seconds:,.0f} samples/s"
        ways = list(dict.fromkeys(str(entry.get("how", "")) for entry in self.steps))
        return f"{words}; {', '.join(filter(None, ways)) or 'eager'}. More: report()."

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

    # Its paragraphs and tables.

    def _blocks(self) -> list[Block]:
        """Everything, in order."""
        blocks: list[Block] = [Paragraph(self._header()), _how("How training steps run", self.steps)]
        blocks += [Paragraph(fault) for fault in self.faults]
        if self.passes:
            blocks.append(_how("How calls without gradients run", self.passes))
        if self.calls:
            rows = [[str(entry[key]) for key in _CALLS] for entry in self.calls]
            blocks.append(Table("Calls of layers in steps of the model's own", list(_CALLS.values()), rows))
        if self.inputs:
            rows = [[_input_cell(key, entry[key]) for key in _INPUTS] for entry in self.inputs]
            blocks.append(Table("How batches came", list(_INPUTS.values()), rows))
        if self.timed:
            blocks += self._times()
        if self.devices:
            kinds = list(self.devices[0].nbytes)
            rows = [[device.name, *(_mb(device.nbytes[kind]) for kind in kinds)] for device in self.devices]
            blocks.append(Table("Memory of the model, MB", ["device", *kinds], rows))
        if self.cards:
            blocks.append(self._peaks())
        if self.peak_nbytes is not None:
            blocks.append(Paragraph(f"The process has had at most {_mb(self.peak_nbytes)} MB of host memory."))
        return [*blocks, *([Paragraph(self.too_small, warns=True)] if self.too_small else [])]

    def _size(self) -> str:
        """Devices and steps, in words."""
        devices, steps = len(self.devices), self.trained
        return f"fastdp: {devices} device{'s' * (devices > 1)}, {steps} training step{'s' * (steps != 1)}"

    def _header(self) -> str:
        """Devices, steps and the update, in words."""
        if not self.devices:
            return "fastdp: no step has run yet."
        words = f"{self._size()}."
        if self.optimizer:
            wheres = {"each": "on each device", "parts": "on each device, for its part of the weights"}
            where = wheres.get(self.update, "on the first device, for all")
            words += f" The optimizer is applied {where}: {self.optimizer}."
        return words

    def _times(self) -> Iterator[Block]:
        """The time of each verb on each device, and of whole steps."""
        rows = [
            [device.name, str(device.rows), *(_ms(device.seconds[verb]) for verb in VERBS)] for device in self.devices
        ]
        title = f"Milliseconds in a step, median of the latest {self.timed}"
        yield Table(title, ["device", "rows", *VERBS], rows, parts=VERBS)
        yield Paragraph(
            f"A step takes {_ms(self.step_seconds)} ms; from one to the next (input, callbacks, metrics) "
            f"{_ms(self.between_seconds)} ms."
        )
        if self.buckets > 1 and len(self.devices) > 1:
            yield Paragraph(
                f"Of {self.buckets} buckets of gradients, {self.early_buckets} are reduced while a device still "
                "computes; communication is what comes after."
            )

    def _peaks(self) -> Table:
        """The cards, and a note on shared cards."""
        rows = [
            [card.name, " ".join(card.devices), *map(_mb, (card.engine_nbytes, card.library_nbytes, card.peak_nbytes))]
            for card in self.cards
        ]
        shared = any(len(card.devices) > 1 for card in self.cards)
        header = ["gpu", "devices", "engine", "model", "together"]
        return Table("Peak memory of each GPU, MB", header, rows, "Devices on one GPU share its figure." * shared)


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


_INPUTS = {
    "array": "array",
    "batches": "batches",
    "read_ahead": "ahead",
    "waited_seconds": "waited in s",
    "wait_per_step": "a step, in ms",
    "share": "share",
    "how": "how",
}


def _input_cell(key: str, value: Any) -> str:
    if key == "share":
        return f"{value:.0%}"
    return _ms(value) if key == "wait_per_step" else _cell(value)


def _how(title: str, entries: Sequence[dict[str, Any]]) -> Table:
    """Entries of `steps` or `passes` as a table."""
    known = [key for key in _COLUMNS if any(key in entry for entry in entries)]
    rows = [[_cell(entry.get(key, "")) for key in known] for entry in entries]
    return Table(title, [_COLUMNS[key] for key in known], rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}"


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
