"""The final tables of a benchmark as blocks: speed, start and memory, time per verb and device, failures, noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastdp.benchmark.entries import VERBS, Entry, entries_of, tried_of
from fastdp.benchmark.figures import (
    MISSING,
    batches_words,
    count,
    hundredths,
    median_of,
    megabytes,
    milliseconds,
    number,
    plain,
    plural,
    rate,
    relative_of,
)
from fastdp.benchmark.headings import clock_words, headings, noise_words
from fastdp.rendering.blocks import Block, Paragraph, Table

# With more rows than this, the times per device are shown for the fastest way alone: files have them all.
_DEVICE_ROWS = 8
_SHORT = {"communication": "comm."}


def result_blocks(result: Mapping[str, Any]) -> list[Block]:
    """A result as paragraphs and tables."""
    entries = entries_of(result)
    blocks: list[Block] = [Paragraph("\n".join(headings(result)))]
    if entries:
        blocks += [*_speed(entries), *_start(entries), *_how(entries), *_devices(entries)]
    elif not result.get("failed"):
        blocks.append(Paragraph("Nothing was measured.", warns=True))
    blocks += _batches(result)
    failed = [f"Failed: {plain(one.get('name'))}: {plain(one.get('reason'))}" for one in result.get("failed") or []]
    if failed:
        blocks.append(Paragraph("\n".join(failed), warns=True))
    said, good = noise_words(result)
    return [*blocks, Paragraph(said, warns=not good)]


def filled(title: str, columns: Mapping[str, Sequence[str]]) -> Table:
    """A table of these columns, without those of which no figure is known; the first stays."""
    kept = {name: cells for place, (name, cells) in enumerate(columns.items()) if not place or set(cells) - {MISSING}}
    return Table(title, list(kept), [list(row) for row in zip(*kept.values(), strict=True)])


def _speed(entries: Sequence[Entry]) -> list[Block]:
    columns = {
        "way": [entry.name for entry in entries],
        "samples/s": [rate(median_of(entry.rate)) for entry in entries],
        "spread %": [hundredths(relative_of(entry.rate), 1) for entry in entries],
        "step ms": [milliseconds(median_of(entry.step)) for entry in entries],
        "efficiency %": [hundredths(entry.efficiency) for entry in entries],
    }
    known = [entry for entry in entries if entry.rate]
    blocks: list[Block] = [filled("Speed", columns)]
    if len(known) > 1:
        best = max(known, key=lambda entry: median_of(entry.rate) or 0.0)
        blocks.append(Paragraph(f"The fastest is {best.name}."))
    gpus = {
        "way": columns["way"],
        "GPU use %": [hundredths(entry.mean_utilization) for entry in entries],
        "mJ/sample": [milliseconds(entry.joules_per_sample) for entry in entries],
    }
    table = filled("GPUs, by NVML", gpus)
    return [*blocks, table] if len(table.header) > 1 else blocks


def _start(entries: Sequence[Entry]) -> list[Block]:
    columns = {
        "way": [entry.name for entry in entries],
        "first step s": [rate(entry.first_step_seconds) for entry in entries],
        "capture s": [rate(entry.capture_seconds) for entry in entries],
        "compile s": [rate(entry.compile_seconds) for entry in entries],
        "warm-up s": [rate(entry.warm_up_seconds) for entry in entries],
        "memory MB": [megabytes(_memory(entry)) for entry in entries],
    }
    table = filled("Start and memory", columns)
    if "memory MB" in table.header and any(len(entry.per_device) > 1 for entry in entries):
        return [table, Paragraph("Memory is that of the fullest device.")]
    return [table]


def _how(entries: Sequence[Entry]) -> list[Block]:
    """How steps run, and of which ways that is true."""
    ways: dict[str, list[str]] = {}
    for entry in entries:
        ways.setdefault(": ".join(one for one in (entry.how, entry.why) if one), []).append(entry.name)
    ways.pop("", None)
    if not ways:
        return []
    if len(ways) == 1:
        return [Paragraph(f"Steps run {next(iter(ways))}.")]
    return [Paragraph("\n".join(f"{'; '.join(names)}: {words}" for words, names in ways.items()))]


def _devices(entries: Sequence[Entry]) -> Iterator[Block]:
    """Milliseconds of a step by verb, for each device."""
    shown = [entry for entry in entries if any(device.seconds for device in entry.per_device)]
    if sum(len(entry.per_device) for entry in shown) > _DEVICE_ROWS:
        fastest = max(shown, key=lambda entry: median_of(entry.rate) or 0.0)
        yield Paragraph(f"Times per device of the fastest of {plural(len(shown), 'way')}; the files have all.")
        shown = [fastest]
    if clock_words(shown):
        yield Paragraph(clock_words(shown))
    for entry in shown:
        devices = entry.per_device
        verbs = {
            _SHORT.get(verb, verb): [milliseconds(device.seconds.get(verb)) for device in devices] for verb in VERBS
        }
        columns = {
            "device": [device.name for device in devices],
            "rows": [count(device.rows) for device in devices],
            **verbs,
            "MB": [megabytes(device.memory) for device in devices],
        }
        table = filled(f"{entry.name}: milliseconds of a step", columns)
        known = all(set(cells) - {MISSING} for cells in verbs.values())
        yield Table(table.title, table.header, table.rows, parts=tuple(verbs)) if known else table


def _batches(result: Mapping[str, Any]) -> list[Block]:
    batches = result.get("batches")
    if not batches:
        return []
    tried = tried_of(result)
    columns = {
        "batch": [plain(one.get("batch")) for one in tried],
        "samples/s": [rate(number(one.get("samples_per_second"))) for one in tried],
        "why not": [plain(one.get("reason") or MISSING) for one in tried],
    }
    said = batches_words(batches)
    return [*([filled("Batch sizes", columns)] if tried else []), Paragraph(said)]


def _memory(entry: Entry) -> float | None:
    """Bytes of the fullest device."""
    return max((device.memory for device in entry.per_device if device.memory is not None), default=None)
