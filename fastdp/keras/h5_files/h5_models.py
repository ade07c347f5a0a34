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
import numpy as np
from numpy.typing import NDArray

from fastdp.keras.h5_files.by_name import is_keras_2_file
from fastdp.keras.h5_files.convert import is_wrapper_config, read_names
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

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold a whole model, or holds a Keras 2 `multi_gpu_model`, which `fastdp convert`
            unwraps.

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
    with h5py.File(path, "r") as file:
        if "model_config" not in file.attrs or "model_weights" not in file:
            raise ValueError(
                f"`filepath` must be a file that save() wrote. Received: {path!r}, which holds no model's "
                "configuration. Build the model, and load weights by model.load_weights(path)."
            )
        if is_wrapper_config(json.loads(file.attrs["model_config"])):
            raise ValueError(
                f"`filepath` was saved from a parallel model of Keras 2. Received: {path!r}. Unwrap it by "
                f"`fastdp convert {os.path.basename(path)} plain.h5`, and load that."
            )
        settings = json.loads(file.attrs["training_config"]) if "training_config" in file.attrs else None
        group = file.get("optimizer_weights")
        slots = [] if group is None else [np.asarray(group[name][()]) for name in read_names(group, "weight_names")]
    model = keras.models.load_model(path, custom_objects=objects, compile=False, safe_mode=safe_mode)
    if not compile:
        return model
    if settings is None:
        warn_user(f"{path!r} has no compile settings: compile the model.")
    else:
        _compile(model, settings, objects)
        _restore(model, slots, path)
    return model


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
