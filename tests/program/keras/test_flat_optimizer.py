"""Optimizers applied to flat buffers do what Keras does to each variable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch

import fastdp
from fastdp.program.base import Totals
from fastdp.program.keras.optimizer import flat as flat_optimizer
from fastdp.program.keras.optimizer import regions
from fastdp.program.keras.optimizer.direct import DirectUpdate
from fastdp.program.keras.optimizer.fused import rate_of_adam
from fastdp.program.keras.step_sums import Notes

optimizers, layers = keras.optimizers, keras.layers
Make = Callable[..., Any]

# All settings of each class that change its formula.
FORMULAS: dict[str, Make] = {
    "SGD": lambda **o: optimizers.SGD(0.1, **o),
    "SGD momentum": lambda **o: optimizers.SGD(0.1, momentum=0.9, **o),
    "SGD nesterov": lambda **o: optimizers.SGD(0.1, momentum=0.9, nesterov=True, **o),
    "Adam": lambda **o: optimizers.Adam(0.01, **o),
    "AMSGrad": lambda **o: optimizers.Adam(0.01, amsgrad=True, epsilon=1e-3, **o),
    "AdamW": lambda **o: optimizers.AdamW(0.01, **{"weight_decay": 0.1, **o}),
    "RMSprop": lambda **o: optimizers.RMSprop(0.01, **o),
    "RMSprop centered": lambda **o: optimizers.RMSprop(0.01, momentum=0.5, centered=True, **o),
    "Adagrad": lambda **o: optimizers.Adagrad(0.01, **o),
    "Adadelta": lambda **o: optimizers.Adadelta(1.0, **o),
    "Adamax": lambda **o: optimizers.Adamax(0.01, **o),
    "Nadam": lambda **o: optimizers.Nadam(0.01, **o),
    "Lion": lambda **o: optimizers.Lion(0.001, **o),
    "Ftrl": lambda **o: optimizers.Ftrl(0.01, l1_regularization_strength=0.01, beta=0.1, **o),
    "Ftrl plain": lambda **o: optimizers.Ftrl(0.01, **o),
}
# What Keras does around an update.
AROUND: dict[str, dict[str, Any]] = {
    "decay": {"weight_decay": 0.05},
    "clipvalue": {"clipvalue": 0.3},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "averages": {"use_ema": True, "ema_momentum": 0.6},
    "averages taken over": {"use_ema": True, "ema_momentum": 0.6, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation and averages": {"gradient_accumulation_steps": 2, "use_ema": True, "ema_overwrite_frequency": 2},
    "loss scale": {"loss_scale_factor": 8.0},
}


# Torch rounds 16-bit numbers in between where a tensor's end does not fill a vector, and not elsewhere: Keras's own
# results depend on where in its array a number stands.
TOLERANCES = {"float64": 1e-12, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these models are cut into several."""
    monkeypatch.setattr(regions, "PIECE", 16)


@pytest.fixture(scope="module", autouse=True)
def virtual_devices() -> Iterator[None]:
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


@pytest.fixture(autouse=True)
def default_dtype_policy() -> Iterator[None]:
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


