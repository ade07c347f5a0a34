"""The parallel model, and Keras 2.3.1's own tests of multi_gpu_model re-created with numbers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import fastdp
from fastdp.keras.names import numbered_names
from fastdp.keras.template_view import unique_names

layers = keras.layers


def small(units: int = 1) -> keras.Model:
    inputs = keras.Input((3,), name="first")
    h = layers.Dense(4, activation="tanh", name="hidden")(inputs)
    return keras.Model(inputs, layers.Dense(units, name="last")(h), name="small")


def rows_of(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype("float32")


def both(build: Any, *, gpus: Any = 3, **settings: Any) -> tuple[keras.Model, keras.Model]:
    """The same model twice: plain, and parallel."""
    made = []
    for wanted in (None, gpus):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(1)
        model = build()
        model = model if wanted is None else fastdp.multi_gpu_model(model, gpus=wanted)
        model.compile(**settings)
        made.append(model)
    return made[0], made[1]


def assert_same_weights(one: keras.Model, many: keras.Model, tolerance: float = 1e-5) -> None:
    for expected, found in zip(one.get_weights(), many.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_it_is_a_keras_model_with_the_templates_inputs_outputs_and_names() -> None:
    model = small()
    parallel = fastdp.multi_gpu_model(model, gpus=2)
    assert isinstance(parallel, keras.Model)
    assert parallel.inputs is model.inputs
    assert parallel.outputs is model.outputs
    assert parallel.output_names == model.output_names == ["last"]
    assert parallel.count_params() == model.count_params() == 21


def test_the_template_is_the_layer_before_the_last_and_is_found_by_name() -> None:
    model = small()
    parallel = fastdp.multi_gpu_model(model, gpus=2)
    assert parallel.layers[-2] is model
    assert parallel.get_layer("small") is model


def test_summary_and_json_are_the_templates() -> None:
    model, lines = small(), []
    parallel = fastdp.multi_gpu_model(model, gpus=2)
    parallel.summary(print_fn=lines.append)
    assert "hidden" in "\n".join(map(str, lines))
    assert parallel.to_json() == model.to_json()
    assert parallel.get_config() == model.get_config()
    assert not isinstance(keras.models.model_from_json(parallel.to_json()), fastdp.ParallelModel)


def test_get_and_set_weights_are_the_templates() -> None:
    model = small()
    parallel = fastdp.multi_gpu_model(model, gpus=2)
    parallel.set_weights([w + 1 for w in model.get_weights()])
    for a, b in zip(model.get_weights(), parallel.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    x = rows_of(5, 3)
    np.testing.assert_allclose(parallel.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)


def test_it_is_not_compiled_when_made_and_leaves_the_templates_settings_alone() -> None:
    model = small()
    model.compile("adam", "mae")
    parallel = fastdp.multi_gpu_model(model, gpus=2)
    assert not parallel.compiled
    own = model.optimizer
    parallel.compile("sgd", "mse")
    parallel.train_on_batch(rows_of(5, 3), rows_of(5, 1))
    assert model.optimizer is own
    assert model.loss == "mae"
    model.train_on_batch(rows_of(5, 3), rows_of(5, 1))


def test_history_metric_and_loss_keys_go_by_the_templates_output_names() -> None:
    def build() -> keras.Model:
        x = keras.Input((3,))
        return keras.Model(x, [layers.Dense(1, name="u")(x), layers.Dense(2, name="v")(x)])

    one, many = both(build, optimizer="sgd", loss={"u": "mse", "v": "mae"}, metrics={"v": ["mse"]})
    x, y = rows_of(9, 3), {"u": rows_of(9, 1), "v": rows_of(9, 2)}
    expected, found = (m.fit(x, y, batch_size=4, shuffle=False, verbose=0).history for m in (one, many))
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


def siamese() -> keras.Model:
    """Keras 2.3.1's own case: outputs that come from one layer."""
    a, b, shared = keras.Input((3,)), keras.Input((3,)), layers.Dense(1, name="shared")
    return keras.Model([a, b], [shared(a), shared(b)])


def test_duplicate_output_names_get_numbers_and_none_is_lost() -> None:
    """All of them under `multi_gpu_model`, as in Keras 2.3; from the second on under `wrap`."""
    for make, names in (
        (fastdp.multi_gpu_model, ["shared_1", "shared_2"]),
        (fastdp.wrap, ["shared", "shared_1"]),
    ):
        x, y = [rows_of(5, 3)] * 2, [rows_of(5, 1)] * 2
        parallel = make(siamese(), gpus=2)
        assert parallel.output_names == names
        parallel.compile("sgd", ["mse", "mae"], metrics=[["mse"], ["mae"]])
        logs = parallel.train_on_batch(x, y, return_dict=True)
        metrics = {f"{names[0]}_mse", f"{names[1]}_mae"}
        assert set(logs) == {"loss", *(f"{name}_loss" for name in names), *metrics}
        assert set(parallel.fit(x, y, verbose=0).history) == set(logs)
        assert set(parallel.evaluate(x, y, verbose=0, return_dict=True)) == set(logs)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
        (["a", "b", "a"], ["a_1", "b", "a_2"]),
        (["a", "a", "a_1", "a"], ["a_2", "a_3", "a_1", "a_4"]),
        (["a", "a", "a_1", "a_1"], ["a_2", "a_3", "a_1_1", "a_1_2"]),
    ],
)
def test_numbers_of_output_names_never_collide(names: list[str], expected: list[str]) -> None:
    assert numbered_names(names) == expected
    assert len(set(unique_names(names))) == len(names)


