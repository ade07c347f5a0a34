"""The utilities of Keras 2's keras.utils, print_summary, and intermediate outputs."""

import pickle

import keras
import numpy as np
import pytest
import torch

import fastdp
from fastdp import backend as K
from fastdp import utils
from fastdp.keras.keras2.functions import function, learning_phase

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def chain():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, name="first"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.5, name="drop"),
            keras.layers.Dense(2, name="last"),
        ],
        name="chain",
    )


def graph():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    shared = keras.layers.Dense(3, name="shared")
    joined = keras.layers.Concatenate(name="joined")([shared(a), shared(b)])
    return keras.Model([a, b], keras.layers.Dense(1, name="top")(joined), name="graph")


def lines_of(model, **options):
    lines = []
    utils.print_summary(model, print_fn=lines.append, **options)
    return lines


class OldSequence(utils.Sequence):
    """As written for Keras 2: no call of super().__init__()."""

    def __init__(self, x, y, batch_size):
        self.x, self.y, self.batch_size = x, y, batch_size

    def __len__(self):
        return int(np.ceil(len(self.x) / float(self.batch_size)))

    def __getitem__(self, index):
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return self.x[rows], self.y[rows]


def test_an_old_sequence_that_never_calls_super_fits_without_a_warning():
    model = chain()
    model.compile(loss="mse")
    history = model.fit(OldSequence(X, X[:, :2], 4), epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2


def test_a_sequence_is_a_py_dataset_and_may_set_workers():
    class Threaded(OldSequence):
        def __init__(self):
            utils.Sequence.__init__(self, workers=3)
            OldSequence.__init__(self, X, X, 2)

    assert issubclass(utils.Sequence, keras.utils.PyDataset)
    assert Threaded().workers == 3
    assert OldSequence(X, X, 2).workers == 1


def test_a_sequence_can_be_pickled():
    again = pickle.loads(pickle.dumps(OldSequence(X, X, 4)))
    np.testing.assert_array_equal(again[1][0], X[4:])


def test_custom_object_scope_makes_names_known_inside_only():
    def triple(x):
        return 3 * x

    with utils.CustomObjectScope({"triple": triple}):
        assert keras.utils.get_registered_object("triple") is triple
    assert keras.utils.get_registered_object("triple") is None


class Tenth(keras.regularizers.Regularizer):
    def __call__(self, x):
        return 0.1 * keras.ops.sum(keras.ops.square(x))


def test_custom_object_scope_gives_arguments_of_layers_their_names_and_takes_them_back():
    assert issubclass(utils.CustomObjectScope, keras.utils.CustomObjectScope)
    with utils.CustomObjectScope({"Tenth": Tenth, "l2": Tenth}):
        with utils.CustomObjectScope({"Tenth": keras.regularizers.L1}):
            assert isinstance(
                keras.layers.Dense(1, kernel_regularizer="Tenth").kernel_regularizer, keras.regularizers.L1
            )
        for name in ("Tenth", "l2"):
            assert isinstance(keras.layers.Dense(1, kernel_regularizer=name).kernel_regularizer, Tenth)
    assert isinstance(keras.layers.Dense(1, kernel_regularizer="l2").kernel_regularizer, keras.regularizers.L2)
    with pytest.raises(ValueError, match="Tenth"):
        keras.layers.Dense(1, kernel_regularizer="Tenth")


@pytest.mark.parametrize("labels", [[0, 2, 1, 2, 0], [[0], [2], [1], [2], [0]], np.array([0, 2, 1, 2, 0], np.uint8)])
def test_to_categorical_gives_float32_rows(labels):
    wanted = np.eye(3, dtype=np.float32)[[0, 2, 1, 2, 0]]
    np.testing.assert_array_equal(utils.to_categorical(labels), wanted, strict=True)


def test_to_categorical_takes_the_old_arguments_by_position():
    np.testing.assert_array_equal(utils.to_categorical([1], 3, "int32"), np.array([[0, 1, 0]], np.int32), strict=True)
    assert utils.to_categorical(np.zeros((2, 3), int), 4).shape == (2, 3, 4)
    assert utils.to_categorical(1, 3).tolist() == [0, 1, 0]
    assert utils.to_categorical([], 3).shape == (0, 3)


def test_to_categorical_of_a_tensor_is_a_tensor():
    rows = utils.to_categorical(keras.ops.convert_to_tensor([1, 0]), dtype="float16")
    assert keras.ops.is_tensor(rows)
    assert rows.tolist() == [[0, 1], [1, 0]]
    assert keras.backend.standardize_dtype(rows.dtype) == "float16"


@pytest.mark.parametrize(("y", "classes", "found"), [([-1, 0], None, "-1"), ([0, 3], 3, "3")])
def test_a_class_out_of_range_is_a_value_error(y, classes, found):
    with pytest.raises(ValueError, match=rf"y must hold class numbers from 0 to \d, got {found}"):
        utils.to_categorical(y, classes)
    with pytest.raises(ValueError, match="num_classes must be given"):
        utils.to_categorical([])


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("order", [1, 2, np.inf])
def test_normalize_divides_by_the_norm_along_any_axis(axis, order):
    found = utils.normalize(X, axis, order)
    np.testing.assert_allclose(np.linalg.norm(found, order, axis), 1, rtol=1e-6)
    np.testing.assert_allclose(found * np.linalg.norm(X, order, axis, keepdims=True), X, rtol=1e-6)


def test_normalize_leaves_zeros_and_its_argument_alone():
    x = np.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(utils.normalize(x), [[0, 0], [0.6, 0.8]])
    assert x[1, 0] == 3


def test_plot_model_hands_the_old_arguments_and_defaults_to_keras(monkeypatch):
    seen = []
    monkeypatch.setattr(keras.utils, "plot_model", lambda model, **options: seen.append(options))
    utils.plot_model(None, "m.png", True, False, "LR", True, 50)
    utils.plot_model(None)
    assert list(seen[0].values()) == ["m.png", True, False, "LR", True, 50]
    assert list(seen[1].values()) == ["model.png", False, True, "TB", False, 96]


def test_the_summary_of_a_chain_has_three_columns_of_65_characters():
    lines = lines_of(chain())
    assert lines[0] == 'Model: "chain"'
    assert lines[1] == "_" * 65
    assert lines[2] == "Layer (type)".ljust(29) + "Output Shape".ljust(26) + "Param #".ljust(10)
    assert lines[3] == "=" * 65
    assert lines[4] == "first (Dense)".ljust(29) + "(None, 8)".ljust(26) + "40".ljust(10)
    assert lines[5] == "_" * 65
    assert lines[-5:] == ["=" * 65, "Total params: 90", "Trainable params: 74", "Non-trainable params: 16", "_" * 65]
    assert len(lines) == 16


def test_the_summary_of_a_graph_says_what_each_layer_is_connected_to():
    lines = lines_of(graph())
    assert lines[2].split() == ["Layer", "(type)", "Output", "Shape", "Param", "#", "Connected", "to"]
    joined = next(number for number, line in enumerate(lines) if line.startswith("joined"))
    assert lines[joined].split()[-1] == "shared[0][0]"
    assert lines[joined + 1] == " " * 65 + "shared[1][0]".ljust(33)
    assert "Total params: 22" in lines


def test_positions_are_fractions_or_characters():
    relative = lines_of(chain(), line_length=100, positions=[0.3, 0.6, 1.0])
    assert relative == lines_of(chain(), line_length=100, positions=[30, 60, 100])
    assert relative == lines_of(chain(), line_length=100, positions=[0.3, 0.6, 1.0, 1.0])
    assert relative[4].index("(None, 8)") == 30
    assert relative[4].index("40") == 60


def test_fields_too_long_for_their_column_are_cut():
    row = lines_of(chain(), line_length=30, positions=[5, 15, 30])[4]
    assert row == "firs (None, 8) 40".ljust(30)


def test_the_summary_is_printed_unless_told_otherwise(capsys):
    utils.print_summary(chain())
    assert capsys.readouterr().out.splitlines() == lines_of(chain())


def test_frozen_layers_count_as_non_trainable_and_shared_weights_once():
    model = chain()
    model.get_layer("first").trainable = False
    assert lines_of(model)[-4:-1] == ["Total params: 90", "Trainable params: 34", "Non-trainable params: 56"]


def test_a_subclassed_model_is_summed_up_without_shapes():
    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2, name="dense")

        def call(self, x):
            return self.dense(x)

    model = Plain()
    with pytest.raises(ValueError, match="model must be built"):
        utils.print_summary(model)
    model(X)
    row = lines_of(model)[4]
    assert row.split() == ["dense", "(Dense)", "?", "10"]


