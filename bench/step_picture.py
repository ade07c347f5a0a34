"""What does one training step look like? Draws a step of an MLP on virtual devices, from a trace of fastdp's own.

python bench/step_picture.py              # records a step, writes docs/pictures/step.json and step.svg
python bench/step_picture.py --draw       # draws the picture anew from the trace that lies there
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import fastdp
from fastdp.benchmark.html.charts import Span
from fastdp.benchmark.html.step_trace import StepTrace, read_step

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
DEVICES, ROWS = 2, 256
COLORS = {
    "scatter": "#2f6fde",
    "run": "#2c8a4b",
    "reduce": "#d1541f",
    "update": "#8a4fc7",
    "merge": "#0e8a9c",
    "wait": "#c3cad4",
}
# The verb that a span with another name belongs to.
VERBS = {
    **dict.fromkeys(("segment", "graph", "forward", "backward"), "run"),
    **dict.fromkeys(("all-reduce", "broadcast"), "reduce"),
    "parts of an update": "update",
    "wait for devices": "wait",
}


def record(path: Path) -> None:
    """Train until steps are captured and their time is steady, then write the trace of one step."""
    import keras  # noqa: PLC0415  after fastdp, and only to record

    fastdp.set_virtual_devices(DEVICES)
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense
    model = keras.Sequential(
        [keras.Input((784,)), dense(1024, activation="relu"), dense(1024, activation="relu"), dense(10)]
    )
    parallel = fastdp.wrap(model, gpus=DEVICES, compile="trace")
    parallel.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    generator = np.random.default_rng(0)
    x = generator.random((40 * ROWS, 784), np.float32)
    y = generator.integers(0, 10, len(x))
    parallel.fit(x, y, batch_size=ROWS, epochs=2, verbose=0)
    with fastdp.trace(path):
        parallel.fit(x, y, batch_size=ROWS, epochs=1, verbose=0)
    fastdp.set_virtual_devices(0)
    _keep_latest_step(path)


def _keep_latest_step(path: Path) -> None:
    """Leave the latest training step alone in a trace, a span a line: a small file to keep."""
    trace = json.loads(path.read_text("utf-8"))
    events = trace.pop("traceEvents")
    latest = max(event["args"]["step"] for event in events if event["name"] == "train step")
    kept = [event for event in events if event["ph"] == "M" or event.get("args", {}).get("step") == latest]
    lines = ",\n".join(json.dumps(event) for event in kept)
    path.write_text(f'{{"traceEvents": [\n{lines}\n], {json.dumps(trace)[1:]}\n', "utf-8")


def lanes(step: StepTrace) -> list[tuple[str, list[Span]]]:
    """A lane for the host and one for each device, whose streams share a worker; outer spans come before inner ones."""
    found: dict[str, list[Span]] = {}
    for name, spans in step.lanes:
        found.setdefault("host" if name.startswith("host") else name.split(" ")[0], []).extend(spans)
    ordered = sorted(found, key=lambda name: (name != "host", name))
    return [(name, sorted(found[name], key=lambda span: (span.begin, -span.seconds))) for name in ordered]


def draw(step: StepTrace, path: Path) -> None:
    """Write the picture: time from left to right, a lane for the host and for each device."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastdp", "font.family": "sans-serif"}):
        rows = lanes(step)
        figure = Figure(figsize=(9, 0.62 * len(rows) + 1.35), facecolor="white")
        axes = figure.subplots()
        for place, (_, spans) in enumerate(rows):
            for span in spans:
                _draw_span(axes, place, span, step.seconds)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, step.seconds * 1e3)
        axes.set_xlabel("milliseconds")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        handles = [Patch(color=color, label=verb) for verb, color in COLORS.items()]
        figure.legend(handles=handles, loc="upper center", ncols=len(handles), frameon=False)
        figure.subplots_adjust(left=0.1, right=0.98, top=0.86, bottom=0.22)
        figure.savefig(path, format="svg", metadata={"Date": None, "Title": f"One training step, {DEVICES} devices"})


def _draw_span(axes: Axes, place: int, span: Span, whole: float) -> None:
    """A bar in the color of its verb, at least a hair wide, with its name where that fits."""
    verb = VERBS.get(span.name, span.name)
    begin, width = span.begin * 1e3, max(span.seconds, whole / 900) * 1e3
    axes.barh(place, width, left=begin, height=0.62, color=COLORS.get(verb, "#a58a3c"), linewidth=0)
    if span.seconds > 0.1 * whole and span.name not in ("segment", "merge"):
        text = f"{span.name} {span.seconds * 1e3:.1f} ms"
        color = "black" if verb == "wait" else "white"
        axes.text(begin + width / 2, place, text, ha="center", va="center", color=color, fontsize=9)


def main() -> None:
    """Record and draw, or draw alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="from the trace that is there")
    options = parser.parse_args()
    trace = FOLDER / "step.json"
    if not options.draw:
        record(trace)
    draw(read_step(trace), FOLDER / "step.svg")
    print(f"wrote {FOLDER / 'step.svg'}")


if __name__ == "__main__":
    main()