def build(dtypes: Any = ("float32",) * 3) -> keras.Model:
    """Weights of odd sizes, so that there are gaps between them, and others in between that are not trained."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(5)
    hidden = layers.Dense(7, activation="tanh", name="hidden", dtype=dtypes[0])
    norm = layers.BatchNormalization(name="norm", dtype=dtypes[1])
    return keras.Sequential([keras.Input((3,)), hidden, norm, layers.Dense(2, name="last", dtype=dtypes[2])])


def values(variables: Any) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(keras.ops.cast(v, "float64")) for v in variables]


def gradients(model: keras.Model, step: int) -> list[np.ndarray]:
    """Of sizes over six orders of magnitude, and some zeros."""
    rng = np.random.default_rng(step)
    found = [rng.normal(size=v.shape) * 10.0 ** rng.integers(-5, 1, v.shape) for v in model.trainable_variables]
    return [np.where(rng.random(g.shape) < 0.1, 0, g) for g in found]


def plain(make: Make, steps: int, unused: Any = (), dtypes: Any = ("float32",) * 3) -> tuple[Any, Any]:
    """A model and its optimizer after updates by Keras, variable by variable."""
    model, optimizer = build(dtypes), make()
    optimizer.build(model.trainable_variables)
    for step in range(steps):
        arrays = [
            keras.ops.cast(g, v.dtype) for g, v in zip(gradients(model, step), model.trainable_variables, strict=True)
        ]
        optimizer.apply([None if i in unused else g for i, g in enumerate(arrays)], model.trainable_variables)
    return model, optimizer


def flat(make: Make, steps: int, unused: Any = (), dtypes: Any = ("float32",) * 3) -> tuple[Any, Any, Any]:
    """A model, its optimizer and the engine after the same updates by fastdp."""
    model = build(dtypes)
    parallel = fastdp.wrap(model, gpus=1)
    parallel.compile(optimizer=make(), loss="mse")
    engine = parallel.engine
    for step in range(steps):
        update(engine, gradients(model, step), unused)
    return model, parallel.optimizer, engine


def update(engine: Any, arrays: list[np.ndarray], unused: Any = ()) -> None:
    """One update of the first replica with these gradients."""
    state, program = engine.replicas[0]._state, engine.program
    for i, (tensor, array) in enumerate(zip(state.gradients, arrays, strict=True)):
        tensor.copy_(keras.ops.convert_to_tensor(np.zeros_like(array) if i in unused else array))
    notes = Notes(unused=frozenset(unused))
    program.update(state, Totals(np.zeros(1), notes, [notes]))


def assert_same(expected: Any, found: Any, times: float = 1.0) -> None:
    """Weights and slots agree to `times` the tolerance of their dtype, relative to each array's largest number, and
    names and shapes exactly."""
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert [v.shape for v in ours.variables] == [v.shape for v in theirs.variables]
        assert [v.path for v in ours.variables][2:] == [v.path for v in theirs.variables][2:]
        for a, b, variable in zip(values(ours.variables), values(theirs.variables), theirs.variables, strict=True):
            allowed = times * TOLERANCES.get(variable.dtype, 0.0) * float(np.abs(b).max(initial=0.0))
            np.testing.assert_allclose(a, b, rtol=0, atol=allowed, err_msg=variable.path)


def assert_gaps_are_zero(engine: Any) -> None:
    """What lies between the arrays of the first replica's buffers is zero: whole buffers are compared and summed."""
    memory = engine.replicas[0].memory
    for buffers in (memory.variables, memory.slots, memory.gradients):
        held = {dtype: np.array(buffer, copy=True) for dtype, buffer in buffers.buffers.items()}
        before = [np.array(view, copy=True) for view in buffers.views]
        for view in buffers.views:
            view[...] = 0
        left = {dtype: np.array(buffer, copy=True) for dtype, buffer in buffers.buffers.items()}
        for view, value in zip(buffers.views, before, strict=True):
            view[...] = value
        assert all(not buffer.view(np.uint8).any() for buffer in left.values()), left
        assert all(np.array_equal(held[dtype], buffers.buffers[dtype], equal_nan=True) for dtype in held)


@pytest.mark.parametrize("name", FORMULAS)
def test_flat_update_equals_that_of_each_variable(name: str) -> None:
    made = flat(FORMULAS[name], 6)
    assert made[2].program.update_how == "flat"
    assert_same(plain(FORMULAS[name], 6), made)
    assert_gaps_are_zero(made[2])


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ["SGD momentum", "Adam", "AdamW", "Nadam", "Ftrl"])
def test_what_keras_does_around_an_update_is_done_to_flat_buffers(name: str, around: str) -> None:
    make = lambda: FORMULAS[name](**AROUND[around])  # noqa: E731
    made = flat(make, 7)
    assert made[2].program.update_how == "flat"
    # The norm is a sum, in another order. Ftrl subtracts numbers of nearly the same size.
    assert_same(plain(make, 7), made, 10.0 if (name, around) == ("Ftrl", "global_clipnorm") else 1.0)
    assert_gaps_are_zero(made[2])


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "Lion"])
def test_variables_without_decay_have_none(name: str) -> None:
    def make() -> Any:
        made = FORMULAS[name](weight_decay=0.3)
        made.exclude_from_weight_decay(var_names=["bias", "gamma"])
        return made

    expected, found = plain(make, 4), flat(make, 4)
    assert_same(expected, found)
    with pytest.raises(AssertionError):
        assert_same(plain(lambda: FORMULAS[name](weight_decay=0.3), 4), found)