@pytest.mark.parametrize("positions", [[0.5, 1.0], [0.5, 0.4, 1.0], [], [0.0, 0.5, 1.0]])
def test_positions_that_make_no_table_are_a_value_error(positions):
    with pytest.raises(ValueError, match="positions must be 3 rising column ends"):
        lines_of(chain(), positions=positions)


def test_a_line_of_no_characters_is_a_value_error():
    with pytest.raises(ValueError, match="line_length must be at least 1"):
        lines_of(chain(), line_length=0)


def test_function_with_a_learning_phase_gives_intermediate_outputs():
    model = chain()
    features = function([model.layers[0].input, learning_phase()], [model.layers[3].output])
    (found,) = features([X, 0])
    np.testing.assert_allclose(found, model.predict(X, verbose=0), rtol=1e-6)
    assert type(found) is np.ndarray


def test_function_uses_the_weights_as_they_are_at_each_call():
    model = chain()
    first = function([model.inputs[0]], [model.layers[0].output])
    model.layers[0].set_weights([np.zeros((4, 8)), np.ones(8)])
    np.testing.assert_array_equal(first([X])[0], np.ones((6, 8), np.float32))


def test_training_drops_anew_each_time_and_changes_no_weight():
    model = chain()
    dropped = function([model.inputs[0], learning_phase()], [model.get_layer("drop").output])
    before = model.get_weights()
    first, second = dropped([X, 1])[0], dropped([X, True])[0]
    assert (first == 0).any()
    assert ((first == 0) != (second == 0)).any()
    assert (dropped([X, 0])[0] != 0).all()
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_function_starts_from_a_tensor_within_the_model():
    model = chain()
    hidden = function([model.inputs[0]], [model.get_layer("first").output])([X])
    rest = function([model.get_layer("norm").input], [model.outputs[0]])
    np.testing.assert_allclose(rest(hidden)[0], model.predict(X, verbose=0), rtol=1e-5)


