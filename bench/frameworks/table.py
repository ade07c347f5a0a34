"""The table and the picture of `compare.py`, from its JSON line alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def markdown(line: dict[str, Any]) -> str:
    """The result as a page: samples per second, fastdp's speedups, failures, and the environment."""
    models, titles = line["results"], line["titles"]
    header = ["samples/s, median", *(result["title"] for result in models.values())]
    parts = [
        "# Data-parallel training on this machine, every way\n",
        _table(header, [[titles[name], *(_rate(result, name) for result in models.values())] for name in titles]),
    ]
    if any(result["speed_of_fastdp_2_to"] for result in models.values()):
        header[0] = "speedup of fastdp on 2 devices over"
        rows = [[titles[name], *(_ratio(result, name) for result in models.values())] for name in titles]
        parts.append(_table(header, rows))
    notes = [*_failures(line), *_differences(line)]
    parts += ["\n".join(f"- {note}" for note in notes) + "\n"] if notes else []
    rounds = sorted({result["rounds"] for result in models.values()})
    machine = line["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    parts.append(
        f"{machine['cpu']}, {machine['cores']} cores. Rounds that took turns: {', '.join(map(str, rounds))}. "
        f"Ratios are medians over the rounds. {versions}; commit {line['commit']}, {line['date']}.\n"
    )
    return "\n".join(parts)


def draw(line: dict[str, Any], path: Path) -> None:
    """Draw samples per second of every peer, one panel per model: medians, with quartiles as whiskers."""
    models, titles = line["results"], line["titles"]
    columns = min(3, len(models))
    lines = math.ceil(len(models) / columns)
    figure = Figure(figsize=(5.2 * columns, 0.9 + (0.6 + 0.27 * len(titles)) * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    names = list(reversed(titles))
    for place, panel in enumerate(panels.flat):
        if place >= len(models):
            panel.set_axis_off()
            continue
        result = list(models.values())[place]
        found = [result["samples_per_second"].get(name) for name in names]
        medians = [one["median"] if one else 0.0 for one in found]
        below = [one["median"] - one["q1"] if one else 0.0 for one in found]
        above = [one["q3"] - one["median"] if one else 0.0 for one in found]
        colours = ["tab:blue" if name.startswith("fastdp") else "silver" for name in names]
        panel.barh(range(len(names)), medians, xerr=(below, above), color=colours, ecolor="black")
        panel.set_yticks(range(len(names)), [titles[name] for name in names] if place % columns == 0 else [])
        panel.set_title(result["title"], fontsize="medium")
        for at, (name, one) in enumerate(zip(names, found, strict=True)):
            text = f" {one['median']:,.0f}" if one else " failed" if name in result["failed"] else " not run"
            panel.text(one["q3"] if one else 0.0, at, text, va="center", fontsize="small")
        panel.set_xlim(right=1.25 * max([*medians, 1.0]))
        panel.set_xlabel("samples/s")
    FigureCanvasAgg(figure).print_png(path)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _rate(result: dict[str, Any], name: str) -> str:
    found = result["samples_per_second"].get(name)
    if found is None:
        return "failed" if name in result["failed"] else "not run"
    return f"{found['median']:,.0f}{'*' if name in _unequal(result) else ''}"


def _ratio(result: dict[str, Any], name: str) -> str:
    found = result["speed_of_fastdp_2_to"].get(name)
    return "" if found is None else f"{found:.2f}"


def _failures(line: dict[str, Any]) -> list[str]:
    return [
        f"{line['titles'][name]} failed on {result['title']}: {reason}"
        for result in line["results"].values()
        for name, reason in result["failed"].items()
    ]


def _unequal(result: dict[str, Any]) -> dict[str, int]:
    """Peers whose model has a different number of parameters from most others."""
    counts = {name: facts["parameters"] for name, facts in result["facts"].items() if "parameters" in facts}
    usual = max(counts.values(), key=list(counts.values()).count, default=0)
    return {name: count for name, count in counts.items() if count != usual}


def _differences(line: dict[str, Any]) -> list[str]:
    return [
        f"\\* {line['titles'][name]}'s model has {count:,} parameters, unlike the others: {result['title']}"
        for result in line["results"].values()
        for name, count in _unequal(result).items()
    ]
