"""README's table of figures, made of results in bench/results. Run as a program, it writes the table into README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MACHINE = "amd-epyc-2-cores_202611"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"

# The file of a model in bench/results, and the head of its column.
COLUMNS = {
    "mlp": "MLP, batch 128",
    "cnn": "CNN, batch 128",
    "lstm": "LSTM, batch 64",
    "gpt": "small GPT, batch 16",
    "resnet50": "ResNet50 64x64, batch 32",
}
# A way as the result names it, and how the table does.
ROWS = {
    "fastdp, 1 device": "fastdp, 1 device",
    "fastdp, 2 devices": "fastdp, 2 virtual devices",
    "torch, 1 device, eager": "plain torch loop, 1 process",
    "DDP, 2 devices": "torch DDP, 2 processes",
    "Keras fit, 1 device": "Keras `fit` on torch",
}


def results() -> dict[str, dict[str, Any]]:
    """The result of `fastdp bench` for each column."""
    folder = ROOT / "bench" / "results"
    return {name: json.loads((folder / f"bench-{name}_{MACHINE}.json").read_text("utf-8")) for name in COLUMNS}


def table(found: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown: samples per second, medians over the rounds, the fastest of a column in bold."""
    columns = [
        {entry["name"]: entry["samples_per_second"]["median"] for entry in one["entries"]} for one in found.values()
    ]
    lines = [
        "| samples/s | " + " | ".join(COLUMNS[name] for name in found) + " |",
        "|---" + "|---:" * len(found) + "|",
    ]
    for way, label in ROWS.items():
        lines.append(f"| {label} | " + " | ".join(_cell(column, way) for column in columns) + " |")
    return "\n".join(lines)


def _cell(column: dict[str, float], way: str) -> str:
    text = f"{column[way]:,.0f}"
    return f"**{text}**" if column[way] == max(column.values()) else text


def written(text: str, found: dict[str, dict[str, Any]]) -> str:
    """README's text with the table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}"


if __name__ == "__main__":
    README.write_text(written(README.read_text("utf-8"), results()), "utf-8")
