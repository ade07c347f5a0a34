"""Optimizers, clipping, schedules, constraints, averages, accumulation and mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest

import fastdp
from fastdp.engine.updates import update_mode
from fastdp.options import Options

optimizers, layers = keras.optimizers, keras.layers
# Adam and its kin divide by the root of a running mean of squared gradients: where a gradient is nearly zero, a
# rounding error of the sum over replicas becomes a step of the size of the learning rate. SGD has no such division.
ADAPTIVE = 1e-3
RATE = 0.01
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: optimizers.SGD(RATE, momentum=0.9, nesterov=True, weight_decay=0.01),
    "RMSprop": lambda: optimizers.RMSprop(RATE, momentum=0.5, centered=True),
    "Adam": lambda: optimizers.Adam(RATE),
    "AMSGrad": lambda: optimizers.Adam(RATE, amsgrad=True),
    "AdamW": lambda: optimizers.AdamW(RATE, weight_decay=0.1),
    "Adadelta": lambda: optimizers.Adadelta(1.0),
    "Adagrad": lambda: optimizers.Adagrad(RATE),
    "Adamax": lambda: optimizers.Adamax(RATE),
    "Adafactor": lambda: optimizers.Adafactor(RATE),
    "Nadam": lambda: optimizers.Nadam(RATE),
    "Ftrl": lambda: optimizers.Ftrl(RATE, l1_regularization_strength=0.01),
    "Lion": lambda: optimizers.Lion(RATE / 10),
    "Lamb": lambda: optimizers.Lamb(RATE),
    "Muon": lambda: optimizers.Muon(RATE, exclude_layers=["last"]),
    "LossScaleOptimizer": lambda: optimizers.LossScaleOptimizer(
        optimizers.SGD(RATE), initial_scale=8.0, dynamic_growth_steps=3
    ),
}
# The base class; two that hand variables out to optimizers that the user names.
NOT_ALONE = {"Optimizer", "MultiOptimizer", "OptimizerMap"}
NOT_AS_KERAS = {"ScheduleFreeAdamW"}  # tested against fastdp on one device, below


def build(**options: Any) -> keras.Model:
    hidden = layers.Dense(5, activation="tanh", name="hidden", **options)
    return keras.Sequential([keras.Input((3,)), hidden, layers.Dense(2, name="last")])


def batches(sizes: Any = (7, 2, 5, 9)) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"x": rng.normal(size=(n, 3)).astype("float32"), "y": rng.normal(size=(n, 2)).astype("float32")} for n in sizes
    ]


def by(optimizer: Callable[[], Any], **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"optimizer": optimizer(), "loss": "mse", **more}


def test_every_optimizer_of_keras_is_in_the_list() -> None:
    classes = {n for n in dir(optimizers) if isinstance(getattr(optimizers, n), type)}
    assert classes <= {*OPTIMIZERS, *NOT_ALONE, *NOT_AS_KERAS}


@pytest.mark.parametrize("gpus", [3, 8])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_equals_one_device(name: str, gpus: int, equals_one_device: Any) -> None:
    tolerance = 1e-5 if name in ("SGD", "LossScaleOptimizer") else ADAPTIVE
    equals_one_device(build, by(OPTIMIZERS[name]), batches() * 2, gpus=gpus, tolerance=tolerance)


def test_schedule_free_adamw_is_the_same_on_any_number_of_devices(twins: Any, same: Any) -> None:
    """Not compared with plain Keras, whose update reads the old momentum from a tensor that it has just changed
    in place (on torch alone). fastdp's update assigns nothing in place, and follows the written formula."""
    recipe = twins(build, by(lambda: optimizers.ScheduleFreeAdamW(RATE)))
    one, *many = (recipe.by_batches(gpus, batches() * 2) for gpus in (1, 3, 8))
    for run in many:
        same(one, run, ADAPTIVE)


