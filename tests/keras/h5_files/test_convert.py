"""convert, on files built by hand in the shape that Keras 2 gave those of a multi_gpu_model."""

import json

import h5py
import keras
import numpy as np
import pytest

from fastdp.keras.h5_files.convert import convert


def template(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(4, name="dense_1"),
            keras.layers.BatchNormalization(name="bn_1"),
            keras.layers.Dense(4, name="dense_2"),
            keras.layers.Dense(4, name="dense_3"),
        ],
        name="sequential_1",
    )


def randomized(model):
    generator = np.random.default_rng(7)
    model.set_weights([generator.normal(size=weight.shape) for weight in model.get_weights()])
    return model


def old_list(model, rename=None):
    """A Keras 2 model's own list of weights: trainable ones of all layers, then the others."""
    rename = rename or {}
    return [
        (f"{rename.get(layer.name, layer.name)}/{weight.name}:0", np.array(weight.value.detach()))
        for kind in ("trainable_weights", "non_trainable_weights")
        for layer in leaf_layers(model)
        for weight in getattr(layer, kind)
    ]


def leaf_layers(model):
    for layer in model.layers:
        yield from leaf_layers(layer) if hasattr(layer, "layers") else (layer,)


def write_weights(group, pairs, model_name="sequential_1"):
    names = ["input_1", "lambda_1", "lambda_2", model_name, "dense_3"]
    group.attrs["layer_names"] = [name.encode() for name in names]
    group.attrs["backend"], group.attrs["keras_version"] = b"tensorflow", b"2.3.1"
    for name in names:
        inner = group.create_group(name)
        inner.attrs["weight_names"] = [key.encode() for key, _ in pairs] if name == model_name else np.array([], "S1")
    for key, value in pairs:
        group[model_name][key] = value


def wrapper_config(model_config):
    def plain(kind, name):
        return {"class_name": kind, "name": name, "config": {"name": name}, "inbound_nodes": []}

    nested = {**model_config, "name": "sequential_1", "inbound_nodes": []}
    layers = [plain("InputLayer", "input_1"), plain("Lambda", "lambda_1"), nested, plain("Concatenate", "dense_3")]
    return {"class_name": "Model", "config": {"name": "model_1", "layers": layers}}


def old_dense(name, units):
    config = {"name": name, "units": units, "activation": "linear", "use_bias": True, "dtype": "float32"}
    return {"class_name": "Dense", "config": config | ({"batch_input_shape": [None, 4]} if name == "dense_1" else {})}


def assert_same_weights(found, wanted):
    for one, other in zip(found.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.fixture
def weight_file(tmp_path):
    model = randomized(template())
    with h5py.File(tmp_path / "old.h5", "w") as file:
        write_weights(file, old_list(model))
    return tmp_path / "old.h5", model


def test_a_weight_file_loads_into_the_template_by_order_and_by_name(weight_file, tmp_path):
    source, wanted = weight_file
    assert convert(source, tmp_path / "new.h5") == str(tmp_path / "new.h5")
    by_order, by_name = template(1), template(2)
    by_order.load_weights(tmp_path / "new.h5")
    by_name.load_weights(tmp_path / "new.h5", by_name=True)
    assert_same_weights(by_order, wanted)
    assert_same_weights(by_name, wanted)


def test_the_source_stays_as_it_was_and_nothing_else_is_left(weight_file, tmp_path):
    source, _ = weight_file
    before = source.read_bytes()
    convert(str(source), str(tmp_path / "new.h5"))
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.h5", "old.h5"]


def test_with_the_template_layers_that_were_frozen_find_their_place(tmp_path):
    model = randomized(template())
    model.get_layer("dense_2").trainable = False
    with h5py.File(tmp_path / "old.h5", "w") as file:
        write_weights(file, old_list(model))
    loaded = template(1)
    convert(tmp_path / "old.h5", tmp_path / "new.h5", template=loaded)
    loaded.load_weights(tmp_path / "new.h5")
    assert_same_weights(loaded, model)


def nesting(seed=0):
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(4, name="last")(template(seed)(inputs))
    return keras.Model(inputs, outputs, name="sequential_1")


def test_with_the_template_models_inside_it_get_their_weights(tmp_path):
    model = randomized(nesting())
    with h5py.File(tmp_path / "old.h5", "w") as file:
        write_weights(file, old_list(model))
    loaded = nesting(1)
    convert(tmp_path / "old.h5", tmp_path / "new.h5", template=loaded)
    loaded.load_weights(tmp_path / "new.h5")
    assert_same_weights(loaded, model)


def test_weights_of_a_cloned_model_are_dealt_to_the_layers_they_were_cloned_from(tmp_path):
    model = randomized(template())
    renamed = {layer.name: f"{layer.name}_1" for layer in model.layers}
    with h5py.File(tmp_path / "old.h5", "w") as file:
        write_weights(file, old_list(model, renamed))
    loaded = template(1)
    convert(tmp_path / "old.h5", tmp_path / "new.h5", template=loaded)
    loaded.load_weights(tmp_path / "new.h5", by_name=True)
    assert_same_weights(loaded, model)


def test_a_template_of_other_layers_is_a_value_error(weight_file, tmp_path):
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="other")])
    with pytest.raises(
        ValueError, match=r"template must hold the layer of each weight, got none for 'dense_1/kernel:0'"
    ):
        convert(weight_file[0], tmp_path / "new.h5", template=other)
    assert not (tmp_path / "new.h5").exists()


