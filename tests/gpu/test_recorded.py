"""Captured steps on GPUs: launched by the host thread and by the workers they give the same bits."""

from __future__ import annotations

import collections
import functools
import gc
import os
import signal
from typing import Any

import numpy as np
import pytest

import fastdp
from fastdp.errors import ReplicaError
from fastdp.runtime.queue import QueueDevice

pytestmark = pytest.mark.gpu

LIMIT, ROWS = 30.0, 24
# Polls after which a kernel of ours gives up waiting for a rank that was never launched: slow ones on the rig.
SPINS = 150_000 if os.environ.get("FASTDP_GPU_COMPUTE") == "host" else 2_000_000


@pytest.fixture
def recorded(gpus, monkeypatch):
    """`recorded(count, ...)`: an engine with a program of graphs, of several buckets."""
    from recorded_program import RecordedProgram
    from small_buckets import make_buckets_small

    from fastdp.comm.cuda import peer_kernels

    made = []

    def make(count: int, *, whole: bool = False, sizes=(ROWS,), by_host: bool = True, **options: Any):
        make_buckets_small(monkeypatch)
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        short = functools.partial(peer_kernels.PeerGroup, spin_limit=SPINS)
        monkeypatch.setattr(peer_kernels, "PeerGroup", short)
        program = RecordedProgram(ROWS, whole=whole)
        engine = fastdp.DataParallel(program, gpus(count), timeout=LIMIT, check_replicas=True, **options)
        engine.host_launch.enabled = by_host
        for size in sizes:
            program.record(batch(size).deal(count))
        made.append(program)
        return engine, program

    yield make
    gc.collect()
    for program in made:
        program.close()


def batch(rows: int, seed: int = 0):
    from fastdp.comm.batch import Batch

    return Batch.of([np.random.default_rng((seed, rows)).normal(size=(rows, 8)).astype("float32")])


def weights(engine: Any) -> list[np.ndarray]:
    replica = engine.replicas[0]
    return [replica.device.to_host(view) for view in replica.memory.variables.views]


class Calls:
    """Calls of CUDA that enqueue something, in their order. The call of number `fails` is refused, or interrupted."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fails = -1
        self.interrupts = False

    def through(self, module: Any, error: Any) -> Any:
        """CuPy's module, with its calls noted."""
        calls = self

        class Noting:
            def __getattr__(self, name: str) -> Any:
                found = getattr(module, name)
                return calls._noting(name, found, error) if name in ENQUEUING else found

        return Noting()

    def _noting(self, name: str, call: Any, error: Any) -> Any:
        def noted(*given: Any) -> Any:
            self.names.append(name)
            if len(self.names) - 1 == self.fails:
                if not self.interrupts:
                    raise error(719)
                signal.raise_signal(signal.SIGINT)
            return call(*given)

        return noted

    def in_step(self, step: Any) -> collections.Counter[str]:
        """The calls that `step()` makes, by name."""
        self.names.clear()
        step()
        return collections.Counter(self.names)


ENQUEUING = (
    "memcpyAsync", "memcpyPeerAsync", "memsetAsync", "eventCreateWithFlags", "eventRecord", "streamWaitEvent",
    "graphLaunch", "launchKernel",
)  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    from fastdp.runtime.cuda import cupy_api

    noted = Calls()
    monkeypatch.setattr(cupy_api, "driver", noted.through(cupy_api.driver, cupy_api.DriverError))
    monkeypatch.setattr(cupy_api, "cudart", noted.through(cupy_api.cudart, cupy_api.CudaError))
    return noted


@pytest.fixture
def woken(monkeypatch):
    """The devices whose worker was started or woken."""
    names: list[str] = []
    for name in ("_start", "_rouse"):
        before = getattr(QueueDevice, name)

        def noted(device: Any, before: Any = before, name: str = name) -> None:
            names.extend([device.name] if name == "_start" or device._asleep else [])
            before(device)

        monkeypatch.setattr(QueueDevice, name, noted)
    return names


