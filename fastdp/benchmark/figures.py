"""Writes rates, times and sizes as people read them, and makes text that comes from a file safe to show."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What stands where a figure is not known. ASCII: a terminal without UTF-8 shows it too.
MISSING = "-"

# Unicode categories that can move the cursor, reverse a line or break an encoder: controls, formats, surrogates,
# private use, line and paragraph separators.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_LONGEST_TEXT = 2000
_ABSURD = 1e100  # no time, size or rate: and sums and products of smaller ones stay finite


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its quartiles and the value of each round, all in the same unit."""

    median: float
    q1: float
    q3: float
    rounds: tuple[float, ...] = ()

    @property
    def relative(self) -> float | None:
        """The distance between the quartiles, as a part of the median; None of fewer than two rounds."""
        return (self.q3 - self.q1) / self.median if self.median and len(self.rounds) != 1 else None


def number(value: Any) -> float | None:
    """A number as a float; None for anything else, and for infinite and absurd ones."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return found if abs(found) < _ABSURD else None  # False for NaN


def spread_of(value: Any) -> Spread | None:
    """The spread that a result holds as a mapping; None where it has no median."""
    if not isinstance(value, Mapping):
        return None
    median = number(value.get("median"))
    if median is None:
        return None
    q1, q3 = number(value.get("q1")), number(value.get("q3"))
    rounds = value.get("rounds")
    each = [number(one) for one in rounds] if isinstance(rounds, Sequence) and not isinstance(rounds, str) else []
    return Spread(
        median,
        median if q1 is None else q1,
        median if q3 is None else q3,
        tuple(one for one in each if one is not None),
    )


def median_of(spread: Spread | None) -> float | None:
    """The median of a spread that may be missing."""
    return None if spread is None else spread.median


def relative_of(spread: Spread | None) -> float | None:
    """The relative spread of a spread that may be missing."""
    return None if spread is None else spread.relative


def plain(value: object) -> str:
    """Text of one line: spaces in place of line breaks, and `?` in place of what a terminal or a page might obey."""
    text = str(value)
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + "..."
    if text.isascii() and text.isprintable():
        return text
    shown = (" " if one in "\t\n\r\v\f" else "?" if unicodedata.category(one) in _UNSAFE else one for one in text)
    return " ".join("".join(shown).split())


def _digits(value: float) -> str:
    """Three significant digits or more, with commas between thousands."""
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    if size >= 0.9995:
        return f"{value:.2f}"
    return "0" if not value else f"{value:.3f}" if size >= 0.01 else f"{value:.2g}"


def rate(value: float | None) -> str:
    """Samples per second."""
    return MISSING if value is None else _digits(value)


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds, without the unit."""
    if seconds is None:
        return MISSING
    return _digits(1e3 * seconds) if abs(seconds) >= 5e-7 else "0"


def count(value: float | None) -> str:
    """A whole number with commas."""
    return MISSING if value is None else f"{value:,.0f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A part of one as percent."""
    return MISSING if value is None else f"{100 * value:.{digits}f}%"


def hundredths(value: float | None, digits: int = 0) -> str:
    """A part of one in percent, without the sign."""
    return MISSING if value is None else f"{100 * value:.{digits}f}"


def megabytes(nbytes: float | None) -> str:
    """Bytes in units of a million, without the unit."""
    return MISSING if nbytes is None else _digits(nbytes / 1e6)


def duration(seconds: float | None) -> str:
    """Seconds with the unit that fits."""
    if seconds is None:
        return MISSING
    if abs(seconds) >= 119.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if abs(seconds) * factor >= 0.9995:
            return f"{_digits(seconds * factor)} {unit}"
    return f"{_digits(1e6 * seconds)} us" if abs(seconds) >= 5e-10 else "0 s"


def size(nbytes: float | None) -> str:
    """Bytes with a decimal unit."""
    if nbytes is None:
        return MISSING
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= 0.9995 * factor:
            return f"{_digits(nbytes / factor)} {unit}"
    return f"{nbytes:.0f} B"


def batch_words(settings: Mapping[str, Any]) -> str:
    """The batch that was asked for: the global one, or that of each device."""
    return f"batch {plain(settings.get('batch'))}{' per device' if settings.get('per_device') else ''}"


def batches_words(batches: Mapping[str, Any]) -> str:
    """What the search for a batch size found."""
    if number(batches.get("largest")) is None:
        return "No batch size ran."
    best = number(batches.get("best"))
    fastest = "" if best is None else f"; the fastest is {count(best)}"
    return f"The largest batch that ran has {count(number(batches['largest']))} rows{fastest}."


def plural(value: int, noun: str) -> str:
    """A count with its noun: `1 device`, `4 devices`."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"