@pytest.mark.parametrize("cpu_merge", [True, False])
def test_outputs_are_in_row_order_for_either_merge(cpu_merge: bool) -> None:
    model = small()
    parallel = fastdp.multi_gpu_model(model, gpus=[2, 0, 5], cpu_merge=cpu_merge)
    x = rows_of(8, 3)
    np.testing.assert_allclose(parallel.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-7)


def test_cpu_relocation_keeps_loaded_weights_and_goes_on_sharing_them() -> None:
    """keras-team/keras #11313: the clone that cpu_relocation made dropped the weights."""
    model = small()
    model.set_weights([w + 0.5 for w in model.get_weights()])
    before = model.get_weights()
    parallel = fastdp.multi_gpu_model(model, gpus=2, cpu_relocation=True)
    for a, b in zip(before, parallel.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    parallel.compile("sgd", "mse")
    parallel.train_on_batch(rows_of(5, 3), rows_of(5, 1))
    assert not np.array_equal(before[0], model.get_weights()[0])
    assert_same_weights(model, parallel, 0.0)


def test_three_rows_on_four_devices_run_three_replicas(capsys: pytest.CaptureFixture[str]) -> None:
    """keras-team/keras #11844 #11434: empty slices."""

    class Rows(layers.Layer):
        def call(self, x: Any) -> Any:
            print(x.shape[0])  # noqa: T201 - a list would be one that all devices write
            return x

    parallel = fastdp.multi_gpu_model(keras.Sequential([keras.Input((2,)), Rows()]), gpus=4)
    for rows, expected in ((4, [1, 1, 1, 1]), (3, [1, 1, 1]), (11, [2, 3, 3, 3])):
        parallel.predict_on_batch(rows_of(rows, 2))  # the first batch of so many rows is tried out on the host
        capsys.readouterr()
        assert parallel.predict_on_batch(rows_of(rows, 2)).shape == (rows, 2)
        assert sorted(map(int, capsys.readouterr().out.split())) == expected


def test_freezing_a_template_layer_and_compiling_again_freezes_it() -> None:
    """keras-team/keras #9198."""
    model = small()
    parallel = fastdp.multi_gpu_model(model, gpus=2)
    model.get_layer("hidden").trainable = False
    parallel.compile("sgd", "mse")
    hidden, last = (model.get_layer(name).get_weights()[0] for name in ("hidden", "last"))
    parallel.train_on_batch(rows_of(5, 3), rows_of(5, 1))
    np.testing.assert_array_equal(model.get_layer("hidden").get_weights()[0], hidden)
    assert not np.array_equal(model.get_layer("last").get_weights()[0], last)


def test_every_callback_sees_a_plain_model() -> None:
    """keras-team/keras #9043."""

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            assert self.model.optimizer.iterations == batch + 1
            assert len(self.model.get_weights()) == 4
            assert [layer.name for layer in self.model.layers][-2] == "small"
            self.model.stop_training = True

    parallel = fastdp.multi_gpu_model(small(), gpus=2)
    parallel.compile("sgd", "mse")
    epochs = parallel.fit(rows_of(4, 3), rows_of(4, 1), epochs=5, batch_size=4, verbose=0, callbacks=[Look()]).epoch
    assert epochs == [0]


# Keras 2.3.1's own tests, with the numbers of one device.


def test_a_simple_sequential_of_1000_rows_equals_one_device_on_8_then_3_devices() -> None:
    build = lambda: keras.Sequential([keras.Input((10,)), layers.Dense(10), layers.Dense(1)])  # noqa: E731
    x, y = rows_of(1000, 10), rows_of(1000, 1)
    one, many = both(build, gpus=8, optimizer="rmsprop", loss="mse")
    other = fastdp.multi_gpu_model(many.template, gpus=[0, 2, 4])
    for model in (one, many):
        model.fit(x, y, epochs=1, shuffle=False, verbose=0)
    assert_same_weights(one, many, 1e-4)
    one.compile("rmsprop", "mse")
    other.compile("rmsprop", "mse")
    for model in (one, other):
        model.fit(x, y, epochs=1, shuffle=False, verbose=0)
    assert_same_weights(one, other, 1e-4)


def test_two_inputs_and_two_outputs_equal_one_device() -> None:
    def build() -> keras.Model:
        a, b, dense = keras.Input((3,)), keras.Input((3,)), layers.Dense(2)
        return keras.Model([a, b], [layers.Dense(1)(dense(a)), layers.Dense(1)(dense(b))])

    one, many = both(build, optimizer="sgd", loss="mse")
    data = [rows_of(50, 3), rows_of(50, 3, seed=1)], [rows_of(50, 1), rows_of(50, 1, seed=1)]
    for model in (one, many):
        model.fit(*data, batch_size=16, shuffle=False, verbose=0)
    assert_same_weights(one, many)


@pytest.mark.parametrize("gpus", [10, [0, 2, 4, 6, 80], 1, [0]])
def test_invalid_devices_are_a_value_error(gpus: Any) -> None:
    with pytest.raises(ValueError, match="gpus"):
        fastdp.multi_gpu_model(small(), gpus=gpus)


def test_an_rnn_whose_initial_state_is_a_second_input_equals_one_device() -> None:
    def build() -> keras.Model:
        x, state = keras.Input((4, 3)), keras.Input((5,))
        return keras.Model([x, state], layers.Dense(1)(layers.SimpleRNN(5)(x, initial_state=state)))

    one, many = both(build, gpus=2, optimizer="sgd", loss="mse")
    x, y = [rows_of(2, 4, 3), rows_of(2, 5)], rows_of(2, 1)
    for model in (one, many):
        model.train_on_batch(x, y)
    assert_same_weights(one, many)


def test_a_nested_model_equals_one_device() -> None:
    def build() -> keras.Model:
        x = keras.Input((3,))
        return keras.Model(x, layers.Dense(1)(small(4)(x)))

    one, many = both(build, optimizer="sgd", loss="mse")
    for model in (one, many):
        model.fit(rows_of(20, 3), rows_of(20, 1), batch_size=7, shuffle=False, verbose=0)
    assert_same_weights(one, many)


def test_evaluate_and_predict_of_any_row_count_equal_one_device() -> None:
    one, many = both(small, gpus=8, optimizer="sgd", loss="mse", metrics=["mae"])
    for n in (1, 3, 8, 33):
        x, y = rows_of(n, 3), rows_of(n, 1)
        assert many.evaluate(x, y, batch_size=10, verbose=0) == pytest.approx(
            one.evaluate(x, y, batch_size=10, verbose=0)
        )
        np.testing.assert_allclose(many.predict(x, verbose=0), one.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
        assert many.test_on_batch(x, y) == pytest.approx(one.test_on_batch(x, y), rel=1e-5)


@keras.saving.register_keras_serializable(package="conformance")
class Configured(keras.Model):
    """A subclassed model with a config."""

    def __init__(self, units: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.hidden = layers.Dense(units, activation="tanh")
        self.last = layers.Dense(1)

    def call(self, inputs: Any) -> Any:
        return self.last(self.hidden(inputs))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


def configured() -> keras.Model:
    model = Configured(5)
    model(rows_of(1, 3))
    return model


def test_a_subclassed_model_with_a_config_equals_one_device_and_its_file_is_plain(tmp_path: Any) -> None:
    one, many = both(configured, optimizer="sgd", loss="mse")
    x, y = rows_of(11, 3), rows_of(11, 1, seed=1)
    for model in (one, many):
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    assert_same_weights(one, many)
    many.save(tmp_path / "configured.keras")
    loaded = keras.models.load_model(tmp_path / "configured.keras")
    assert type(loaded) is Configured
    assert loaded.units == 5
    np.testing.assert_allclose(loaded.predict(x, verbose=0), one.predict(x, verbose=0), rtol=1e-4, atol=1e-6)


def test_two_parallel_models_share_a_template() -> None:
    keras.utils.set_random_seed(1)
    one = small()
    keras.utils.set_random_seed(1)
    template = small()
    pair = [fastdp.multi_gpu_model(template, gpus=gpus) for gpus in (2, [3, 1, 0])]
    x, y = rows_of(10, 3), rows_of(10, 1, seed=1)
    one.compile("sgd", "mse")
    for parallel in pair:
        parallel.compile("sgd", "mse")
    for turn in range(4):
        expected = one.train_on_batch(x, y)
        assert pair[turn % 2].train_on_batch(x, y) == pytest.approx(expected, rel=1e-5)
    assert_same_weights(one, template)
    for parallel in pair:
        np.testing.assert_allclose(parallel.predict(x, verbose=0), one.predict(x, verbose=0), rtol=1e-4, atol=1e-6)


def test_a_template_compiled_before_wrapping_trains_as_one_device() -> None:
    def build() -> keras.Model:
        model = small()
        model.compile("adam", "mae")
        return model

    one, many = both(build, optimizer="sgd", loss="mse")
    x, y = rows_of(11, 3), rows_of(11, 1, seed=1)
    expected, found = (m.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history for m in (one, many))
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    assert_same_weights(one, many)
    assert many.template.loss == "mae"
