"""A comparison of results as blocks: what differs first, then the ratios."""

from __future__ import annotations

from fastdp.benchmark.comparison import Comparison, Ratio
from fastdp.benchmark.display.result import filled
from fastdp.benchmark.figures import MISSING, median_of, rate
from fastdp.rendering.blocks import Block, Paragraph, Table


def comparison_blocks(comparison: Comparison) -> list[Block]:
    """A comparison as paragraphs and tables. Results are called A, B, C and so on; the first lines say which is which.

    With more than 26 results they are called by their numbers.
    """
    letters = [_letter(place, len(comparison.names)) for place in range(len(comparison.names))]
    named = [f"{letter}: {name}" for letter, name in zip(letters, comparison.names, strict=True)]
    blocks: list[Block] = [Paragraph("\n".join(named))]
    if comparison.differences:
        rows = [[one.what, *one.values] for one in comparison.differences]
        blocks.append(Table("What differs", ["", *letters], rows))
    else:
        blocks.append(Paragraph("Nothing differs in machine, versions, model and settings."))
    blocks += [Paragraph(caution, warns=True) for caution in comparison.cautions]
    return [*blocks, *(_ratios(comparison, place, letters) for place in range(1, len(letters)))]


def _letter(place: int, of: int) -> str:
    return chr(65 + place) if of <= 26 else str(place + 1)


def _ratios(comparison: Comparison, place: int, letters: list[str]) -> Table:
    """The ratios of one result to the first."""
    ratios = [row.ratios[place] for row in comparison.rows]
    first, other = letters[0], letters[place]
    columns = {
        "way": [row.name for row in comparison.rows],
        first: [rate(median_of(row.rates[0])) for row in comparison.rows],
        other: [rate(median_of(row.rates[place])) for row in comparison.rows],
        f"{other}/{first}": [f"{ratio.ratio:.3f}" if ratio else MISSING for ratio in ratios],
        "95 % interval": [_interval(ratio) for ratio in ratios],
        "verdict": [ratio.verdict if ratio else "not in both" for ratio in ratios],
    }
    return filled(f"Samples/s, {other} over {first}", columns)


def _interval(ratio: Ratio | None) -> str:
    return MISSING if ratio is None or ratio.low is None else f"{ratio.low:.3f} to {ratio.high:.3f}"
