"""A batch is checked, dealt out and described once."""

from __future__ import annotations

import numpy as np
import pytest
from least_squares import line
from least_squares import rows as make_rows

import fastdp
from fastdp.comm.batch import Batch, count_rows
from fastdp.shard import Deal, dealt_rows, split_rows


class Counted:
    """An array that counts how often it is asked for its shape."""

    def __init__(self, array):
        self.array, self.asked, self.ndim, self.dtype = array, 0, array.ndim, array.dtype

    @property
    def shape(self):
        self.asked += 1
        return self.array.shape

    def __getitem__(self, rows):
        return self.array[rows]

    def __len__(self):
        return len(self.array)


@pytest.fixture
def three():
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


def test_a_batch_is_its_arrays_in_their_order():
    x, y = np.zeros((5, 2)), np.zeros(5)
    batch = Batch.of([x, y], "structure")
    assert (len(batch), batch.rows, batch.structure) == (2, 5, "structure")
    assert batch[0] is x
    assert [array is known for array, known in zip(batch, (x, y), strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([], "at least one array"),
        ([np.zeros(0)], r"at least one row. Received: {'x': 0}"),
        ([np.zeros(3), np.float32(1)], r"but \['y'\] have no axis"),
        ([np.zeros(3), np.zeros(4)], r"Received: {'x': 3, 'y': 4}; the hint"),
    ],
)
def test_what_is_no_batch_is_refused_with_names(arrays, message):
    with pytest.raises(ValueError, match=message):
        Batch.of(arrays, None, lambda: ["x", "y"][: len(arrays)], "; the hint")


def test_names_are_made_for_messages_alone():
    def never():
        raise AssertionError("nobody asked")

    assert Batch.of([np.zeros(3)], None, never).rows == 3


def test_count_rows_is_of_arrays_without_a_batch():
    assert count_rows([np.zeros((3, 0)), np.zeros(3)]) == 3


@pytest.mark.parametrize("total", [1, 2, 7, 64])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_rows_are_dealt_as_split_rows_deals_them(total, parts):
    batch = Batch.of([np.zeros(total)])
    assert list(batch.deal(parts)) == split_rows(total, parts) == list(dealt_rows(total, parts))


def test_rows_are_dealt_once_and_anew_for_another_number_of_parts(monkeypatch):
    dealt, rows = [], Deal.rows
    monkeypatch.setattr(Deal, "rows", lambda deal, total: dealt.append((total, deal.shares)) or rows(deal, total))
    batch = Batch.of([np.zeros(5)])
    assert batch.deal(2) is batch.deal(2)
    assert len(batch.deal(1)) == 1
    assert len(batch.deal(9)) == 5
    assert dealt == [(5, 2), (5, 1), (5, 9)]


def test_shapes_are_of_a_row_and_found_out_once():
    arrays = [Counted(np.zeros((4, 2, 3), "float32")), Counted(np.zeros(4, "int8"))]
    batch = Batch.of(arrays)
    assert batch.shapes == (((2, 3), "<f4"), ((), "|i1"))
    assert batch.shapes is batch.shapes
    assert [array.asked for array in arrays] == [2, 2]  # once for the rows
    assert batch.shapes == Batch.of([np.zeros((9, 2, 3), "float32"), np.zeros(9, "int8")]).shapes


def test_a_batch_that_was_staged_is_not_counted_again_by_its_step(three):
    engine, arrays = fastdp.DataParallel(line(), 3), make_rows(8)
    counted = [Counted(array) for array in arrays]
    batch = Batch.of(counted)
    engine.stage(batch)
    first = batch.shards
    engine.train(batch)
    assert batch.shards is first
    assert [array.asked for array in counted] == [2, 2]  # for the rows, and for the shapes of the step's reduction


def test_a_step_takes_arrays_or_a_batch_and_gives_the_program_both_with_their_structure(three):
    program = line()
    engine, arrays, seen = fastdp.DataParallel(program, 3), make_rows(8), []
    kept = program.train
    program.train = lambda state, rows, context: seen.append(context) or kept(state, rows, context)
    by_arrays = engine.train(arrays, structure="structure")
    by_batch = engine.train(Batch.of(arrays, "structure"))
    assert by_arrays.rows == by_batch.rows == 8
    assert {context.structure for context in seen} == {"structure"}
    assert all(context.batch[1] is arrays[1] for context in seen)