def test_function_takes_and_returns_single_tensors_and_several():
    model = graph()
    both = function(model.inputs, [model.get_layer("joined").output, model.outputs[0]])([X, 2 * X])
    assert [array.shape for array in both] == [(6, 6), (6, 1)]
    single = chain()
    assert function(single.inputs[0], single.get_layer("first").output)(X).shape == (6, 8)


def test_function_names_what_is_wrong():
    model = chain()
    with pytest.raises(ValueError, match="outputs must hold symbolic tensors"):
        function([model.inputs[0]], [X])
    with pytest.raises(ValueError, match="inputs must hold symbolic tensors"):
        function([learning_phase()], [model.outputs[0]])
    with pytest.raises(ValueError, match=r"inputs must hold 2 values.*got 1"):
        function([model.inputs[0], learning_phase()], [model.outputs[0]])([X])


@pytest.mark.parametrize("which", ["first", 0, "layer"])
def test_get_layer_output_takes_a_name_a_place_or_the_layer(which):
    model = chain()
    found = utils.get_layer_output(model, model.layers[0] if which == "layer" else which, X)
    kernel, bias = model.layers[0].get_weights()
    np.testing.assert_allclose(found, X @ kernel + bias, rtol=1e-4, atol=1e-6)


def test_get_layer_output_of_a_parallel_model_is_that_of_its_template():
    model = chain()
    fastdp.set_virtual_devices(2)
    parallel = fastdp.multi_gpu_model(model, gpus=2)
    for which in ("norm", 1, model.layers[1]):
        found = utils.get_layer_output(parallel, which, X)
        np.testing.assert_array_equal(found, utils.get_layer_output(model, which, X))
    fastdp.set_virtual_devices(0)


def test_function_and_learning_phase_are_those_of_fastdp_backend():
    assert (K.function, K.learning_phase) == (function, learning_phase)