@pytest.mark.parametrize("clip", [{"clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"clipvalue": 0.02}])
def test_clipping_acts_on_the_gradient_of_the_whole_batch(clip: dict[str, float], equals_one_device: Any) -> None:
    equals_one_device(build, by(lambda: optimizers.SGD(0.5, **clip)), batches(), gpus=3)


def test_weight_decay_with_excluded_variables_equals_one_device(equals_one_device: Any) -> None:
    def optimizer() -> Any:
        made = optimizers.SGD(0.1, weight_decay=0.2)
        made.exclude_from_weight_decay(var_names=["bias"])
        return made

    equals_one_device(build, by(optimizer), batches(), gpus=3)


@pytest.mark.parametrize("frequency", [None, 2])
def test_moving_averages_of_the_weights_equal_one_device(frequency: int | None, equals_one_device: Any) -> None:
    made = lambda: optimizers.SGD(0.2, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=frequency)  # noqa: E731
    equals_one_device(build, by(made), batches(), gpus=3)
    equals_one_device(build, by(made), data=batches([13])[0], gpus=3, batch_size=4, epochs=2)


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_gradient_accumulation_equals_one_device(kind: str, steps: int, equals_one_device: Any) -> None:
    made = lambda: getattr(optimizers, kind)(0.05, gradient_accumulation_steps=steps)  # noqa: E731
    equals_one_device(build, by(made), batches() * 2, gpus=3, tolerance=1e-5 if kind == "SGD" else ADAPTIVE)


@pytest.mark.parametrize(
    "constraint", [keras.constraints.MaxNorm(0.5), keras.constraints.NonNeg()], ids=["max norm", "non-negative"]
)
def test_constraints_equal_one_device_and_hold(constraint: Any, equals_one_device: Any) -> None:
    make = lambda: build(kernel_constraint=constraint, bias_constraint=constraint)  # noqa: E731
    run = equals_one_device(make, by(lambda: optimizers.SGD(0.5)), batches(), gpus=3)
    kernel = run.model.get_layer("hidden").kernel
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(constraint(kernel)), keras.ops.convert_to_numpy(kernel), atol=1e-6
    )


@pytest.mark.parametrize("kind", ["L1", "L2", "L1L2", "OrthogonalRegularizer"])
def test_regularizers_equal_one_device(kind: str, equals_one_device: Any) -> None:
    make = lambda: build(kernel_regularizer=getattr(keras.regularizers, kind)())  # noqa: E731
    equals_one_device(make, by(lambda: optimizers.SGD(0.1)), batches(), gpus=3)


# Learning rates.


def test_learning_rate_schedules_equal_one_device(equals_one_device: Any) -> None:
    for schedule in (
        lambda: optimizers.schedules.ExponentialDecay(0.2, 2, 0.5),
        lambda: optimizers.schedules.CosineDecay(0.2, 6, warmup_target=0.3, warmup_steps=2),
        lambda: optimizers.schedules.PiecewiseConstantDecay([2, 5], [0.3, 0.1, 0.01]),
    ):
        equals_one_device(build, by(lambda s=schedule: optimizers.SGD(s())), batches() * 2, gpus=3)


def test_learning_rate_scheduler_callback_equals_one_device(equals_one_device: Any) -> None:
    made = lambda: [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)]  # noqa: E731
    data = batches([13])[0]
    run = equals_one_device(
        build, by(lambda: optimizers.SGD(0.4)), data=data, gpus=3, epochs=3, batch_size=4, callbacks=made
    )
    assert float(run.trained.optimizer.learning_rate) == pytest.approx(0.05)


def test_reduce_lr_on_plateau_equals_one_device(equals_one_device: Any) -> None:
    made = lambda: [  # noqa: E731
        keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1, factor=0.1, min_delta=10.0)
    ]
    data = batches([13])[0]
    run = equals_one_device(
        build, by(lambda: optimizers.SGD(0.4)), data=data, gpus=3, epochs=4, batch_size=4, callbacks=made
    )
    assert float(run.trained.optimizer.learning_rate) < 0.4


def test_early_stopping_that_restores_the_best_weights_equals_one_device(equals_one_device: Any) -> None:
    made = lambda: [  # noqa: E731
        keras.callbacks.EarlyStopping(
            monitor="loss", mode="max", patience=2, restore_best_weights=True, start_from_epoch=0
        )
    ]
    run = equals_one_device(
        build, by(lambda: optimizers.SGD(0.1)), data=batches([13])[0], gpus=3, epochs=9, batch_size=4, callbacks=made
    )
    assert len(run.logs) < 10, "training was to stop early"


def test_weights_that_a_callback_sets_at_batch_end_reach_all_replicas(equals_one_device: Any) -> None:
    class Halve(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.set_weights([w * 0.5 for w in self.model.get_weights()])

    data = batches([13])[0]
    equals_one_device(
        build, by(lambda: optimizers.SGD(0.1)), data=data, gpus=3, epochs=2, batch_size=4, callbacks=lambda: [Halve()]
    )


# Mixed precision: sub-batches round differently from the whole batch, in steps of 2**-8 (bfloat16) or 2**-11
# (float16) of each activation and gradient.


@pytest.mark.parametrize(("policy", "tolerance"), [("mixed_bfloat16", 2e-2), ("mixed_float16", 4e-3)])
def test_mixed_precision_equals_one_device_within_its_rounding(
    policy: str, tolerance: float, equals_one_device: Any
) -> None:
    keras.config.set_dtype_policy(policy)
    run = equals_one_device(build, by(lambda: optimizers.SGD(0.1)), batches(), gpus=3, tolerance=tolerance)
    scales = isinstance(run.trained.optimizer, optimizers.LossScaleOptimizer)
    assert scales == (policy == "mixed_float16")


def test_a_step_with_an_overflow_is_skipped_and_the_loss_scale_halved(equals_one_device: Any) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    data = batches([7, 7, 7])
    data[1]["y"] = np.full((7, 2), 6e4, "float32")
    made = lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.01), initial_scale=2.0**12)  # noqa: E731
    run = fastdp.wrap(build(), gpus=3, check_replicas=True)
    run.compile(**by(made)())
    run.train_on_batch(**data[0])
    before = run.get_weights()
    run.train_on_batch(**data[1])
    assert all(np.array_equal(a, b) for a, b in zip(before, run.get_weights(), strict=True))
    assert float(run.optimizer.dynamic_scale) == 2.0**11
    run.train_on_batch(**data[2])
    assert not np.array_equal(before[0], run.get_weights()[0])


