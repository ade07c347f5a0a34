"""Figures as people read them, and entries of a result as pictures read them."""

from __future__ import annotations

import math

import benchmark_results
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdp.benchmark import figures
from fastdp.benchmark.entries import PARTS, entries_of
from fastdp.benchmark.headings import date_words, machine_line


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (figures.rate(38_450.4), "38,450"),
        (figures.rate(99.96), "100"),
        (figures.rate(12.345), "12.3"),
        (figures.rate(1.2345), "1.23"),
        (figures.rate(0.12345), "0.123"),
        (figures.rate(0.00012345), "0.00012"),
        (figures.rate(0), "0"),
        (figures.rate(None), "-"),
        (figures.milliseconds(0.0123), "12.3"),
        (figures.milliseconds(1e-9), "0"),
        (figures.duration(0.00001234), "12.3 us"),
        (figures.duration(0.0123), "12.3 ms"),
        (figures.duration(1.5), "1.50 s"),
        (figures.duration(119.6), "2 min 0 s"),
        (figures.duration(3725), "62 min 5 s"),
        (figures.duration(0), "0 s"),
        (figures.size(999), "999 B"),
        (figures.size(12_345_678), "12.3 MB"),
        (figures.size(85e9), "85.0 GB"),
        (figures.percent(0.9345), "93%"),
        (figures.percent(0.0123, 1), "1.2%"),
        (figures.plural(1, "device"), "1 device"),
        (figures.plural(1234, "step"), "1,234 steps"),
    ],
)
def test_a_figure_has_three_digits_and_the_unit_that_fits(written, expected):
    assert written == expected


@given(st.floats(1e-3, 1e12))
def test_a_rate_says_the_value_to_half_a_percent(value):
    assert float(figures.rate(value).replace(",", "")) == pytest.approx(value, rel=0.051 if value < 0.01 else 0.006)


@given(st.text())
def test_plain_text_is_one_line_that_can_be_written(text):
    shown = figures.plain(text)
    shown.encode("utf-8")
    assert shown.isprintable() or not shown.isascii()
    assert not set(shown) & set("\n\r\x1b\x00\u202e\u2066\u2028\x85")
    assert figures.plain(shown) == shown


@pytest.mark.parametrize("value", [None, True, "1", [], math.nan, math.inf, 10**400])
def test_what_is_no_finite_number_is_no_figure(value):
    assert figures.number(value) is None


def test_the_parts_of_a_step_add_up_to_its_time():
    entry = entries_of(benchmark_results.result([benchmark_results.entry(devices=2)]))[0]
    parts = entry.parts(entry.per_device[0])
    assert list(parts) == list(PARTS)
    assert sum(parts.values()) == pytest.approx(entry.step.median)
    assert parts["input"] == 0.00012


def test_parts_that_are_longer_than_the_step_leave_nothing_over():
    raw = benchmark_results.entry() | {"step_seconds": benchmark_results.spread(1e-6)}
    entry = entries_of(benchmark_results.result([raw]))[0]
    assert "other" not in entry.parts(entry.per_device[0])


def test_the_machine_is_named_with_its_cards():
    line = machine_line(benchmark_results.gpu_result()["machine"])
    assert line.startswith("8 x NVIDIA H100 80GB HBM3, Intel(R) Xeon(R)")
    assert line.endswith("2 cores, 16.7 GB of memory")
    assert machine_line({}) == "unknown processor"


@pytest.mark.parametrize(
    ("iso", "words"),
    [("2026-11-29T14:30:00+00:00", "2026-11-29 14:30 UTC"), ("yesterday\x1b", "yesterday?"), (None, "")],
)
def test_dates_are_told_to_the_minute(iso, words):
    assert date_words(iso) == words
