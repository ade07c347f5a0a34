"""A device that runs out of memory runs its rows in parts; one that is lost leaves them to the others."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from faults import Fault, injected
from trained_kinds import KINDS

import fastdp
from fastdp.engine.replicas import Replica
from fastdp.errors import DeviceLostError
from fastdp.runtime.host.device import HostDevice

SURVIVES = {"on_oom": "split", "on_device_loss": "continue", "timeout": 60.0}
DEVICES = 3


@pytest.fixture(autouse=True)
def devices():
    fastdp.set_virtual_devices(2 * DEVICES)
    yield
    fastdp.set_virtual_devices(0)


def made(name, devices, **options):
    """A model of float64 whose results depend on no device's rows."""
    if name != "functions":
        pytest.importorskip("torch")
        options.setdefault("sync_batch_norm", True)
    if name == "keras":
        pytest.importorskip("keras")
    # In Keras the gradient of a bias in front of BatchNormalization is noise, which Adam makes as large as any other.
    return KINDS[name](devices, normalizes=name == "torch step", dtype="float64", **options)


def engine_of(model):
    parallel = getattr(model, "parallel", model)
    calls = getattr(parallel, "_calls", None)
    return calls.engine if calls is not None else getattr(parallel, "_engine", None) or parallel.engine


def assert_close(one, other):
    most = 1e-7 if hasattr(one, "model") else 1e-9  # Keras multiplies matrices of float64 in float32
    for a, b in zip(one.state(), other.state(), strict=True):
        np.testing.assert_allclose(a, b, rtol=most, atol=most)


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
@pytest.mark.parametrize("name", KINDS)
def test_the_others_take_over_from_a_device_lost_anywhere_and_it_joins_again(name):
    model, untouched = made(name, DEVICES, **SURVIVES), made(name, [3, 4, 5])
    number, lost = 0, 0
    for verb in model.verbs:
        for device in range(1 if verb in ("reduce", "update") else DEVICES):
            with injected(Fault(verb, f"virtual:{device}" if verb != "reduce" else None, "lose")) as fault:
                model.step(number)
            engine = engine_of(model)
            assert fault.struck
            assert len(engine.devices) == DEVICES - 1, (verb, device)
            assert list(engine.lost_devices) == [f"virtual:{device}"]
            assert f"injected in {verb}" in engine.lost_devices[f"virtual:{device}"]
            untouched.step(number)
            assert_close(model, untouched)
            assert engine.rejoin_devices() == [f"virtual:{device}"]
            number, lost = number + 1, lost + 1
    model.step(number)
    untouched.step(number)
    assert_close(model, untouched)
    assert len(engine.devices) == DEVICES
    assert len(engine.report().faults) == 2 * lost


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
@pytest.mark.parametrize("name", KINDS)
def test_rows_run_in_parts_after_a_device_ran_out_of_memory(name):
    model, untouched = made(name, DEVICES, **SURVIVES), made(name, [3, 4, 5])
    number = 0
    for verb in model.verbs:
        for device in range(1 if verb in ("reduce", "update") else DEVICES):
            before = model.state()
            with injected(Fault(verb, f"virtual:{device}" if verb != "reduce" else None, "memory")) as fault:
                if verb in ("run", "merge"):
                    model.step(number)
                else:
                    with pytest.raises(MemoryError, match=f"The rows cannot run in parts.*`{verb}`"):
                        model.step(number)
                    assert all(np.array_equal(a, b) for a, b in zip(before, model.state(), strict=False))
                    model.step(number)
            engine = engine_of(model)
            assert fault.struck
            cuts = [1 + (verb in ("run", "merge") and place == device) for place in range(DEVICES)]
            assert list(engine.deal.cuts) == (cuts if max(cuts) > 1 else []), (verb, device)
            untouched.step(number)
            assert_close(model, untouched)
            number += 1
            model.step(number)
            untouched.step(number)
            assert_close(model, untouched)
            engine._roster.set_cuts({})
            number += 1


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("name", ["functions", "torch step", "keras"])
def test_on_other_numbers_of_devices_too(name, count):
    fastdp.set_virtual_devices(9)
    model, untouched = made(name, count, **SURVIVES), made(name, [8])
    for number, kind in enumerate(("delay", "memory", "lose", "delay")):
        if kind != "lose" or count > 1:
            place = "virtual:0" if count == 1 else f"virtual:{0 if kind == 'memory' else count - 1}"
            with injected(Fault("run", place, kind)):
                model.step(number)
        else:
            model.step(number)
        untouched.step(number)
        assert_close(model, untouched)
    engine = engine_of(model)
    assert len(engine.lost_devices) == (count > 1)
    assert engine.deal.cuts == (2, *[1] * (count - 2))