@pytest.mark.parametrize("has_list_config", [False, True], ids=["keras 2.3", "keras 2.2"])
def test_a_file_of_a_whole_model_becomes_one_of_the_wrapped_model(tmp_path, has_list_config):
    layers = [keras.layers.Dense(3, name="dense_1"), keras.layers.Dense(2, name="dense_2")]
    model = randomized(keras.Sequential([keras.Input((4,)), *layers], name="sequential_1"))
    layers[0].trainable = False  # so that its weights come last in the old list
    configs = [old_dense("dense_1", 3), old_dense("dense_2", 2)]
    config = configs if has_list_config else {"name": "sequential_1", "layers": configs}
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(wrapper_config({"class_name": "Sequential", "config": config})).encode()
        write_weights(file.create_group("model_weights"), old_list(model))
        file.create_group("optimizer_weights")
    with pytest.warns(UserWarning, match="optimizer's state, which is left out"):
        convert(tmp_path / "old.h5", tmp_path / "new.h5")
    loaded = keras.models.load_model(tmp_path / "new.h5", compile=False)
    assert [layer.name for layer in loaded.layers] == ["dense_1", "dense_2"]
    for one, other in zip(loaded.layers, layers, strict=True):
        np.testing.assert_array_equal(one.get_weights()[0], other.get_weights()[0])
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(np.array(loaded(x).detach()), np.array(model(x).detach()), rtol=1e-6)


def test_lists_of_names_that_are_too_long_for_one_attribute_are_split_and_joined(tmp_path):
    names = [f"layer_with_a_long_name_{number:05d}_{'x' * 60}" for number in range(1500)]
    with h5py.File(tmp_path / "old.h5", "w") as file:
        group = file.create_group("model_1")
        file.attrs["layer_names"] = [b"input_1", b"model_1"]
        file.create_group("input_1").attrs["weight_names"] = np.array([], "S1")
        keys = np.array([f"{name}/kernel:0".encode() for name in names])
        for number, chunk in enumerate(np.array_split(keys, 4)):
            group.attrs[f"weight_names{number}"] = chunk
        for number, key in enumerate(keys):
            group[key] = np.float32(number)
    convert(tmp_path / "old.h5", tmp_path / "new.h5")
    with h5py.File(tmp_path / "new.h5", "r") as file:
        assert "layer_names" not in file.attrs
        chunks = [file.attrs[f"layer_names{number}"] for number in range(len(file.attrs))]
        assert [name.decode() for name in np.concatenate(chunks)] == names
        assert file[names[7]][f"{names[7]}/kernel:0"][()] == 7


def save_plain_weights(path):
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"dense_1", b"dense_2"]
        for name in ("dense_1", "dense_2"):
            file.create_group(name).attrs["weight_names"] = [f"{name}/kernel:0".encode()]
            file[name][f"{name}/kernel:0"] = np.ones(2)


def save_single_layer(path):
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"flatten_1", b"dense_1"]
        file.create_group("flatten_1").attrs["weight_names"] = np.array([], "S1")
        file.create_group("dense_1").attrs["weight_names"] = [b"dense_1/kernel:0"]
        file["dense_1/dense_1/kernel:0"] = np.ones(2)


def save_plain_model(path):
    template().save(path)