def test_a_template_of_mixed_float16_scales_the_loss_whatever_the_policy_when_wrapped() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    model = build()
    keras.config.set_dtype_policy("float32")
    parallel = fastdp.wrap(model, gpus=2)
    parallel.compile("sgd", "mse")
    assert isinstance(parallel.optimizer, optimizers.LossScaleOptimizer)


def test_float64_models_equal_one_device(equals_one_device: Any) -> None:
    keras.config.set_dtype_policy("float64")
    equals_one_device(build, by(lambda: optimizers.SGD(0.1)), batches(), gpus=3, tolerance=1e-6)


# What is trained.


def test_recompiling_after_freezing_a_layer_equals_one_device(twins: Any) -> None:
    found = []
    for gpus in (None, 3):
        run = twins(build, by(lambda: optimizers.SGD(0.1, momentum=0.9))).make(gpus)
        run.trained.train_on_batch(**batches()[0])
        run.model.get_layer("hidden").trainable = False
        run.trained.compile(**by(lambda: optimizers.SGD(0.1, momentum=0.9))())
        frozen = run.model.get_layer("hidden").get_weights()
        run.trained.train_on_batch(**batches()[1])
        for a, b in zip(frozen, run.model.get_layer("hidden").get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        found.append(run.model.get_weights())
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_unused_trainable_variables_warn_as_in_keras_and_stay(equals_one_device: Any) -> None:
    class Rollback(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = layers.Dense(2), layers.Dense(2)

        def call(self, x: Any) -> Any:
            return self.used(x)

    def make() -> keras.Model:
        model = Rollback()
        model.spare.build((None, 3))
        model(np.zeros((1, 3), "float32"))
        return model

    def check() -> None:
        equals_one_device(make, by(lambda: optimizers.SGD(0.1, weight_decay=0.1)), batches(), gpus=3)

    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        check()


def test_a_model_without_trainable_weights_trains_to_no_effect() -> None:
    model = build()
    model.trainable = False
    parallel = fastdp.wrap(model, gpus=3)
    parallel.compile("sgd", "mse")
    before = model.get_weights()
    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        parallel.train_on_batch(**batches()[0])
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_two_parallel_models_that_share_a_template_train_it_in_turn(twins: Any) -> None:
    one = twins(build, by(lambda: optimizers.SGD(0.1))).make(None)
    for batch in batches():
        one.trained.train_on_batch(**batch)
    keras.utils.set_random_seed(3)
    model = build()
    pair = [fastdp.wrap(model, gpus=gpus, check_replicas=True) for gpus in (3, [4, 2])]
    for parallel in pair:
        parallel.compile(**by(lambda: optimizers.SGD(0.1))())
    for step, batch in enumerate(batches()):
        pair[step % 2].train_on_batch(**batch)
    for a, b in zip(one.model.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class Lists(optimizers.Optimizer):
    """Hands the variables out to two optimizers in a list, whose variables are not among its own."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0)
        self.inside = [optimizers.Adam(RATE), optimizers.SGD(RATE, momentum=0.9)]

    def build(self, variables: Any) -> None:
        super().build(variables)
        self.inside[0].build(variables[:2])
        self.inside[1].build(variables[2:])

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        self.inside[0].apply(grads[:2], trainable_variables[:2])
        self.inside[1].apply(grads[2:], trainable_variables[2:])
        self.iterations.assign_add(1)


class Noisy(optimizers.SGD):
    """Adds noise from a generator of its own to the gradients."""

    def __init__(self) -> None:
        super().__init__(RATE)
        self.generator = keras.random.SeedGenerator(3)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        noise = keras.random.normal(gradient.shape, seed=self.generator)
        super().update_step(gradient + 0.1 * noise, variable, learning_rate)


class Falling(optimizers.schedules.LearningRateSchedule):
    """A rate that falls each time it is asked for."""

    def __init__(self) -> None:
        self.rate = keras.Variable(0.2, trainable=False)

    def __call__(self, step: Any) -> Any:
        self.rate.assign(0.9 * self.rate)
        return 1.0 * self.rate


class Shrinking(keras.constraints.Constraint):
    """Shrinks a weight more from step to step."""

    def __init__(self) -> None:
        self.factor = keras.Variable(1.0, trainable=False)

    def __call__(self, weight: Any) -> Any:
        self.factor.assign(0.99 * self.factor)
        return weight * self.factor


def shared_out() -> Any:
    rest = optimizers.SGD(RATE, momentum=0.9)
    return optimizers.MultiOptimizer(optimizers.OptimizerMap(rest, {".*hidden.*": optimizers.Adam(RATE)}))


@pytest.mark.parametrize("update", ["first", "each"])
@pytest.mark.parametrize("optimizer", [shared_out, Lists, Noisy, lambda: optimizers.Lamb(Falling()), "constraint"])
def test_variables_that_an_update_assigns_beside_the_optimizers_own_equal_one_device(
    optimizer: Any, update: str, twins: Any, same: Any
) -> None:
    def made() -> keras.Model:
        return build(kernel_constraint=Shrinking()) if optimizer == "constraint" else build()

    settings = by(optimizers.SGD if optimizer == "constraint" else optimizer)
    recipe = twins(made, settings, wrap={"update": update})
    one, many = recipe.by_batches(None, batches()), recipe.by_batches(3, batches())
    same(one, many, ADAPTIVE)


def test_a_failed_update_leaves_variables_beside_the_optimizers_own_as_they_were() -> None:
    model = build()
    parallel = fastdp.wrap(model, gpus=3)
    optimizer = Lists()
    parallel.compile(optimizer, "mse")
    parallel.train_on_batch(**batches()[0])
    slots = [v for inner in optimizer.inside for v in inner.variables]
    before = [v.numpy() for v in slots]
    optimizer.inside[1].apply = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        parallel.train_on_batch(**batches()[2])
    assert all(np.array_equal(v.numpy(), value) for v, value in zip(slots, before, strict=True))


@pytest.mark.parametrize("gpus", [2, 3])
def test_a_loss_scale_around_an_optimizer_that_draws_equals_one_device(gpus: int, twins: Any, same: Any) -> None:
    recipe = twins(build, by(lambda: optimizers.LossScaleOptimizer(Noisy(), initial_scale=8.0)))
    same(recipe.by_batches(None, batches()), recipe.by_batches(gpus, batches()), ADAPTIVE)


class Counting(optimizers.SGD):
    """Counts its updates, as a Python number, and slows down by it."""

    def __init__(self) -> None:
        super().__init__(RATE)
        self.calls = 0

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        self.calls += 1
        super().apply([g / self.calls for g in grads], trainable_variables)


class FixedRate(optimizers.schedules.LearningRateSchedule):
    def __call__(self, step: Any) -> Any:
        return 0.1


# Optimizers, and whether all their code is Keras's own.
OWN_CODE = {
    "keras": (
        lambda: optimizers.LossScaleOptimizer(optimizers.Adam(optimizers.schedules.ExponentialDecay(1, 2, 3))),
        True,
    ),
    "multi": (shared_out, True),
    "subclass": (Counting, False),
    "inner": (lambda: optimizers.LossScaleOptimizer(Counting()), False),
    "listed": (
        lambda: optimizers.MultiOptimizer(optimizers.OptimizerMap(optimizers.SGD(), {".*hidden.*": Counting()})),
        False,
    ),
    "schedule": (lambda: optimizers.SGD(FixedRate()), False),
    "inner schedule": (lambda: optimizers.LossScaleOptimizer(optimizers.SGD(FixedRate())), False),
}


@pytest.mark.parametrize(("optimizer", "own"), OWN_CODE.values(), ids=OWN_CODE.keys())
def test_gpus_each_run_an_optimizer_only_where_all_its_code_is_keras_own(optimizer: Any, own: bool) -> None:
    parallel = fastdp.wrap(build(), gpus=2)
    parallel.compile(optimizer(), "mse")
    parallel.train_on_batch(**batches()[0])
    program, gpus = parallel.engine.program, [SimpleNamespace(on_gpu=True)] * 2
    assert program.update_is_ours is own
    assert update_mode(program, Options(), gpus) == ("each" if own else "first")
    assert update_mode(program, Options(update="each"), gpus) == "each"
    assert update_mode(program, Options(), [SimpleNamespace(on_gpu=False)] * 2) == "first"


def test_an_optimizer_that_counts_in_python_equals_one_device(twins: Any, same: Any) -> None:
    recipe = twins(build, by(Counting))
    same(recipe.by_batches(None, batches()), recipe.by_batches(3, batches()), ADAPTIVE)