def in_passes(monkeypatch, strike):
    """Let `strike(device's name, rows)` run before each training pass."""
    original = Replica.train

    def train(replica, batch, context):
        strike(replica.device.name, context.rows.count)
        return original(replica, batch, context)

    monkeypatch.setattr(Replica, "train", train)


def test_rows_are_halved_until_they_fit_and_the_parts_stay(monkeypatch):
    passes = []

    def strike(name, rows):
        passes.append((name, rows))
        if name.startswith("virtual:1") and rows > 1:
            raise MemoryError("too many rows")

    model, untouched = made("functions", DEVICES, **SURVIVES), made("functions", [3, 4, 5])
    in_passes(monkeypatch, strike)
    with pytest.warns(UserWarning, match=r"virtual:1 ran out of memory on 4 rows\. Its rows run in 4 parts"):
        model.step(0)
    passes.clear()
    model.step(3)
    mine = [(name, rows) for name, rows in passes if name.startswith("virtual:1")]
    assert sorted(mine) == [(f"virtual:1 (part {part})", 1) for part in range(4)]
    untouched.step(0)
    untouched.step(3)
    assert_close(model, untouched)
    assert "runs in 4 parts" in str(model.engine.report()).replace("rows run", "runs")


def test_a_row_that_does_not_fit_is_an_error_and_rows_are_whole_again(monkeypatch):
    def strike(name, rows):
        if name.startswith("virtual:0"):
            raise MemoryError("too large")

    model = made("functions", 2, **SURVIVES)
    in_passes(monkeypatch, strike)
    with pytest.raises(fastdp.ReplicaError, match=r"one row alone needs more memory") as caught:
        model.step(0)
    assert isinstance(caught.value, MemoryError)
    assert caught.value.rows == (0, 6)
    assert [device.name for device in model.engine.devices] == ["virtual:0", "virtual:1"]


@pytest.mark.parametrize("name", ["torch step", "torch loop", "keras"])
def test_what_a_device_computes_from_all_of_its_rows_cannot_be_split(name):
    pytest.importorskip("torch")
    if name == "keras":
        pytest.importorskip("keras")
    model = KINDS[name](DEVICES, **SURVIVES)
    before = model.state()
    with injected(Fault("run", "virtual:1", "memory")), pytest.raises(MemoryError, match="sync_batch_norm=True"):
        model.step(0)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.state(), strict=False))
    model.step(0)
    assert engine_of(model).deal.cuts == ()


