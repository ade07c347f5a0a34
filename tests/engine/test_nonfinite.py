"""A step that finds NaN or Inf changes nothing on any replica: it is an error that says where, or it is skipped."""

from __future__ import annotations

import numpy as np
import pytest
from least_squares import WIDTH, predict, train

import fastdp
from fastdp.program.functions import FunctionProgram


@pytest.fixture(autouse=True)
def three_devices():
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


def program():
    def update(parameters, slots, gradients):
        new = {name: value - 0.1 * gradients[name] for name, value in parameters.items()}
        return new, {"steps": slots["steps"] + 1}

    def quiet(parameters, batch):
        with np.errstate(over="ignore", invalid="ignore"):
            return train(parameters, batch)

    start = {"w": np.ones(WIDTH, np.float32), "b": np.float32(0)}
    return FunctionProgram(start, quiet, update, predict, {"steps": np.float32(0)})


def batch(bad=None, value=np.nan):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(9, WIDTH)).astype("f4"), rng.normal(size=9).astype("f4")
    if bad is not None:
        x[bad, 0] = value
    return [x, y]


def lasting(engine):
    """What the first replica has. The others get it before the next step at the latest; `check_replicas` compares."""
    return [flat.buffers["float32"].tobytes() for flat in engine.replicas[0].lasting]


@pytest.mark.parametrize("update", ["first", "each"])
@pytest.mark.parametrize(("row", "device", "rows"), [(0, 0, (0, 3)), (4, 1, (3, 6)), (8, 2, (6, 9))])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_raise_names_device_and_rows_and_changes_nothing(update, row, device, rows, value):
    engine = fastdp.DataParallel(program(), 3, update=update, on_nonfinite="raise", check_replicas=True)
    engine.train(batch())
    before = lasting(engine)
    with pytest.raises(FloatingPointError) as caught:
        engine.train(batch(row, value))
    assert isinstance(caught.value, fastdp.ReplicaError)
    assert (caught.value.device, caught.value.rows, caught.value.verb) == (f"virtual:{device}", rows, "update")
    assert f"(rows {rows[0]} to {rows[1]} of the batch's 9)" in str(caught.value)
    assert lasting(engine) == before
    engine.train(batch())
    assert lasting(engine) != before


@pytest.mark.parametrize("update", ["first", "each"])
def test_skip_goes_on_as_if_the_batch_had_not_come(update):
    engine = fastdp.DataParallel(program(), 3, update=update, on_nonfinite="skip", check_replicas=True)
    other = fastdp.DataParallel(program(), 3, update=update)
    engine.train(batch())
    with pytest.warns(UserWarning, match=r"a step changed nothing.*loss is nan\. This came from the rows on virtual:1"):
        assert engine.train(batch(5)).skipped
    assert engine.train(batch(5)).skipped  # warned once
    assert not engine.train(batch()).skipped
    assert engine.skipped_steps == 2
    for _ in range(2):
        other.train(batch())
    assert lasting(engine) == lasting(other)


def test_a_window_of_accumulation_goes_on_without_the_step_that_was_an_error():
    engine, other = (fastdp.DataParallel(program(), 3, on_nonfinite="raise") for _ in range(2))
    engine.train(batch(), reduce=False)
    with pytest.raises(FloatingPointError, match=r"virtual:0 \(rows 0 to 3 of"):
        engine.train(batch(2), reduce=False)
    engine.train(batch())
    other.train(batch(), reduce=False)
    other.train(batch())
    assert lasting(engine) == lasting(other)


def test_a_window_of_accumulation_is_skipped_whole():
    engine = fastdp.DataParallel(program(), 3, on_nonfinite="skip")
    before = lasting(engine)
    engine.train(batch(2), reduce=False)
    with pytest.warns(UserWarning, match="gradient of 'w', 'b' has NaN or infinite numbers"):
        engine.train(batch())
    assert lasting(engine) == before
    assert not engine.train(batch()).skipped


def test_without_the_option_a_bad_number_goes_through():
    engine = fastdp.DataParallel(program(), 3)
    engine.train(batch(1))
    assert np.isnan(engine.program.parameters["w"]).all()
