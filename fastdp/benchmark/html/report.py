"""The report of one result as a page: the answer first, then pictures with the same figures as tables beside them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from fastdp.benchmark.entries import Entry, entries_of, tried_of
from fastdp.benchmark.figures import (
    batch_words,
    batches_words,
    count,
    duration,
    median_of,
    milliseconds,
    number,
    percent,
    plain,
    plural,
    rate,
    size,
)
from fastdp.benchmark.headings import date_words, machine_line, noise_words
from fastdp.benchmark.html import devices, speed
from fastdp.benchmark.html.elements import document, table, tag
from fastdp.benchmark.html.style import STYLE


def report_page(result: Mapping[str, Any], folder: Path | None = None) -> str:
    """A self-contained HTML page about a result of `fastdp bench`. It loads nothing and runs no script.

    Args:
        result: of schema 1, checked by `fastdp.benchmark.result`.
        folder: where its trace files lie; None draws the timeline from the verbs.
    """
    entries = entries_of(result)
    target = result.get("target") or {}
    title = plain(target.get("title") or target.get("name") or "benchmark")
    parts = [_head(result, title), _tiles(entries), _noise(result)]
    if entries:
        parts += [speed.section(entries), devices.time_section(entries), devices.timeline_section(entries, folder)]
        parts += [devices.memory_section(entries), speed.start_section(entries)]
    parts += [_batches(result), _failures(result), _about(result), _repeat(result)]
    return document(f"{title}: fastdp bench", STYLE, *parts)


def _head(result: Mapping[str, Any], title: str) -> Element:
    settings = result.get("settings") or {}
    said = [batch_words(settings) if settings.get("batch") is not None else None]
    said += [plain(settings[key]) for key in ("precision", "data") if settings.get(key)]
    said += [machine_line(result.get("machine") or {}), date_words(result.get("date"))]
    return tag("header", tag("h1", title), tag("p", ", ".join(one for one in said if one), class_="soft"))


def _tiles(entries: list[Entry]) -> Element | None:
    """The figures that a reader asks for first."""
    known = [entry for entry in entries if entry.rate is not None]
    if not known:
        return None
    best = max(known, key=lambda entry: entry.rate.median if entry.rate else 0.0)
    tiles = [
        ("samples/s", rate(median_of(best.rate)), f"fastest: {best.name}"),
        ("step time", duration(median_of(best.step)), f"of {count(best.batch)} rows" if best.batch else ""),
    ]
    if best.efficiency is not None and best.devices > 1:
        tiles.append(("efficiency", percent(best.efficiency), f"on {best.devices} devices"))
    if best.mean_utilization is not None:
        tiles.append(("GPU use", percent(best.mean_utilization), "by NVML, mean of its GPUs"))
    if best.joules_per_sample is not None:
        tiles.append(("energy", f"{milliseconds(best.joules_per_sample)} mJ", "a sample, on its GPUs"))
    memory = [device.memory for device in best.per_device if device.memory is not None]
    if memory:
        tiles.append(("memory", size(max(memory)), "on its fullest device"))
    return tag("div", *(_tile(*tile) for tile in tiles), class_="tiles")


def _tile(title: str, figure: str, words: str) -> Element:
    return tag("div", tag("span", title), tag("b", figure), tag("span", words), class_="tile")


def _noise(result: Mapping[str, Any]) -> Element:
    said, good = noise_words(result)
    return tag("p", said, class_=f"note {'good' if good else 'warn'}")


def _batches(result: Mapping[str, Any]) -> Element | None:
    batches = result.get("batches")
    if not batches:
        return None
    rows = [
        [plain(one.get("batch")), rate(number(one.get("samples_per_second"))), plain(one.get("reason") or "")]
        for one in tried_of(result)
    ]
    return tag(
        "section",
        tag("h2", "Batch sizes"),
        tag("p", batches_words(batches)),
        table("Batch sizes that were tried", ["batch", "samples/s", "why not"], rows, words=(0, 2)),
    )


def _failures(result: Mapping[str, Any]) -> Element | None:
    failed = result.get("failed") or []
    if not failed:
        return None
    said = [
        tag("p", tag("b", plain(one.get("name"))), f": {plain(one.get('reason'))}", class_="note bad") for one in failed
    ]
    return tag("section", tag("h2", f"{plural(len(failed), 'way')} failed"), *said)


def _about(result: Mapping[str, Any]) -> Element:
    """Model, settings, machine and versions."""
    target, settings, machine = (result.get(key) or {} for key in ("target", "settings", "machine"))
    shape = "; ".join(
        f"{plain(one.get('name'))} {plain(one.get('shape'))} {plain(one.get('dtype'))}"
        for one in target.get("inputs") or []
    )
    model = {
        "name": target.get("name"),
        "framework": target.get("framework"),
        "parameters": count(number(target.get("parameters"))) if target.get("parameters") is not None else None,
        "inputs": shape or None,
        "loss": target.get("loss"),
        "optimizer": target.get("optimizer"),
    }
    box: dict[str, Any] = {
        "processor": machine.get("cpu"),
        "cores": machine.get("cores"),
        "memory": size(number(machine.get("memory_nbytes"))) if machine.get("memory_nbytes") is not None else None,
        "system": machine.get("system"),
        "driver": machine.get("driver"),
    }
    cards = [_card(gpu) for gpu in machine.get("gpus") or []]
    if cards:
        box["GPUs"] = "; ".join(f"{cards.count(card)} x {card}" for card in dict.fromkeys(cards))
    versions = {"fastdp": result.get("fastdp"), **(result.get("versions") or {})}
    groups = [("Model", model), ("Settings", settings), ("Machine", box), ("Versions", versions)]
    lists = [tag("div", tag("h3", name), _facts(facts)) for name, facts in groups]
    return tag("section", tag("h2", "What was measured, and on what"), tag("div", *lists, class_="columns"))


def _card(gpu: Mapping[str, Any]) -> str:
    """A GPU in words."""
    facts = [plain(gpu.get("name"))]
    if number(gpu.get("memory_nbytes")) is not None:
        facts.append(size(number(gpu["memory_nbytes"])))
    if gpu.get("compute_capability"):
        facts.append(f"compute capability {'.'.join(map(plain, gpu['compute_capability']))}")
    return ", ".join(facts)


def _facts(facts: Mapping[str, Any]) -> Element:
    known = {name: value for name, value in facts.items() if value is not None and value != ""}
    children = [one for name, value in known.items() for one in _fact(name, value)]
    return tag("dl", *children) if children else tag("p", "Not recorded.", class_="soft")


def _fact(name: str, value: Any) -> tuple[Element, Element]:
    """A name and its value."""
    said = ("yes" if value else "no") if isinstance(value, bool) else value
    return tag("dt", plain(name).replace("_", " ")), tag("dd", said)


def _repeat(result: Mapping[str, Any]) -> Element | None:
    command = result.get("command") or []
    if not command:
        return None
    words = [plain(word) for word in command]
    return tag(
        "section",
        tag("h2", "How to repeat it"),
        tag("p", "On the same machine, with the versions above:", class_="soft"),
        tag("pre", tag("code", shlex.join(words))),
    )
