"""Mistakes of users: each is told by a message with the remedy, changes no weight, and the next call works."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

import fastdp

layers = keras.layers
X = np.random.default_rng(0).normal(size=(22, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(22, 1)).astype("float32")


def build(outputs: int = 1) -> keras.Model:
    x = keras.Input((3,))
    hidden = layers.Dense(4, activation="tanh", name="hidden")(x)
    last = [layers.Dense(1, name=f"out{i}")(hidden) for i in range(outputs)]
    return keras.Model(x, last if outputs > 1 else last[0], name="net")


def compiled(outputs: int = 1, **settings: Any) -> fastdp.ParallelModel:
    keras.utils.set_random_seed(3)
    parallel = fastdp.multi_gpu_model(build(outputs), gpus=3)
    parallel.compile(**{"optimizer": "sgd", "loss": "mse", **settings})
    return parallel


def assert_untouched_and_works(parallel: Any, before: list[np.ndarray], y: Any = Y) -> None:
    for expected, found in zip(before, parallel.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)
    parallel.fit(X, y, batch_size=8, verbose=0)
    assert any(not np.array_equal(a, b) for a, b in zip(before, parallel.get_weights(), strict=True))


def test_x_and_y_of_different_lengths_say_both() -> None:
    parallel = compiled()
    before = parallel.get_weights()
    with pytest.raises(ValueError, match=r"(?s)cardinality.*22.*20"):  # Keras's own, from its data adapter
        parallel.fit(X, Y[:20], batch_size=8, verbose=0)
    with pytest.raises(ValueError, match=r"(?s)cardinality.*22.*21"):
        parallel.evaluate(X, Y[:21], verbose=0)
    with pytest.raises(ValueError, match=r"same number of rows.*'x': 22, 'y': 20"):
        parallel.train_on_batch(X, Y[:20])
    assert_untouched_and_works(parallel, before)


def test_not_a_number_in_the_input_ends_training_by_the_callback_as_on_one_device() -> None:
    broken = X.copy()
    broken[17] = np.nan
    parallel, plain = compiled(), build()
    plain.set_weights(parallel.get_weights())
    plain.compile("sgd", "mse")
    for model in (parallel, plain):
        history = model.fit(
            broken, Y, batch_size=8, shuffle=False, epochs=4, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()]
        )
        assert model.stop_training
        assert np.isnan(history.history["loss"][-1])
        assert len(history.epoch) == 1
        assert int(model.optimizer.iterations) == 3


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (["mse"] * 3, r"\(2,\) in the `loss` argument, can't be found"),
        ({"out0": "mse", "nowhere": "mse"}, r"Expected keys \['out0', 'out1'\] in loss dict"),
    ],
)
def test_losses_for_outputs_that_are_not_there_are_keras_own_error(loss: Any, said: str) -> None:
    parallel, plain = compiled(2, loss=loss), build(2)
    plain.compile("sgd", loss)
    before = parallel.get_weights()
    for model in (plain, parallel):
        with pytest.raises((KeyError, ValueError), match=said):
            model.fit(X, [Y, Y], batch_size=8, verbose=0)
    parallel.compile("sgd", "mse")
    assert_untouched_and_works(parallel, before, [Y, Y])


def test_fewer_losses_than_outputs_give_keras_warning_with_the_variables_that_nothing_trains() -> None:
    parallel, plain = compiled(2, loss=["mse"]), build(2)
    plain.compile("sgd", ["mse"])
    for model in (plain, parallel):
        with pytest.warns(
            UserWarning, match=r"Gradients do not exist for variables \['out1/kernel', 'out1/bias'\].*`loss`"
        ):
            model.fit(X, [Y, Y], batch_size=8, verbose=0)


def test_no_loss_at_all_is_keras_own_error() -> None:
    parallel = compiled(loss=None)
    before = parallel.get_weights()
    for method in (parallel.fit, parallel.evaluate):
        with pytest.raises(ValueError, match=r"No loss to compute. Provide a `loss` argument in `compile\(\)`"):
            method(X, Y, verbose=0)
    parallel.compile("sgd", "mse")
    assert_untouched_and_works(parallel, before)


def test_targets_that_do_not_fit_the_outputs_are_keras_own_error() -> None:
    parallel, plain = compiled(2), build(2)
    plain.compile("sgd", "mse")
    before = parallel.get_weights()
    for targets in (Y, [Y], [Y, Y, Y], {"out0": Y, "nowhere": Y}):
        said = []
        for model in (plain, parallel):
            with pytest.raises((ValueError, KeyError)) as caught:
                model.fit(X, targets, batch_size=8, verbose=0)
            said.append(str(caught.value))
        assert said[0].splitlines()[0][:60] in said[1], said
    assert_untouched_and_works(parallel, before, [Y, Y])


def test_freezing_without_compiling_again_gives_keras_warning_once() -> None:
    parallel = compiled()
    parallel.fit(X, Y, batch_size=8, verbose=0)
    parallel.template.get_layer("hidden").trainable = False
    for call in (parallel.fit, parallel.train_on_batch, parallel.test_on_batch):
        parallel.compile("sgd", "mse")
        hidden = parallel.template.get_layer("hidden")
        hidden.trainable = not hidden.trainable
        options = {"verbose": 0} if call == parallel.fit else {}
        with pytest.warns(UserWarning, match=r"`trainable` state has changed.*recompile.*'hidden'"):
            call(X, Y, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            call(X, Y, **options)


def test_thawing_what_the_optimizer_does_not_know_is_keras_own_error() -> None:
    for devices in (None, 3):
        template = build()
        template.get_layer("hidden").trainable = False
        model = template if devices is None else fastdp.wrap(template, gpus=devices)
        model.compile("sgd", "mse")
        model.fit(X, Y, verbose=0)
        template.get_layer("hidden").trainable = True
        before = template.get_weights()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*`trainable` state has changed")
            model.evaluate(X, Y, verbose=0)
            with pytest.raises(ValueError, match=r"(?s)Unknown variable.*built with.*new optimizer"):
                model.fit(X, Y, verbose=0)
        assert all(np.array_equal(a, b) for a, b in zip(before, template.get_weights(), strict=True))
        model.compile("sgd", "mse")
        model.fit(X, Y, verbose=0)


def test_an_argument_that_fit_does_not_have_names_fit() -> None:
    parallel = compiled()
    for method in (parallel.fit, parallel.predict):
        with pytest.raises(TypeError, match=rf"^{method.__name__}\(\) got an unexpected keyword argument 'nb_epoch'"):
            method(X, nb_epoch=3)


def test_a_parallel_model_inside_wrap_says_to_wrap_its_template() -> None:
    parallel = compiled()
    for wrapper in (fastdp.wrap, fastdp.multi_gpu_model):
        with pytest.raises(ValueError, match=r"parallel already \('net_parallel'\).*model\.template"):
            wrapper(parallel, gpus=2)
    assert_untouched_and_works(parallel, parallel.get_weights())


def test_a_sequential_model_built_by_a_call_says_how_to_begin_it() -> None:
    model = keras.Sequential([layers.Dense(1)])
    model(X)
    with pytest.raises(ValueError, match=r"fixed batch size of 22.*Sequential.*keras\.Input\(shape\)"):
        fastdp.wrap(model, gpus=2)


def test_wrapping_and_training_in_a_thread_of_the_users_works() -> None:
    keras.utils.set_random_seed(3)
    plain, template = build(), build()
    template.set_weights(plain.get_weights())
    plain.compile("sgd", "mse")
    failed: list[BaseException] = []

    def work() -> None:
        try:
            parallel = fastdp.wrap(template, gpus=3)
            parallel.compile("sgd", "mse")
            parallel.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
        except BaseException as error:  # noqa: BLE001  handed to the thread that asks
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert not thread.is_alive()
    assert not failed
    plain.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    for expected, found in zip(plain.get_weights(), template.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_notebook_cell_that_is_run_again_works_and_leaks_nothing() -> None:
    """The cell wraps the same template anew each time; what it made before is freed."""
    template = build()
    before, made = threading.active_count(), []
    losses = []
    for _ in range(4):
        parallel = fastdp.multi_gpu_model(template, gpus=3)
        parallel.compile("sgd", "mse")
        losses += parallel.fit(X, Y, epochs=2, batch_size=8, shuffle=False, verbose=0).history["loss"]
        made.append((weakref.ref(parallel), weakref.ref(parallel.engine), weakref.ref(parallel.engine.replicas[-1])))
    assert losses == sorted(losses, reverse=True), "each run goes on from the last one's weights"
    gc.collect()
    assert [[one() is None for one in refs] for refs in made[:-1]] == [[True] * 3] * 3
    assert threading.active_count() <= before + 3, "one worker for each device, once"


def test_a_cell_that_asks_for_other_devices_again_works_and_old_models_say_why_they_stopped() -> None:
    template = build()
    old = fastdp.multi_gpu_model(template, gpus=3)
    old.compile("sgd", "mse")
    old.fit(X, Y, batch_size=8, verbose=0)
    fastdp.set_virtual_devices(0)
    fastdp.set_virtual_devices(4)
    try:
        with pytest.raises(RuntimeError, match=r"closed|set_virtual_devices"):
            old.fit(X, Y, batch_size=8, verbose=0)
        new = fastdp.multi_gpu_model(template, gpus=4)
        new.compile("sgd", "mse")
        assert_untouched_and_works(new, new.get_weights())
    finally:
        fastdp.set_virtual_devices(8)


class Waits(keras.callbacks.Callback):
    """Holds `fit` between two batches until told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 0:
            self.reached.set()
            assert self.go.wait(60)


@pytest.fixture
def first_fit() -> Iterator[tuple[fastdp.ParallelModel, list[BaseException], Waits]]:
    """A model that another thread is fitting, held between its batches."""
    parallel, failed, waits = compiled(), [], Waits()

    def work() -> None:
        try:
            parallel.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[waits])
        except BaseException as error:  # noqa: BLE001  handed to the thread that asks
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert waits.reached.wait(60)
        yield parallel, failed, waits
    finally:
        waits.go.set()
        thread.join(60)
        assert not thread.is_alive()


def test_fit_from_two_threads_at_once_is_an_error_in_the_second_alone(
    first_fit: tuple[fastdp.ParallelModel, list[BaseException], Waits],
) -> None:
    parallel, failed, waits = first_fit
    with pytest.raises(RuntimeError, match=r"already.*another thread.*one thread at a time"):
        parallel.fit(X, Y, batch_size=8, verbose=0)
    waits.go.set()
    for thread in threading.enumerate():
        if thread not in (threading.current_thread(), threading.main_thread()) and not thread.daemon:
            thread.join(60)
    assert not failed
    assert int(parallel.optimizer.iterations) == 3
    assert_untouched_and_works(parallel, parallel.get_weights())