@pytest.mark.parametrize("by_host", [True, False])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_steps_give_the_bits_of_one_device(recorded, count, whole, by_host):
    """Also where rows are uneven, too few for all devices, or of a shape that is not recorded."""
    from recorded_program import expected

    engine, program = recorded(count, whole=whole, sizes=(ROWS, ROWS - 1, 3), by_host=by_host)
    for step, size in enumerate((ROWS, ROWS - 1, ROWS, 3, ROWS, 5, ROWS - 1)):
        given, before = batch(size, step), weights(engine)
        result = engine.train(given)
        for array, was in zip(weights(engine), before, strict=True):
            np.testing.assert_array_equal(array, expected(program, was, given[0]))
        np.testing.assert_array_equal(result.outputs[0], given[0])
        firsts = given[0][[rows.start for rows in given.shards], 0].astype("float64")
        assert result.sums[0] == sum(firsts)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_no_worker_is_woken(recorded, woken, count, whole):
    engine, _ = recorded(count, whole=whole)
    engine.train(batch(ROWS))
    woken.clear()
    for step in range(3):
        engine.train(batch(ROWS, step), while_running=lambda step=step: engine.stage(batch(ROWS, step + 1)))
    assert woken == []
    engine.host_launch.enabled = False
    engine.train(batch(ROWS))
    assert set(woken) == {device.name for device in engine.devices}


@pytest.mark.parametrize("wants_outputs", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [2, 8])
def test_the_calls_of_a_step_grow_with_the_devices_alone(recorded, calls, count, whole, wants_outputs):
    """Not with their square."""
    engine, program = recorded(count, whole=whole)
    engine.check_replicas, program.update_is_reliable = False, True
    for step in range(4):
        engine.train(batch(ROWS, step), wants_outputs=wants_outputs)
    found = calls.in_step(lambda: engine.train(batch(ROWS), wants_outputs=wants_outputs))
    buckets = len(program.replicas[0].memory.gradients.buckets())
    assert found["graphLaunch"] == count * (1 if whole else buckets)
    assert found["launchKernel"] == (0 if whole else count * buckets)
    # Rows come in and are put to their place; outputs; variables; the flags of the kernels.
    assert found["memcpyAsync"] == count * (4 + wants_outputs)
    assert found["eventCreateWithFlags"] == 0
    reduced = 0 if whole else buckets
    assert found["streamWaitEvent"] <= count * (2 + 2 * reduced + (reduced > 0))
    assert found["eventRecord"] <= count * (5 + reduced + (reduced > 0)) + reduced


@pytest.mark.parametrize("how", ["refused", "interrupted"])
@pytest.mark.parametrize("by_host", [True, False])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [2])
def test_a_call_that_fails_wherever_it_is_leaves_no_step_half_done(recorded, calls, count, whole, by_host, how):
    """Refused by CUDA, or the moment of a Ctrl-C."""
    from recorded_program import expected

    engine, program = recorded(count, whole=whole, by_host=by_host)
    engine.check_replicas = False
    for step in range(4):
        engine.train(batch(ROWS, step))
    most = sum(calls.in_step(lambda: engine.train(batch(ROWS))).values())
    assert most > 10
    errors, said = (ReplicaError, "cudaError|CUDA_ERROR") if how == "refused" else (KeyboardInterrupt, None)
    calls.interrupts = how == "interrupted"
    for number in range(most):
        before, given = weights(engine), batch(ROWS, number)
        calls.names.clear()
        calls.fails = number
        with pytest.raises(errors, match=said):
            engine.train(given)
        name, calls.fails = calls.names[number], -1
        engine.accumulated()  # brings all to an end
        after = weights(engine)
        done = [expected(program, was, given[0]) for was in before]
        assert any(all(map(np.array_equal, after, those)) for those in (before, done)), (number, name)
        given = batch(ROWS, number + 1000)
        try:
            engine.train(given)
        except RuntimeError as error:
            raise AssertionError(f"after call {number}, {name}, had failed") from error
        for array, was in zip(weights(engine), after, strict=True):
            np.testing.assert_array_equal(array, expected(program, was, given[0]), f"{number} {name}")
        engine.assert_replicas_equal()
        if whole and program.is_broken(given.shards):
            program.join(given.shards)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [2])
