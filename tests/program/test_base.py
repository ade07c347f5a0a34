"""What a program needs to have, and the defaults of the rest."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager

import least_squares
import numpy as np
import pytest

import fastdp
from fastdp.buffers import ArraySpec, FlatBuffers, Home, Memory
from fastdp.comm.batch import Batch
from fastdp.engine.make_report import make_report
from fastdp.program.base import Context, Program, Result, as_program
from fastdp.runtime.host.device import HostDevice

SPEC = ArraySpec("w", (3,), "float32")
RATE = 0.1
HOST = HostDevice(0)


class Scale(Program):
    """No more than every program has: w moves by the mean of the rows' differences from it."""

    gradients = (SPEC,)

    def home(self, device):
        return Home([SPEC], device)

    def bind(self, memory: Memory, device, rank):
        return memory

    def train(self, state, batch, context):
        weights = state.variables.views[0]
        np.multiply((weights - batch[0]).mean(axis=0), np.float32(context.rows.share), out=state.gradients.views[0])
        return Result([], np.array([float(context.rows.count)]))

    def update(self, state, totals):
        if totals.reduced:
            state.variables.views[0][...] -= np.float32(RATE) * state.gradients.views[0]

    def predict(self, state, batch, context):
        return Result([batch[0] - state.variables.views[0]])


class Alike:
    """The same, of a class that derives from nothing."""

    gradients = (SPEC,)
    slots = ()
    home, bind, train, update, predict = Scale.home, Scale.bind, Scale.train, Scale.update, Scale.predict


class Fuller(Alike):
    """That, with some of what has defaults."""

    update_how = "by hand"
    most_replicas = 2


@pytest.fixture(autouse=True)
def devices():
    fastdp.set_virtual_devices(4)
    yield
    fastdp.set_virtual_devices(0)


def rows(count, seed=0):
    return [np.random.default_rng(seed).normal(size=(count, 3)).astype("float32")]


def trained(program, count):
    engine = fastdp.DataParallel(program, count)
    for seed in range(5):
        engine.train(rows(11, seed), reduce=seed != 1)
    return engine.replicas[0].memory.variables.views[0].copy()


def test_a_program_without_the_least_cannot_be_made():
    class Untrained(Scale):
        train = Program.train

    with pytest.raises(TypeError, match="train"):
        Untrained()


def test_what_a_program_leaves_out_has_a_default():
    program, memory = Scale(), FlatBuffers([SPEC], HOST)
    assert program.most_replicas == sys.maxsize
    assert (program.update_how, program.update_is_shared, program.update_is_reliable) == ("", False, False)
    assert program.slots == ()
    assert program.home_slots(HOST).nbytes == 0
    assert program.changed_outside() is False
    assert program.rehearse_update(memory) is False
    assert program.step_graph([], "") is None
    assert isinstance(program.running(1), AbstractContextManager)
    program.committed()
    program.prepare_thread(1, HOST)
    with pytest.raises(NotImplementedError, match="A Scale has no slots for gradients: end the cycle by a step that"):
        program.fold(memory)


def test_slots_begin_with_zeros():
    class WithSlots(Scale):
        slots = (SPEC,)

    (slot,) = WithSlots().home_slots(HOST).views
    np.testing.assert_array_equal(slot, np.zeros(3))


def test_gradients_are_added_up_by_default():
    total, part = (FlatBuffers([SPEC], HOST) for _ in range(2))
    total.views[0][...], part.views[0][...] = [1, 2, 3], [10, 20, 30]
    Scale().accumulate(total, part)
    np.testing.assert_array_equal(total.views[0], [11, 22, 33])
    np.testing.assert_array_equal(part.views[0], [10, 20, 30])


@pytest.mark.parametrize("make", [Alike, Fuller])
def test_the_least_program_trains_on_several_devices_as_on_one_and_so_does_one_that_does_not_derive(make):
    one = trained(Scale(), 1)
    assert np.abs(one).max() > 0.01
    for count in (1, 2, 4):
        np.testing.assert_allclose(trained(Scale(), count), one, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(trained(make(), count), trained(Scale(), min(count, 2 if make is Fuller else 4)))


def test_a_program_that_does_not_derive_keeps_its_own_members_and_gets_the_others():
    given = Fuller()
    program = as_program(given)
    assert isinstance(program, Program)
    assert (program.update_how, program.most_replicas) == ("by hand", 2)
    assert (program.update_is_shared, program.update_is_reliable) == (False, False)
    given.update_is_shared = True  # later too
    assert program.update_is_shared is True
    engine = fastdp.DataParallel(given, 4)
    assert engine.program is given
    engine.train(rows(8))
    assert [device.rows for device in make_report(engine, []).devices] == [4, 4, 0, 0]
    assert make_report(engine, []).optimizer == "by hand"


def test_a_program_is_itself():
    program = least_squares.line()
    assert as_program(program) is program


def test_what_is_no_program_is_refused_by_what_it_lacks():
    class Half:
        gradients = ()
        home = train = staticmethod(lambda *_: None)

    with pytest.raises(TypeError, match=r"`program` must be a fastdp.program.base.Program.*Half without \['bind', 'pr"):
        fastdp.DataParallel(Half(), 2)
    with pytest.raises(TypeError, match=r"Received: a int without \['gradients', 'bind', 'home'"):
        fastdp.DataParallel(5, 2)


def test_the_members_of_a_program_may_be_set_on_the_object():
    program = least_squares.line()
    program.most_replicas = 1
    engine = fastdp.DataParallel(program, 3)
    seen = []
    kept = program.train
    program.train = lambda state, batch, context: seen.append(context.rows.count) or kept(state, batch, context)
    engine.train(least_squares.rows(9))
    assert seen == [9]


def test_a_context_outside_any_step_has_a_batch():
    arrays = rows(4)
    context = Context.alone(arrays, "structure", 1, 3, 4)
    assert (context.batch.rows, context.batch.structure, context.structure) == (4, "structure", "structure")
    assert context.batch.arrays is arrays
    batch = Batch.of(arrays)
    assert Context.alone(batch, None, 0, 4, 4).batch is batch