@pytest.mark.parametrize("around", [{}, *AROUND.values()], ids=["plain", *AROUND])
@pytest.mark.parametrize("name", ["SGD momentum", "Adam", "Nadam"])
def test_variables_without_a_gradient_stay_and_are_warned_of(name: str, around: dict[str, Any]) -> None:
    make = lambda: FORMULAS[name](**around)  # noqa: E731
    with pytest.warns(UserWarning, match=r"for variables \['sequential/hidden/bias', 'sequential/norm/gamma'\] when"):
        found = flat(make, 4, unused=(1, 2))
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        expected = plain(make, 4, unused=(1, 2))
    assert_same(expected, found)


def test_no_gradient_at_all_is_keras_error() -> None:
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        flat(FORMULAS["Adam"], 1, unused=range(6))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["SGD momentum", "Adam", "RMSprop"])  # Keras's Nadam fails on bfloat16
def test_other_dtypes_round_as_keras_does(name: str, dtype: str) -> None:
    make = lambda: FORMULAS[name](**({"epsilon": 1e-3} if "SGD" not in name else {}))  # noqa: E731
    found = flat(make, 4, dtypes=(dtype,) * 3)
    assert found[2].program.update_how == "flat"
    assert_same(plain(make, 4, dtypes=(dtype,) * 3), found)


@pytest.mark.parametrize("dtypes", [("float32", "float32", "float64"), ("float32", "bfloat16", "float32")], ids=str)
@pytest.mark.parametrize("unused", [(), (0, 1), (0, 1, 2, 3)], ids=["all used", "two unused", "four unused"])
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "Ftrl"])
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_variables_of_two_dtypes_use_the_numbers_of_the_first(name: str, unused: Any, dtypes: Any) -> None:
    found = flat(FORMULAS[name], 4, unused=unused, dtypes=dtypes)
    assert found[2].program.update_how == "flat"
    assert_same(plain(FORMULAS[name], 4, unused=unused, dtypes=dtypes), found)


def test_learning_rate_schedules_and_assigned_rates() -> None:
    schedule = lambda: optimizers.Adam(optimizers.schedules.ExponentialDecay(0.1, 2, 0.5))  # noqa: E731
    assert_same(plain(schedule, 5), flat(schedule, 5))
    (model, ours, engine), (theirs_model, theirs) = flat(FORMULAS["Adam"], 2), plain(FORMULAS["Adam"], 2)
    for step, optimizer in ((3, ours), (3, theirs)):
        optimizer.learning_rate = 0.5
        optimizer.beta_1 = 0.5
        if optimizer is ours:
            update(engine, gradients(model, step))
        else:
            arrays = [keras.ops.cast(g, "float32") for g in gradients(model, step)]
            theirs.apply(arrays, theirs_model.trainable_variables)
    assert_same((theirs_model, theirs), (model, ours))


def test_a_rate_of_zero_changes_no_weight() -> None:
    make = lambda: optimizers.AdamW(0.0, weight_decay=0.1)  # noqa: E731
    for a, b in zip(values(build().variables), values(flat(make, 3)[0].variables), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["SGD momentum", "Adam"])
def test_loss_scale_optimizer_unscales_and_skips_overflows(name: str) -> None:
    make = lambda: optimizers.LossScaleOptimizer(  # noqa: E731
        FORMULAS[name](), initial_scale=4.0, dynamic_growth_steps=2
    )
    expected, found = plain(make, 5), flat(make, 5)
    assert found[2].program.update_how == "flat"
    assert float(expected[1].dynamic_scale) == 16.0
    assert_same(expected, found)
    before = values(found[0].variables)
    arrays = gradients(found[0], 9)
    arrays[0][0, 0] = np.inf
    update(found[2], arrays)
    assert all(np.array_equal(a, b) for a, b in zip(before, values(found[0].variables), strict=True))
    assert float(found[1].dynamic_scale) == 8.0


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad", "Ftrl plain"])
def test_gaps_stay_zero_where_the_formula_would_divide_zero_by_zero(name: str) -> None:
    make = FORMULAS[name] if name == "Ftrl plain" else lambda: getattr(optimizers, name)(0.01, epsilon=0.0)
    assert_gaps_are_zero(flat(make, 3)[2])


