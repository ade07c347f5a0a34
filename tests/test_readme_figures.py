"""README's figures are those that were measured: rounds that took turns on a quiet machine."""

from __future__ import annotations

import re

import pytest
import readme_figures


def test_the_table_holds_what_was_measured() -> None:
    text = readme_figures.README.read_text("utf-8")
    assert readme_figures.written(text, readme_figures.results()) == text, "run tests/shared/readme_figures.py"


@pytest.mark.parametrize("name", readme_figures.COLUMNS)
def test_a_result_is_of_a_quiet_machine_and_names_how_it_was_made(name: str) -> None:
    found = readme_figures.results()[name]
    assert found["noise"]["verdict"] == "quiet"
    assert found["settings"]["rounds"] >= 5
    assert {entry["name"] for entry in found["entries"]} >= set(readme_figures.ROWS)
    parameters = {entry["parameters"] for entry in found["entries"]}
    assert len(parameters) == 1, f"the ways train models of different sizes: {parameters}"
    assert not [word for word in found["command"] if re.match(r"/|~", word)], "a path of one machine"


def test_the_fastest_of_each_column_is_bold_whoever_it_is() -> None:
    rows = readme_figures.table(readme_figures.results()).splitlines()[2:]
    for column in range(2, len(readme_figures.COLUMNS) + 2):
        cells = [row.split("|")[column].strip() for row in rows]
        speeds = [float(cell.strip("*").replace(",", "")) for cell in cells]
        assert [cell.startswith("**") for cell in cells] == [speed == max(speeds) for speed in speeds]
