"""Sentences about a result that terminals and pages share: what was measured, on what machine, and its noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from fastdp.benchmark.entries import Entry
from fastdp.benchmark.figures import batch_words, count, number, percent, plain, plural, size


def headings(result: Mapping[str, Any]) -> list[str]:
    """What was measured and on what, one line each."""
    target, settings, machine = (result.get(key) or {} for key in ("target", "settings", "machine"))
    what = [plain(target.get("title") or target.get("name") or "?")]
    if number(target.get("parameters")) is not None:
        what.append(f"{count(number(target['parameters']))} parameters")
    if settings.get("batch") is not None:
        what.append(batch_words(settings))
    what += [plain(settings[key]) for key in ("precision", "data") if settings.get(key)]
    return [", ".join(what), machine_line(machine)]


def machine_line(machine: Mapping[str, Any]) -> str:
    """The processors and cards in one line."""
    gpus = [plain(gpu.get("name") or "GPU") for gpu in machine.get("gpus") or []]
    parts = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    parts.append(plain(machine.get("cpu") or "unknown processor"))
    cores = number(machine.get("cores"))
    if cores is not None:
        parts.append(plural(int(cores), "core"))
    memory = number(machine.get("memory_nbytes"))
    return ", ".join([*parts, *([f"{size(memory)} of memory"] if memory is not None else [])])


def noise_words(result: Mapping[str, Any]) -> tuple[str, bool]:
    """What the idle loop said of the machine, and whether that is good."""
    noise = result.get("noise") or {}
    verdict, spread = plain(noise.get("verdict") or ""), number(noise.get("relative_spread"))
    varied = "" if spread is None else f" The idle loop beside the measurement varied by {percent(spread, 1)}."
    if not verdict:
        return f"The machine's noise is not known.{varied}", False
    if verdict.startswith("quiet"):
        return f"The machine was quiet.{varied}", True
    said = verdict.partition(":")[2].strip()
    return f"The machine was noisy: {said.rstrip('.')}." if said else f"The machine was noisy.{varied}", False


def clock_words(entries: Sequence[Entry]) -> str:
    """Whose clock the times per device are of, where that is not plain: on GPUs."""
    if not any(entry.kind == "gpu" and entry.per_device for entry in entries):
        return ""
    return "On GPUs these are times of the host's threads, which launch the work: --profile records the GPUs' own."


def date_words(value: Any) -> str:
    """A date and time in ISO 8601 to the minute, with its zone where it says one; other text as it is."""
    text = plain(value or "")
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return text