def test_a_card_that_fails_is_named_and_the_others_wait_no_longer(recorded, monkeypatch, count, whole):
    from recorded_program import expected

    from fastdp.runtime.cuda import cupy_api

    engine, program = recorded(count, whole=whole)
    for step in range(4):
        engine.train(batch(ROWS, step))
    before, of_second = weights(engine), set()
    done, record = cupy_api.event_done, cupy_api.event_record

    def noted(event: int, stream: int) -> None:
        (of_second.add if stream == engine.devices[1].compute.handle else of_second.discard)(event)
        record(event, stream)

    def failed(event: int) -> bool:
        if event in of_second:
            raise cupy_api.CudaError(700)
        return done(event)

    with monkeypatch.context() as patch:
        patch.setattr(cupy_api, "event_record", noted)
        patch.setattr(cupy_api, "event_done", failed)
        with pytest.raises(ReplicaError, match=r":1 \(rows 12 to 24.*cudaErrorIllegalAddress"):
            engine.train(batch(ROWS))
    for array, was in zip(weights(engine), before, strict=True):
        np.testing.assert_array_equal(array, was)
    assert program.is_broken(batch(ROWS).deal(2)) == whole
    engine.train(batch(ROWS))
    for array, was in zip(weights(engine), before, strict=True):
        np.testing.assert_array_equal(array, expected(program, was, batch(ROWS)[0]))


@pytest.mark.parametrize("by_host", [True, False])
@pytest.mark.parametrize("count", [1, 4])
def test_gradients_that_wait_are_reduced_by_a_later_step(recorded, count, by_host):
    from recorded_program import expected

    engine, program = recorded(count, by_host=by_host)
    engine.check_replicas = False  # those that wait for gradients have no update
    before = weights(engine)
    engine.train(batch(ROWS, 1), reduce=False)
    engine.train(batch(ROWS, 2))
    for array, was in zip(weights(engine), before, strict=True):
        np.testing.assert_array_equal(array, expected(program, was, batch(ROWS, 1)[0]))
    engine.assert_replicas_equal()


@pytest.mark.parametrize("by_host", [True, False])
@pytest.mark.parametrize("count", [2])
def test_engines_share_cards_and_outputs_stay_on_one(recorded, count, by_host):
    from recorded_program import RecordedProgram, expected

    engine, program = recorded(count, whole=True, by_host=by_host, cpu_merge=False, merge_device=1)
    other_program = RecordedProgram(ROWS)
    other = fastdp.DataParallel(other_program, engine.devices, timeout=LIMIT)
    other_program.record(batch(ROWS).deal(2))
    other.host_launch.enabled = by_host
    for step in range(6):
        for one, its in ((engine, program), (other, other_program)):
            given, before = batch(ROWS, step), weights(one)
            one.train(given)
            for array, was in zip(weights(one), before, strict=True):
                np.testing.assert_array_equal(array, expected(its, was, given[0]))
    merged = engine.train(given).outputs[0]
    np.testing.assert_array_equal(engine.devices[1].to_host(merged), given[0])
    other_program.close()


def test_large_batches_in_host_memory_are_copied_by_workers_unless_they_were_staged(recorded, woken, monkeypatch):
    from fastdp.engine import host_launch

    engine, _ = recorded(1)
    monkeypatch.setattr(host_launch, "MOST_NBYTES", 0)
    given, after = batch(ROWS, 1), batch(ROWS, 2)
    engine.train(given)
    woken.clear()
    engine.train(given, while_running=lambda: engine.stage(after))
    assert woken
    woken.clear()
    engine.train(after)
    assert woken == []


def steps_are_right(engine, program, sizes, before_each=lambda step: None) -> None:
    """Train on batches of these sizes, and look at the weights after each step."""
    from recorded_program import expected

    for step, size in enumerate(sizes):
        more = before_each(step) or {}
        given, was = batch(size, step), weights(engine)
        engine.train(given, **more)
        for array, before in zip(weights(engine), was, strict=True):
            np.testing.assert_array_equal(array, expected(program, before, given[0]), f"step {step}")
    engine.assert_replicas_equal()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [2])
def test_rows_come_right_whether_others_were_staged_taken_replaced_or_forgotten(recorded, count, whole):
    """Copies of rows that no step takes may still be on their way when rows go by the compute stream."""
    engine, program = recorded(count, whole=whole, sizes=(ROWS, ROWS - 1))
    nothing, next_one, another = (lambda step: None), (lambda step: batch(ROWS, step + 1)), (lambda step: batch(ROWS))
    ways = [nothing, next_one, another, nothing, another, next_one, another, another, nothing]
    staged = [None]

    def meanwhile(step: int) -> dict[str, Any]:
        if step % 4 == 3:
            engine.forget_staged()

        def stage() -> None:
            staged[0] = ways[step % len(ways)](step)
            if staged[0] is not None:
                engine.stage(staged[0])
                if step % 5 == 4:
                    engine.stage(batch(ROWS, 1000))

        return {"while_running": stage}

    steps_are_right(engine, program, [ROWS if step % 7 else ROWS - 1 for step in range(27)], meanwhile)


