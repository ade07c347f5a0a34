"""The CSV log of a monitor: whole after each row, and continued by the next run."""

from __future__ import annotations

import csv

import pytest

from fastdp.keras.callbacks.csv_log import CsvLog


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_row_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "made" / "log.csv"
    log = CsvLog(path, append=False)
    assert log.begin() == 0
    log.write({"step": 1, "loss": 0.5})
    assert path.read_bytes() == b"step,loss\n1,0.5\n"
    log.write({"step": 2, "loss": float("nan")})
    assert [row["loss"] for row in read(path)] == ["0.5", "nan"]


def test_a_new_column_leaves_earlier_rows_without_a_value(tmp_path):
    log = CsvLog(tmp_path / "log.csv", append=False)
    log.begin()
    log.write({"step": 1, "name": 'a "quoted",\none'})
    log.write({"step": 2, "val_loss": 3.0})
    assert read(tmp_path / "log.csv") == [
        {"step": "1", "name": 'a "quoted",\none', "val_loss": ""},
        {"step": "2", "name": "", "val_loss": "3.0"},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]


def test_appending_goes_on_with_other_columns_and_drops_half_a_line(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(path, append=True)
    assert log.begin() == 0  # there is no file yet
    log.write({"step": 4, "utilization_0": 0.5, "utilization_1": 0.25})
    with path.open("a") as file:
        file.write("8,0.")  # the process was killed here
    again = CsvLog(path, append=True)
    assert again.begin() == 4
    again.write({"step": 8, "utilization_0": 0.75})
    rows = [("4", "0.5", "0.25"), ("8", "0.75", "")]
    assert [tuple(row.values()) for row in read(path)] == rows


@pytest.mark.parametrize("append", [True, False])
def test_another_fit_of_the_same_monitor_goes_on_and_another_run_begins_anew(tmp_path, append):
    path = tmp_path / "log.csv"
    path.write_text("step,old\n7,1\n")
    log = CsvLog(path, append=append)
    assert log.begin() == (7 if append else 0)
    log.write({"step": 9})
    log.close()
    assert log.begin() == 9
    log.write({"step": 10})
    assert [row["step"] for row in read(path)] == ["7"] * append + ["9", "10"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b\n1,2\n", r"the columns \['a', 'b'\]"),
        (b"a,b\n1,2\n3,4", r"the columns \['a', 'b'\]"),  # without a newline at its end
        (b"kind,step\nepoch,many\n", "steps that are no numbers"),
        (b"kind,step\nepoch,\xe9\n", "bytes that are no UTF-8"),
    ],
)
def test_the_file_of_another_program_is_left_alone(tmp_path, content, said):
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"goes on in a file that a Monitor has written.*{said}.*Choose another"):
        CsvLog(path, append=True).begin()
    assert path.read_bytes() == content