def save_any_hdf5(path):
    with h5py.File(path, "w") as file:
        file["x"] = np.ones(3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("save", [save_plain_weights, save_single_layer, save_plain_model, save_any_hdf5])
def test_a_file_of_another_shape_is_a_value_error(tmp_path, save):
    save(tmp_path / "old.h5")
    with pytest.raises(ValueError, match="source must be a file saved from a multi_gpu_model"):
        convert(tmp_path / "old.h5", tmp_path / "new.h5")
    assert not (tmp_path / "new.h5").exists()


def test_wrong_paths_are_named(weight_file, tmp_path):
    source, _ = weight_file
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(FileNotFoundError, match=r"source must be an existing .h5 file, got .*missing\.h5"):
        convert(tmp_path / "missing.h5", tmp_path / "new.h5")
    with pytest.raises(OSError, match="source must be an HDF5 file"):
        convert(tmp_path / "text.h5", tmp_path / "new.h5")
    with pytest.raises(FileExistsError, match="destination must be a new file"):
        convert(source, tmp_path / "text.h5")
    assert (tmp_path / "text.h5").read_text() == "text"
    for name in ("new.keras", "new.weights.h5"):
        with pytest.raises(ValueError, match=r"destination must end in \.h5"):
            convert(source, tmp_path / name)


def test_weights_that_lie_in_another_file_are_refused(weight_file, tmp_path):
    source, _ = weight_file
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.ones((4, 4))
    with h5py.File(source, "r+") as file:
        del file["sequential_1/dense_2/kernel:0"]
        file["sequential_1/dense_2/kernel:0"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "x")
    with pytest.raises(ValueError, match=r"source must hold its data itself, got .*'kernel:0'.* a link to elsewhere"):
        convert(source, tmp_path / "new.h5")


def test_a_weight_that_is_listed_but_missing_is_a_value_error(weight_file, tmp_path):
    source, _ = weight_file
    with h5py.File(source, "r+") as file:
        del file["sequential_1/dense_2/kernel:0"]
    with pytest.raises(ValueError, match="without 'dense_2/kernel:0'"):
        convert(source, tmp_path / "new.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["old.h5"]


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("/", "layer_names", 1.5),
        ("/", "layer_names", h5py.Empty("f")),
        ("/", "layer_names", [1, 2]),
        ("/sequential_1", "weight_names", np.zeros((2, 2))),
        ("/sequential_1", "weight_names", b"one name"),
    ],
)
def test_names_that_are_no_list_of_names_are_an_error_that_says_so(weight_file, tmp_path, where, key, value):
    source, _ = weight_file
    with h5py.File(source, "a") as file:
        del file[where].attrs[key]
        file[where].attrs[key] = value
    with pytest.raises(ValueError, match=f"{key} must be a list of different names"):
        convert(source, tmp_path / "new.h5")


@pytest.mark.parametrize(
    "config",
    [
        b"[]",
        b"null",
        b'{"class_name": "Model"}',
        b'{"class_name": 1, "config": {}}',
        b'{"class_name": "Model", "config": {"layers": [null]}}',
        b'{"class_name": "Model", "config": {"layers": {"a": 1}}}',
        b'{"class_name": "Model", "config": {"name": 3, "layers": []}}',
        b'{"class_name": "Model", "config": {"layers": [{"class_name": "Lambda", "config": [[]]}]}}',
        b"[" * 100_000,
        7,
    ],
)
def test_a_configuration_that_is_none_is_an_error_that_says_so(weight_file, tmp_path, config):
    source, _ = weight_file
    with h5py.File(tmp_path / "whole.h5", "w") as whole, h5py.File(source) as file:
        file.copy("/", whole, "model_weights")
        whole.attrs["model_config"] = config
    with pytest.raises(ValueError, match=r"^source must (describe each layer|be a whole HDF5 file)"):
        convert(tmp_path / "whole.h5", tmp_path / "new.h5")
    assert not (tmp_path / "new.h5").exists()


def test_data_that_are_declared_and_not_stored_are_not_allocated(weight_file, tmp_path):
    source, _ = weight_file
    with h5py.File(source, "a") as file:
        group = file["sequential_1"]
        name = str(group.attrs["weight_names"][0])
        del group[name]
        group.create_dataset(name, (1 << 40,), "f8", chunks=(1 << 10,))
    with pytest.raises(ValueError, match=r"bytes declared for .* and 0 stored"):
        convert(source, tmp_path / "new.h5")


def test_torn_and_garbled_files_end_in_an_error_of_convert(weight_file, tmp_path):
    """Bytes are changed anywhere in the file, or its end is missing."""
    source, _ = weight_file
    data, generator, told = source.read_bytes(), np.random.default_rng(3), 0
    for number in range(60):
        changed = np.frombuffer(data, np.uint8).copy()
        places = generator.integers(0, len(data), (1, 40, 400)[number % 3])
        changed[places] = generator.integers(0, 256, len(places))
        end = len(data) if number % 5 else int(generator.integers(0, len(data)))
        (tmp_path / "torn.h5").write_bytes(changed[:end].tobytes())
        try:
            convert(tmp_path / "torn.h5", tmp_path / "new.h5")
            (tmp_path / "new.h5").unlink()
        except (OSError, ValueError):
            told += 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["old.h5", "torn.h5"]
    assert told > 20
