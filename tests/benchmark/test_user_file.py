"""The user's own file: how it is run, what a function in it may be, and what is said where it gives no model."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fastdp.benchmark import user_file

FILE = """
import argparse, sys
parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=5)
width = parser.parse_args().width
class Model:
    __module__ = "torch.nn"
    def __call__(self, inputs): return inputs
model = Model()
def make(): return width
def make_batch(rows): return rows, rows
def needs(hidden, *, classes, depth=2, **more): return hidden
def ends(): sys.exit()
def ends_with_words(): sys.exit("set DATA_DIR")
if __name__ == "__main__":
    sys.exit("a script trains here")
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The file, in a process as the worker's, whose own arguments are no model's."""
    monkeypatch.setattr(sys, "argv", ["worker", "{}"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "a model ü.py"
    file.write_text(FILE, "utf-8")
    yield file
    sys.modules.pop(user_file.MODULE, None)


def test_a_file_with_argparse_gets_its_defaults(path):
    made, make_batch = user_file.make(path, "make")
    assert made == 5
    assert make_batch(3) == (3, 3)


def test_a_model_may_be_named_instead_of_a_function(path):
    made, _ = user_file.make(path, "model")
    assert type(made).__name__ == "Model"
    assert user_file.framework_of(made) == "torch"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("needs", r"called without arguments, and needs hidden, classes\. Give them defaults, or"),
        ("ends", r"ends the process by sys\.exit\(\) while its model is made\. Put what a script does behind"),
        ("ends_with_words", r"sys\.exit\('set DATA_DIR'\)"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_a_function_that_gives_no_model_is_told_with_the_remedy(path, name, said):
    with pytest.raises(ValueError, match=said):
        user_file.make(path, name)


@pytest.mark.parametrize(
    ("make_batch", "said"),
    [
        (
            lambda rows: (np.zeros((16, 4)), np.zeros(16)),
            r"must return arrays of 32 rows\. Received the shapes: \(16, 4\)",
        ),
        (lambda: None, r"called with the number of rows, make_batch\(32\): too many positional arguments"),
        (lambda rows: (rows, rows, rows), r"must return a pair \(inputs, targets\)\. Received: a tuple of 3"),
    ],
)
def test_a_batch_that_would_give_wrong_rates_or_none_is_an_error(make_batch, said):
    with pytest.raises(ValueError, match=said):
        user_file.batch_of(make_batch, 32)


@pytest.mark.parametrize(
    "batch", [({"x": np.zeros((32, 4))}, None), (np.zeros((7, 32)), [np.zeros(3)]), (["a text"], object())]
)
def test_rows_may_lie_on_any_axis_or_be_unknown(batch):
    assert user_file.batch_of(lambda rows: batch, 32) is batch
