"""The comparison of results as a page: what differs first, then ratios to the first result."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from fastdp.benchmark.comparison import Comparison, Ratio
from fastdp.benchmark.figures import MISSING, median_of, plural, rate
from fastdp.benchmark.html.elements import Child, document, table, tag
from fastdp.benchmark.html.style import STYLE


def comparison_page(comparison: Comparison) -> str:
    """A self-contained HTML page about a comparison. It loads nothing and runs no script."""
    names = comparison.names
    head = tag(
        "header",
        tag("h1", "Comparison of benchmarks"),
        tag("p", f"{plural(len(names), 'result')}; ratios are to the first, {names[0]}.", class_="soft"),
    )
    cautions = [tag("p", one, class_="note warn") for one in comparison.cautions]
    ratios = [_ratios(comparison, place) for place in range(1, len(names))]
    return document("Comparison: fastdp bench", STYLE, head, _differences(comparison), *cautions, *ratios,
                    _rates(comparison))  # fmt: skip


def _differences(comparison: Comparison) -> Element:
    if not comparison.differences:
        said = tag("p", "Nothing: same machine, versions, model and settings.")
    else:
        rows: list[list[Child]] = [[one.what, *one.values] for one in comparison.differences]
        said = table("Machine, versions, model and settings", ["", *comparison.names], rows, words=range(99))
    return tag("section", tag("h2", "What differs"), said)


def _ratios(comparison: Comparison, place: int) -> Element:
    """The ratios of one result to the first, as points with intervals around 1, and as a table."""
    pairs = [(row, row.ratios[place]) for row in comparison.rows]
    known = [ratio for _, ratio in pairs if ratio is not None]
    title = f"{comparison.names[place]} over {comparison.names[0]}"
    if not known:
        return tag("section", tag("h2", title), tag("p", "No way to train is in both results."))
    reach = max([0.02, *(abs(end - 1) for ratio in known for end in _ends(ratio))]) * 1.1
    grid = tag("div", class_="bars", aria_hidden="true")
    for row, ratio in pairs:
        if ratio is not None:
            grid.append(tag("div", row.name, class_="name"))
            grid.append(_forest(ratio, reach))
            grid.append(tag("div", f"{ratio.ratio:.3f}", class_="value"))
    marks = [(1 - reach, 0), (1.0, 50), (1 + reach, 100)]
    axis = [tag("span", f"{max(value, 0.0):.2f}", style=f"left:{left}%") for value, left in marks]
    grid.extend([tag("div"), tag("div", *axis, class_="axis"), tag("div")])
    rows: list[list[Child]] = [
        [row.name, rate(median_of(row.rates[0])), rate(median_of(row.rates[place])),
         ratio.words if ratio else MISSING, ratio.verdict if ratio else "not in both"]
        for row, ratio in pairs
    ]  # fmt: skip
    header = ["way", comparison.names[0], comparison.names[place], "ratio (95 % interval)", "verdict"]
    words = "Ratio of throughput: right of the line is faster. A point has the interval of its ratio."
    return tag("section", tag("h2", title), tag("p", words, class_="soft"), tag("figure", grid),
               table("Samples per second", header, rows, words=(0, 4)))  # fmt: skip


def _forest(ratio: Ratio, reach: float) -> Element:
    """A point with its interval; 1 is in the middle."""
    low, high = (50 + 50 * (end - 1) / reach for end in (min(_ends(ratio)), max(_ends(ratio))))
    mark = "good" if ratio.verdict.endswith("faster") else "bad" if ratio.verdict.endswith("slower") else ""
    return tag(
        "div",
        tag("i", style=f"left:{max(low, 0):.2f}%;width:{min(high, 100) - max(low, 0):.2f}%"),
        tag("b", style=f"left:{50 + 50 * (ratio.ratio - 1) / reach:.2f}%"),
        class_=f"forest {mark}".strip(),
    )


def _ends(ratio: Ratio) -> Sequence[float]:
    """The ratio and the ends of its interval."""
    return [one for one in (ratio.low, ratio.ratio, ratio.high) if one is not None]


def _rates(comparison: Comparison) -> Element | None:
    """All throughputs side by side, where there are more than two results."""
    if len(comparison.names) < 3:
        return None
    rows: list[list[Child]] = [[row.name, *(rate(median_of(one)) for one in row.rates)] for row in comparison.rows]
    return tag("section", tag("h2", "Throughput"), table("Samples per second", ["way", *comparison.names], rows))