def bits_equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one.state(), other.state(), strict=True))


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
@pytest.mark.parametrize(
    ("name", "count", "compile"),
    [
        ("functions", 2, None),
        ("functions", 5, None),
        ("torch step", 5, None),
        ("torch step", 2, "trace"),
        ("torch loop", 2, None),
        ("keras", 2, "trace"),
        ("keras", 5, None),
    ],
)
def test_with_shards_a_lost_device_does_not_change_the_bits(name, count, compile):
    if name != "functions":
        pytest.importorskip("torch")
    if name == "keras":
        pytest.importorskip("keras")
    options = {} if compile is None else {"compile": compile}
    model, untouched = (KINDS[name](gpus, shards=6, **SURVIVES, **options) for gpus in (count, [5]))
    for number in (0, 3, 6, 9):  # batches of as many rows
        with injected(Fault("run", f"virtual:{count - 1} (part 0)", "lose" if number == 6 else "delay")) as fault:
            model.step(number)
        assert fault.struck or number == 9  # where the device is lost
        untouched.step(number)
        assert bits_equal(model, untouched), number
    engine = engine_of(model)
    assert len(engine.devices) == 6
    assert list(engine.lost_devices) == [f"virtual:{count - 1}"]
    if compile is not None:
        assert {entry["how"] for entry in model.parallel.report()} == {"traced"}


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
def test_with_shards_the_bits_after_a_cut_are_those_of_one_device_with_the_same_cut():
    model, other = (KINDS["functions"](gpus, shards=3, **SURVIVES) for gpus in (3, [4]))
    for number in range(3):
        parts = ("virtual:1 (part 0)", "virtual:4 (part 1)")  # the second shard
        for one, part in zip((model, other), parts, strict=True):
            with injected(Fault("run", part, "memory" if number == 1 else "delay")):
                one.step(number)
        assert bits_equal(model, other)
    assert model.engine.deal.cuts == other.engine.deal.cuts == (1, 2, 1)


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
def test_gradients_of_a_window_are_kept_when_a_device_is_lost_or_full():
    torch = pytest.importorskip("torch")
    found = []
    for gpus, fault in ((3, "memory"), (3, "lose"), ([3, 4, 5], "delay")):
        torch.manual_seed(0)
        module = torch.nn.Linear(6, 1).double()
        parallel = fastdp.wrap(module, gpus, compile=None, **SURVIVES)
        step = parallel.train_step(torch.nn.MSELoss(), lambda p: torch.optim.SGD(p, 0.1), accumulate=3)
        for number in range(3):
            with injected(Fault("run", "virtual:0", fault if number == 1 else "delay")):
                step(torch.arange(60.0).reshape(10, 6).double() / 60 + number, torch.ones(10, 1).double())
        found.append(module.weight.detach().numpy().copy())
    np.testing.assert_allclose(found[0], found[2], rtol=1e-9)
    np.testing.assert_allclose(found[1], found[2], rtol=1e-9)


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
def test_in_fit_a_device_that_is_back_joins_at_the_next_epoch():
    keras = pytest.importorskip("keras")
    model, untouched = made("keras", DEVICES, **SURVIVES), made("keras", [3, 4, 5])
    x, y = np.linspace(0, 1, 96).reshape(16, 6), np.linspace(1, 0, 16).reshape(16, 1)
    counts = []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: counts.append(len(model.parallel.devices))
    )
    original, passes = Replica.train, []

    def train(replica, batch, context):
        passes.append(replica.device.name)
        if passes.count("virtual:2") == 2 and passes[-1] == "virtual:2":
            raise DeviceLostError("gone for a while")
        return original(replica, batch, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replica, "train", train)
        mine = model.parallel.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[count])
    theirs = untouched.parallel.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    assert counts == [3, 2, 2, 2, 3, 3, 3, 3]
    assert_close(model, untouched)
    np.testing.assert_allclose(mine.history["loss"], theirs.history["loss"], rtol=1e-5)


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
@pytest.mark.parametrize("kind", ["lose", "memory"])
@pytest.mark.parametrize("how", ["install", "multi_gpu_model"])
def test_installed_models_and_those_of_multi_gpu_model_go_on_too(how, kind):
    keras = pytest.importorskip("keras")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5)).astype("float32"), rng.normal(size=(12, 1)).astype("float32")

    def fitted(fault):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dropout(0.2, seed=1), keras.layers.Dense(1)])
        survives = {"on_oom": "split", "on_device_loss": "continue"}
        if how == "install":
            fastdp.install(3, compile=None, **survives)
        parallel = model if how == "install" else fastdp.multi_gpu_model(model, 3, **survives)
        try:
            parallel.compile(keras.optimizers.SGD(0.1), "mse")
            counts = []
            for number in range(3):
                with injected(Fault("run", "virtual:1", fault if number == 1 else "delay")) as injection:
                    parallel.fit(x, y, batch_size=6, verbose=0, shuffle=False)
                steps = made_steps(model) if how == "install" else parallel._steps
                counts.append(len(steps.devices))
                assert injection.struck or number == 2  # whose rows may run in parts, by other names
            return counts, model.get_weights()
        finally:
            fastdp.uninstall()

    from fastdp.keras.install import made_steps

    counts, weights = fitted(kind)
    assert counts == ([3, 2, 3] if kind == "lose" else [3, 4, 4])  # a lost device is back at the next fit
    for ours, theirs in zip(weights, fitted("delay")[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
def test_steps_of_other_rows_are_compiled_anew_when_a_device_is_lost():
    pytest.importorskip("torch")
    model, untouched = (
        KINDS["torch step"](gpus, normalizes=False, dtype="float64", **SURVIVES, compile=compile)
        for gpus, compile in ((2, "inductor"), ([3, 4], None))
    )
    for number in (0, 3, 6, 9, 12, 15):  # batches of as many rows
        with injected(Fault("run", "virtual:1", "lose" if number == 6 else "delay")):
            model.step(number)
        untouched.step(number)
        assert_close(model, untouched)
    assert len(engine_of(model).devices) == 1
    assert model.parallel.compiling
    assert {entry["why"] for entry in model.parallel.report()} == {"being compiled"}
    engine_of(model).program.captures.close()
    for thread in [one for one in threading.enumerate() if one.name == "fastdp-compile-ready"]:
        thread.join(60)  # it imports what loading needs


def test_a_stalled_device_counts_as_lost_if_asked(monkeypatch):
    go_on = threading.Event()

    def strike(name, rows):
        if name == "virtual:1":
            go_on.wait(60)

    model = made("functions", DEVICES, **{**SURVIVES, "on_device_loss": "continue_stalled", "timeout": 0.5})
    untouched = made("functions", [3, 4, 5])
    in_passes(monkeypatch, strike)
    try:
        with pytest.warns(UserWarning, match=r"virtual:1 was lost \(it was not done within timeout=0\.5 seconds\)"):
            model.step(0)
    finally:
        go_on.set()
    untouched.step(0)
    assert_close(model, untouched)
    assert [device.name for device in model.engine.devices] == ["virtual:0", "virtual:2"]


def test_the_first_device_that_stalls_is_an_error(monkeypatch):
    go_on = threading.Event()

    def strike(name, rows):
        if name == "virtual:0":
            go_on.wait(60)

    model = made("functions", DEVICES, **{**SURVIVES, "on_device_loss": "continue_stalled", "timeout": 0.5})
    in_passes(monkeypatch, strike)
    monkeypatch.setattr("fastdp.engine.survival.STALL_SECONDS", 0.2)
    try:
        with pytest.raises(fastdp.DeviceTimeoutError, match="virtual:0"):
            model.step(0)
    finally:
        go_on.set()
    model.step(0)


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
def test_reports_tell_the_latest_faults_however_often_a_device_goes(monkeypatch):
    monkeypatch.setattr("fastdp.runtime.roster.MOST_TOLD", 3)
    model = made("functions", DEVICES, **SURVIVES)
    for number in range(3):
        with injected(Fault("run", "virtual:1", "lose")):
            model.step(number)
        model.engine.rejoin_devices()
    faults = model.engine.report().faults
    assert len(faults) == 3
    assert "came back" in faults[-1]


def test_the_last_device_that_is_lost_is_an_error():
    model = made("functions", 1, **SURVIVES)
    with injected(Fault("run", "virtual:0", "lose")), pytest.raises(DeviceLostError, match="no other device is left"):
        model.step(0)


def test_a_lost_device_is_an_error_by_default_and_for_other_models_too():
    model, other = made("functions", DEVICES, **SURVIVES), made("functions", DEVICES)
    with injected(Fault("run", "virtual:1", "lose")), pytest.raises(fastdp.ReplicaError) as caught:
        other.step(0)
    assert isinstance(caught.value.__cause__, DeviceLostError)
    with injected(Fault("run", "virtual:1", "lose")), pytest.warns(UserWarning, match="virtual:1 was lost"):
        model.step(0)
    with pytest.raises(DeviceLostError, match="Device virtual:1 was lost: injected in run"):
        other.step(0)


def test_a_lost_device_is_closed_and_leaves_no_thread_and_joins_only_when_it_answers(monkeypatch):
    model = made("functions", DEVICES, **SURVIVES)
    model.step(0)
    lost = model.engine.devices[1]
    with injected(Fault("run", "virtual:1", "lose")), pytest.warns(UserWarning, match="virtual:1 was lost"):
        model.step(1)
    assert lost.closed
    assert "fastdp-virtual:1" not in [thread.name for thread in threading.enumerate()]
    with monkeypatch.context() as gone:
        gone.setattr(HostDevice, "answers", lambda device: False)
        assert model.engine.rejoin_devices() == []
    assert model.engine.rejoin_devices() == ["virtual:1"]
    model.step(2)
    assert [device.name for device in model.engine.devices] == ["virtual:0", "virtual:1", "virtual:2"]