@pytest.mark.parametrize("count", [2])
def test_bound_collectives_follow_the_choice_of_algorithms_and_the_memory_of_kernels(recorded, count):
    """They hold addresses of memory that a model with larger buckets has made anew."""
    from fastdp.comm.algorithm import Limits

    engine, program = recorded(count)
    communicator = engine._communicator
    made = []

    def change(step: int) -> None:
        made.append(engine._reductions._here)
        if step == 5:
            communicator.choice.limits = Limits(1 << 30, 1 << 30)
        if step == 9:
            held = communicator._kernels._groups[0].half_nbytes
            communicator._kernels._allocate(4 * held)
        if step == 13:
            communicator.choice.limits = Limits(-1, 1 << 30)
        if step == 17:
            communicator.choice.limits = None

    steps_are_right(engine, program, [ROWS] * 22, change)
    assert len({id(one) for one in made if one is not None}) == 6  # two before steps are warm and after, then four


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [2, 8])
def test_a_step_makes_no_object_for_each_event(recorded, calls, monkeypatch, count, whole):
    """And no stream waits for an earlier step, or for rows."""
    from fastdp.runtime.cuda import streams

    engine, program = recorded(count, whole=whole)
    engine.check_replicas, program.update_is_reliable = False, True
    for step in range(5):
        engine.train(batch(ROWS, step), wants_outputs=False)
    made = []
    for name in ("issued_already", "__init__"):
        found = vars(streams.CudaEvent)[name]
        plain = found.__func__ if isinstance(found, classmethod) else found

        def noted(*given: Any, plain: Any = plain) -> Any:
            made.append(given)
            return plain(*given)

        monkeypatch.setattr(streams.CudaEvent, name, classmethod(noted) if plain is not found else noted)
    found = calls.in_step(lambda: engine.train(batch(ROWS), wants_outputs=False))
    assert made == []
    buckets = len(program.replicas[0].memory.gradients.buckets())
    # Behind the rows, the graphs and the update; each bucket; the collectives; the gates of buckets.
    assert found["eventRecord"] == 3 * count + (0 if whole else count * buckets + count + buckets)
    # One rank's collectives wait for all, the others' for it; compute streams for the collectives.
    assert found["streamWaitEvent"] == (0 if whole else buckets * (2 * count - 1) + count)


@pytest.mark.parametrize("count", [2])
def test_an_interrupt_before_the_values_are_there_ends_the_wait_for_them(recorded, monkeypatch, count):
    """It is held back while calls are made, but not while the host waits for a GPU that may never be done."""
    from fastdp.engine import host_launch

    engine, program = recorded(count)
    steps_are_right(engine, program, [ROWS] * 4)
    before, wait = weights(engine), host_launch.first_done
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        waited = []

        def interrupted(events: Any, timeout: float) -> Any:
            waited.append(timeout)
            signal.raise_signal(signal.SIGINT)
            return wait(events, timeout)

        with monkeypatch.context() as patch:
            patch.setattr(host_launch, "first_done", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.train(batch(ROWS))
        assert waited == [LIMIT]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, old)
    engine.accumulated()  # brings all to an end
    for array, was in zip(weights(engine), before, strict=True):
        np.testing.assert_array_equal(array, was)
    steps_are_right(engine, program, [ROWS] * 2)


@pytest.mark.parametrize("count", [2, 8])
def test_weights_that_the_user_may_write_are_copied_before_each_step_by_calls_that_grow_with_the_devices(
    recorded, calls, monkeypatch, count
):
    """Each device pulls them, and the first one waits for all before it writes them again."""
    from recorded_program import RecordedProgram

    monkeypatch.setattr(RecordedProgram, "home_is_exposed", True)
    engine, program = recorded(count)
    steps_are_right(engine, program, [ROWS, ROWS, ROWS - 1, ROWS, 1, ROWS])
    program.update_is_reliable = True
    engine.train(batch(ROWS))
    found = calls.in_step(lambda: engine.train(batch(ROWS), wants_outputs=False))
    buckets = len(program.replicas[0].memory.gradients.buckets())
    assert found["memcpyPeerAsync"] + found["memcpyAsync"] == count * 3 + 1 + count - 1
    assert found["streamWaitEvent"] == count - 1 + buckets * (2 * count - 1) + count