def test_get_layer_output_in_training_changes_no_moving_statistic():
    model = chain()
    before = model.get_layer("norm").get_weights()
    found = utils.get_layer_output(model, "norm", X, training=True)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)
    for old, new in zip(before, model.get_layer("norm").get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_get_layer_output_takes_lists_and_dicts_of_inputs():
    model = graph()
    wanted = utils.get_layer_output(model, "joined", [X, 2 * X])
    np.testing.assert_array_equal(utils.get_layer_output(model, "joined", {"b": 2 * X, "a": X}), wanted)
    inputs = {"b": keras.Input((4,), name="b"), "a": keras.Input((4,), name="a")}
    by_dict = keras.Model(inputs, keras.layers.Subtract(name="less")([inputs["b"], inputs["a"]]))
    found = utils.get_layer_output(by_dict, "less", {"a": X, "b": 3 * X})
    np.testing.assert_allclose(found, 2 * X, rtol=1e-6)


def test_get_layer_output_names_what_is_wrong():
    model = chain()
    with pytest.raises(ValueError, match="nowhere"):
        utils.get_layer_output(model, "nowhere", X)
    with pytest.raises(ValueError, match="layer must belong to the graph"):
        utils.get_layer_output(model, keras.layers.Dense(1), X)
    with pytest.raises(ValueError, match=r"x must hold 2 arrays.*got 1"):
        utils.get_layer_output(graph(), "joined", X)
    with pytest.raises(ValueError, match=r"x must hold the inputs \['a', 'b'\].*add \['b'\]"):
        utils.get_layer_output(graph(), "joined", {"a": X})


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"y": ["cat", "dog"]}, TypeError, r"y must hold numbers, got .*cat.*np.unique"),
        ({"y": [0, None]}, TypeError, r"y must hold numbers, got .*: number the classes"),
        ({"y": [[0], [1, 2]]}, ValueError, r"y must have rows of one length, got a list.*pad"),
        ({"y": [0.5, 1.0]}, ValueError, r"y must hold whole numbers, got 0.5: round"),
        ({"y": [np.nan, 1.0]}, ValueError, r"y must hold whole numbers, got nan"),
        ({"y": [1j]}, TypeError, r"y must hold whole numbers, got complex128"),
        ({"y": [2**63]}, ValueError, r"y must hold class numbers, got 9223372036854775808, which is too large"),
        ({"y": [0, 1], "num_classes": "3"}, TypeError, r"num_classes must be a whole number or None, got '3'"),
        ({"y": [0, 1], "num_classes": 2.5}, TypeError, r"num_classes must be a whole number or None, got 2.5"),
        ({"y": [0, 1], "num_classes": -2}, ValueError, r"num_classes must be at least 1, got -2"),
        ({"y": [0, 1], "dtype": "text"}, TypeError, r"dtype must be a dtype of numbers, got 'text'"),
        ({"y": [0, 1], "dtype": object()}, TypeError, r"dtype must be a dtype of numbers"),
        ({"y": []}, ValueError, r"num_classes must be given where y is empty"),
        ({"y": torch.tensor([0, 5]), "num_classes": 3}, ValueError, r"y must hold class numbers from 0 to 2, got 5"),
        ({"y": torch.tensor([0.5])}, ValueError, r"y must hold whole numbers, got 0.5"),
    ],
)
def test_to_categorical_says_which_argument_is_odd_and_what_to_do(given, kind, said):
    with pytest.raises(kind, match=said):
        utils.to_categorical(**given)


def test_to_categorical_takes_what_keras_2_took():
    expected = np.eye(3, dtype="float32")[[0, 2]]
    for y in ([0, 2], [0.0, 2.0], ["0", "2"], np.array([[0], [2]]), np.array([0, 2], object), (np.int8(0), np.int8(2))):
        np.testing.assert_array_equal(utils.to_categorical(y), expected)
    for count in (0, None, 3, 3.0, np.int64(3)):
        np.testing.assert_array_equal(utils.to_categorical([0, 2], count), expected)
    np.testing.assert_array_equal(utils.to_categorical(torch.tensor([0, 2])).numpy(), expected)
    assert utils.to_categorical([True, False], dtype="bool").tolist() == [[False, True], [True, False]]
    assert utils.to_categorical([], 4).shape == (0, 4)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"x": ["a"]}, TypeError, r"x must hold numbers, got .*'a'.*convert"),
        ({"x": [[1], [1, 2]]}, ValueError, r"x must have rows of one length"),
        ({"x": 3.0}, ValueError, r"axis must be an axis of x, which has none: it is one number, got -1"),
        (
            {"x": [1.0, 2.0], "axis": 1},
            ValueError,
            r"axis must be an axis of x, which has 1 axes, so from -1 to 0, got 1",
        ),
        ({"x": torch.ones(2), "axis": 4}, ValueError, r"axis must be an axis of x.*got 4"),
        ({"x": [1.0], "axis": "0"}, TypeError, r"axis must be a whole number, got '0'"),
        ({"x": [1.0], "axis": (0, 1)}, TypeError, r"axis must be a whole number, got \(0, 1\)"),
        ({"x": [1.0], "order": "two"}, TypeError, r"order must be a number.*got 'two'"),
        ({"x": [1.0], "order": float("nan")}, TypeError, r"order must be a number.*got nan"),
    ],
)
def test_normalize_says_which_argument_is_odd_and_what_to_do(given, kind, said):
    with pytest.raises(kind, match=said):
        utils.normalize(**given)