# What stays per variable, and says so.


class Doubled(optimizers.SGD):
    """A user's own."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        variable.assign(variable - 2 * learning_rate * gradient)


REASONS: dict[str, tuple[Make, str]] = {
    "clipnorm": (lambda: optimizers.SGD(0.1, clipnorm=0.2), "clipnorm"),
    "Lamb": (lambda: optimizers.Lamb(0.1), "Lamb is not known to be elementwise"),
    "Adafactor": (lambda: optimizers.Adafactor(0.1), "Adafactor is not known"),
    "Muon": (lambda: optimizers.Muon(0.1), "Muon is not known"),
    "ScheduleFreeAdamW": (lambda: optimizers.ScheduleFreeAdamW(0.1), "ScheduleFreeAdamW is not known"),
    "user's": (lambda: Doubled(0.1), "Doubled is not known"),
    "user's inside": (lambda: optimizers.LossScaleOptimizer(Doubled(0.1)), "Doubled is not known"),
    "rate": (lambda: optimizers.SGD(lambda: 0.1), "the learning rate is a function"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_elementwise_is_applied_to_each_variable(name: str) -> None:
    make, why = REASONS[name]
    found = flat(make, 3)
    how = found[2].program.update_how
    assert how.startswith("per variable: ")
    assert why in how
    assert found[2].replicas[0]._state.flat_update is None


def test_constraints_are_applied_to_each_variable() -> None:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, kernel_constraint="non_neg")])
    parallel = fastdp.wrap(model, gpus=1)
    parallel.compile("sgd", "mse")
    assert parallel.engine.program.update_how == "per variable: variables have constraints"


def test_clipnorm_that_is_set_between_steps_is_obeyed() -> None:
    model, optimizer, engine = flat(FORMULAS["SGD"], 0)
    assert engine.program.update_how == "flat"
    optimizer.clipnorm = 0.1
    before = values(model.trainable_variables)
    update(engine, gradients(model, 0))
    assert "clipnorm" in engine.program.update_how
    moved = [np.linalg.norm(a - b) for a, b in zip(before, values(model.trainable_variables), strict=True)]
    assert max(moved) <= 0.1 * 0.1 * 1.001


# Whole steps.


def data(rows: int = 9) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(rows, 3)).astype("float32"), "y": rng.normal(size=(rows, 2)).astype("float32")}


@pytest.mark.parametrize("how", ["first", "each"])
def test_replicas_are_bitwise_equal_after_flat_updates(how: str) -> None:
    parallel = fastdp.wrap(build(), gpus=3, update=how, check_replicas=True)
    parallel.compile(optimizer=FORMULAS["Ftrl plain"](), loss="mse")
    parallel.fit(**data(), epochs=3, batch_size=4, verbose=0)
    parallel.compile(optimizer=FORMULAS["Adam"](), loss="mse")
    parallel.fit(**data(), epochs=3, batch_size=4, verbose=0)
    assert parallel.engine.program.update_how == "flat"


def lasting(engine: Any) -> list[bytes]:
    """Variables and slots of all replicas, to the last bit."""
    flats = [flat for replica in engine.replicas for flat in replica.lasting]
    return [buffer.tobytes() for flat in flats for buffer in flat.buffers.values()]


@pytest.mark.parametrize("around", [{}, *AROUND.values()], ids=["plain", *AROUND])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_rehearsal_changes_nothing(name: str, around: dict[str, Any]) -> None:
    _model, optimizer, engine = flat(lambda: FORMULAS[name](**around), 2)
    before, iterations = lasting(engine), int(optimizer.iterations)
    assert engine.program.rehearse_update(engine.replicas[0]._state)
    assert (lasting(engine), int(optimizer.iterations)) == (before, iterations)
    assert_gaps_are_zero(engine)


@pytest.mark.parametrize("gpus", [1, 3])
def test_a_first_update_that_fails_in_its_rehearsal_changes_nothing_and_saves_nothing(
    gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(variables: Any, *others: Any, **settings: Any) -> None:
        variables[0].add_(1)  # harmless to a copy
        raise MemoryError("no room for it")

    parallel = fastdp.wrap(build(), gpus=gpus, compile=None)
    parallel.compile(optimizer=FORMULAS["Adam"](), loss="mse")
    assert parallel.engine.program.slot_variables  # made for training, before anything is predicted
    parallel.predict(data()["x"], verbose=0)  # all replicas have the weights
    before = lasting(parallel.engine)
    monkeypatch.setattr(torch, "_fused_adam_", broken)
    with pytest.raises(MemoryError, match="no replica's weights were changed"):
        parallel.fit(**data(), epochs=1, verbose=0)
    assert lasting(parallel.engine) == before
    monkeypatch.undo()
    parallel.fit(**data(), epochs=1, verbose=0)
    assert lasting(parallel.engine) != before
    assert parallel.engine.rollback.nbytes == 0


def test_saved_optimizer_is_kerass_own_and_training_goes_on_from_it(tmp_path: Path) -> None:
    parallel = fastdp.wrap(build(), gpus=2)
    parallel.compile(optimizer=FORMULAS["AMSGrad"](), loss="mse")
    parallel.fit(**data(), epochs=2, batch_size=4, verbose=0, shuffle=False)
    parallel.template.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(values(loaded.optimizer.variables), values(parallel.optimizer.variables), strict=True):
        np.testing.assert_array_equal(a, b)
    again = fastdp.wrap(loaded, gpus=2)
    again.compile(optimizer=loaded.optimizer, loss="mse")
    for one in (parallel, again):
        one.fit(**data(), batch_size=4, verbose=0, shuffle=False)
    for a, b in zip(values(again.variables), values(parallel.variables), strict=True):
        np.testing.assert_array_equal(a, b)


SETTINGS = {"SGD": (), "SGD nesterov": ("momentum",)}  # that change from step to step below


@pytest.mark.parametrize("name", ["SGD", "SGD nesterov", "Adam", "AMSGrad"])
def test_an_update_without_keras_has_the_same_bits_by_the_settings_of_each_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*, direct: bool) -> tuple[list[bytes], int]:
        model, optimizer, engine = flat(FORMULAS[name], 1)
        calls = 0
        once = DirectUpdate.__call__

        def counted(self: Any, present: Any) -> bool:
            nonlocal calls
            calls += 1
            return once(self, present)

        with monkeypatch.context() as patch:
            patch.setattr(DirectUpdate, "__call__", counted)
            if not direct:
                patch.setattr(flat_optimizer, "is_plain", lambda optimizer: False)
            for step, rate in enumerate((0.05, 0.02, 0.0), start=1):
                optimizer.learning_rate = rate
                for setting in SETTINGS.get(name, ("beta_1", "beta_2")):
                    setattr(optimizer, setting, 0.5 + 0.1 * step)
                if step == 3 and hasattr(optimizer, "epsilon"):
                    optimizer.epsilon = 0.0  # 0 / 0 in the gaps
                engine.program.changed_outside()
                update(engine, [g + 1 for g in gradients(model, step)])
                assert_gaps_are_zero(engine)
        return lasting(engine), calls

    (expected, none), (found, calls) = trained(direct=False), trained(direct=True)
    assert (none, calls) == (0, 3)
    assert found == expected


@pytest.mark.parametrize(
    "around", [*AROUND.values(), {"learning_rate": optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)}]
)
def test_what_keras_does_around_an_update_is_left_to_it(
    around: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DirectUpdate, "__call__", lambda *_: pytest.fail("Keras was left out"))
    flat(lambda: optimizers.Adam(**around), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adams_rate_in_python_is_kerass(dtype: torch.dtype) -> None:
    digits = torch.finfo(dtype).eps
    for done in (0, 1, 2, 50, 999, 10**5, 2**24 + 1):
        step = torch.tensor(done + 1).to(dtype)
        first, second = (torch.full_like(step, beta).pow(step) for beta in (0.9, 0.999))
        expected = float(torch.tensor(0.01).to(dtype) * torch.sqrt(1 - second) / (1 - first))
        found = rate_of_adam(float(torch.tensor(0.01)), done, dtype, 0.9, 0.999)
        assert abs(found - expected) <= 2 * digits * expected
