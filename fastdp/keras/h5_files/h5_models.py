"""`load_model` for `.h5` files of Keras 2: the model comes back compiled, with its optimizer's state.

Keras 3.15 writes these files completely but reads them only in part: it builds the optimizer without variables, so that
training fails with "Unknown variable", and it cannot read losses and metrics that were given by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import h5py
import keras
from numpy.typing import NDArray

from fastdp.data.h5_checks import check_tree, damage_named, own_data, read_names
from fastdp.keras.h5_files.by_name import is_keras_2_file
from fastdp.keras.h5_files.convert import is_wrapper_config
from fastdp.keras.h5_files.size_limit import SizesBounded
from fastdp.warn import warn_user


def load_model(
    filepath: str | os.PathLike[str],
    custom_objects: Mapping[str, Any] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
) -> keras.Model:
    """Load a model as `keras.models.load_model` does; from an `.h5` file, load its optimizer's state too.

    Args:
        filepath: a file written by `save()` of a model or a parallel model: `.keras`, `.h5` or `.hdf5`.
        custom_objects: classes and functions by name.
        compile: whether to compile the model with the loss, metrics and optimizer of the file.
        safe_mode: refuse lambdas, as in Keras.

    Returns a plain Keras model: train it as it is, or wrap it on any number of devices.

    A `.h5` file may come from anywhere. What lies in other files is refused, as are links; arrays may be 1,100 times as
    large as what the file stores of them, and the model 16 times as large as the arrays, plus 256 MiB. `.keras` files
    are checked by Keras alone.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file is not HDF5, or cannot be read.
        TypeError: Keras does not know a class of the file, or cannot make an object of it.
        ValueError: the file does not hold a whole model, is damaged, leads to other files, declares more than it
            stores, describes a model far larger than its weights, needs safe_mode=False, or holds a Keras 2
            `multi_gpu_model`, which `fastdp convert` unwraps.

    Warns:
        UserWarning: the file has no compile settings, or its optimizer's state does not fit.

    Example:
        >>> model.save("my_model.h5")
        >>> model = load_model("my_model.h5")
        >>> parallel = fastdp.wrap(model, gpus=4)
        >>> parallel.compile(model.optimizer, model.loss)
    """
    objects = dict(custom_objects or {})
    if not is_keras_2_file(filepath):
        return keras.models.load_model(filepath, custom_objects=objects, compile=compile, safe_mode=safe_mode)
    path = os.fspath(filepath)
    if not os.path.exists(path):
        raise FileNotFoundError(f"`filepath` must be an existing file. Received: {path!r}: check the path")
    with damage_named(path, "`filepath`"):
        settings, slots, nbytes = _read(path)
    with damage_named(path, "`filepath`", type_errors=True), SizesBounded(path, nbytes):
        model = keras.models.load_model(path, custom_objects=objects, compile=False, safe_mode=safe_mode)
    if not compile:
        return model
    if settings is None:
        warn_user(f"{path!r} has no compile settings: compile the model.")
    else:
        with damage_named(path, "`filepath`", type_errors=True):
            _compile(model, settings, objects)
            _restore(model, slots, path)
    return model


def _read(path: str) -> tuple[dict[str, Any] | None, list[NDArray[Any]], int]:
    """The compile settings in a file, the values of the optimizer's state, and the declared bytes of all arrays."""
    with h5py.File(path, "r") as file:
        nbytes = check_tree(file, path, "`filepath`")
        if "model_config" not in file.attrs or not isinstance(file.get("model_weights"), h5py.Group):
            raise ValueError(
                f"`filepath` must be a file that save() wrote. Received: {path!r}, which holds no model's "
                "configuration. Build the model, and load weights by model.load_weights(path)."
            )
        if is_wrapper_config(_settings(file, "model_config", path)):
            raise ValueError(
                f"`filepath` was saved from a parallel model of Keras 2. Received: {path!r}. Unwrap it by "
                f"`fastdp convert {os.path.basename(path)} plain.h5`, and load that."
            )
        settings = _settings(file, "training_config", path) if "training_config" in file.attrs else None
        group = file.get("optimizer_weights")
        names = [] if group is None else read_names(group, "weight_names")
        return settings, [own_data(group, name, path, "`filepath`") for name in names], nbytes


def _settings(file: h5py.File, name: str, path: str) -> dict[str, Any]:
    """A configuration that lies in an attribute of a file as JSON."""
    text = file.attrs[name]
    settings = json.loads(text) if isinstance(text, (str, bytes)) else None
    if not isinstance(settings, dict):
        raise ValueError(f"`filepath` must hold its {name} as a JSON object, got {path!r} with {str(text)[:100]}")
    return settings


def _compile(model: keras.Model, settings: dict[str, Any], objects: dict[str, Any]) -> None:
    """Compile with the settings of a file, where a loss or a metric is a name or a configuration."""

    def read(value: Any) -> Any:
        if isinstance(value, dict) and "class_name" in value:
            return keras.saving.deserialize_keras_object(
                {"module": "keras.losses", **value} if hasattr(keras.losses, str(value["class_name"])) else value
            )
        if isinstance(value, dict):
            return {name: read(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [read(inner) for inner in value]
        return objects.get(value, value) if isinstance(value, str) else value

    with keras.saving.custom_object_scope(objects):
        model.compile(
            optimizer=keras.optimizers.deserialize(settings["optimizer_config"]),
            **{name: read(settings.get(name)) for name in ("loss", "metrics", "weighted_metrics", "loss_weights")},
        )


def _restore(model: keras.Model, values: list[NDArray[Any]], path: str) -> None:
    """Restore the optimizer's state."""
    if not values:
        return
    model.optimizer.build(model.trainable_variables)
    variables = model.optimizer.variables
    if [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
        warn_user(
            f"The optimizer's state in {path!r} does not fit a {type(model.optimizer).__name__} of this Keras: the "
            "optimizer starts anew."
        )
        return
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
