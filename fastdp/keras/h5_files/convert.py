"""Converts Keras 2 files of a `multi_gpu_model` into files of the model that was wrapped.

Such a file holds the wrapper: input layers, slices, one nested model with all the weights, and merges. Keras writes a
nested model's weights as one list: the trainable weights of all layers, then the others. A plain file has one list per
layer. So the weights of the list are assigned to layers by their names.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import h5py
import keras
import numpy as np

from fastdp.data.h5_checks import check_conversion, check_tree, damage_named, own_data, read_names
from fastdp.warn import warn_user

ATTRIBUTE_NBYTES = 64512  # HDF5 keeps attributes of an object in a header of 64 KiB; Keras splits lists there
WRAPPER_LAYERS = {"InputLayer", "Lambda", "Concatenate", "Merge"}

Layers = dict[str, list[str]]  # the names of the weights of each layer, in order


def convert(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], *, template: keras.Model | None = None
) -> str:
    """Write the weights in a wrapper-shaped `.h5` file as a file of the wrapped model, and return its path.

    Args:
        source: a file written by `save()` or `save_weights()` of a Keras 2 `multi_gpu_model`. It is only read.
        destination: a new file whose name ends in `.h5` or `.hdf5`. A weight file becomes a weight file for
            `model.load_weights`; a file of a whole model becomes such a file, uncompiled.
        template: the model to load into, for the names and the order of its layers; its weights are not
            touched. A weight file needs it if some layers were frozen when it was saved, or if the model
            contains other models. Files of whole models hold this information themselves.

    Values and dtypes do not change. The file appears only when it is complete.

    Raises:
        FileNotFoundError: there is no file `source`.
        FileExistsError: `destination` exists.
        ValueError: `source` is not wrapper-shaped, is damaged or holds external data, `destination` has another
            ending, or a weight belongs to none of the layers.
        OSError: `source` is not HDF5.

    Warns:
        UserWarning: the file also holds an optimizer's state, which is left out.

    Example:
        >>> convert("parallel.h5", "template.h5")
        'template.h5'
        >>> model.load_weights("template.h5")
    """
    source, destination = os.fspath(source), os.fspath(destination)
    check_conversion(source, destination)
    with damage_named(source, "source"):
        _convert(source, destination, template)
    return destination


def _convert(source: str, destination: str, template: keras.Model | None) -> None:
    """Convert a file; errors of h5py about damaged files are its own."""
    with h5py.File(source, "r") as file:
        check_tree(file, source, "source")
        whole = "model_weights" in file and "layer_names" not in file.attrs
        weights = file["model_weights"] if whole else file
        config = _template_config(file, source) if whole else None
        group = _wrapped_group(weights, source, None if config is None else _name_of(config))
        names = read_names(group, "weight_names")
        layers = _deal_out(names, _known_layers(config, template))
        if "optimizer_weights" in file:
            warn_user(f"{source!r} also holds the optimizer's state, which is left out: compile the model again")
        folder = os.path.dirname(os.path.abspath(destination))
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=folder) as temporary:
            partial = os.path.join(temporary, "partial.h5")
            with h5py.File(partial, "w") as target:
                _write(target, config, layers, group, weights)
            os.replace(partial, destination)


def _not_wrapper_shaped(source: str, found: str) -> ValueError:
    return ValueError(
        f"source must be a file saved from a multi_gpu_model, one nested model that holds all weights, got "
        f"{source!r} with {found}: a plain file needs no conversion, load it as it is"
    )


def _template_config(file: h5py.File, source: str) -> dict[str, Any]:
    """The configuration of the wrapped model, taken from the wrapper's configuration."""
    text = file.attrs.get("model_config")
    if text is None:
        raise _not_wrapper_shaped(source, "weights of a whole model but no model_config")
    config = _checked(json.loads(text) if isinstance(text, (str, bytes)) else None, source)
    layers = _layer_configs(config)
    nested = [layer for layer in layers if _layer_configs(layer)]
    others = {layer["class_name"] for layer in layers if not _layer_configs(layer)}
    if len(nested) != 1 or not others <= WRAPPER_LAYERS or not others:
        classes = ", ".join(layer["class_name"] for layer in layers) or "none"
        raise _not_wrapper_shaped(source, f"these layers: {classes}")
    template = dict(nested[0])
    if isinstance(template["config"], list):  # a Sequential of Keras before 2.2.3 has no name inside
        template["config"] = {"name": template.get("name", "sequential"), "layers": template["config"]}
    return template


def _checked(config: Any, source: str) -> dict[str, Any]:
    """The configuration of a layer or a model, which JSON may have anything in place of."""
    inner = config.get("config") if isinstance(config, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    named = isinstance(name or (config.get("name", "") if isinstance(config, dict) else None), str)
    if not isinstance(inner, (dict, list)) or not isinstance(config.get("class_name"), str) or not named:
        raise ValueError(
            f"source must describe each layer by its class, name and config, got {source!r} with "
            f"{str(config)[:100]}: the file is damaged"
        )
    layers = inner if isinstance(inner, list) else inner.get("layers", [])
    for layer in layers if isinstance(layers, list) else [layers]:
        _checked(layer, source)
    return dict(config)


def _layer_configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The configurations of a model's layers; empty for a layer that is not a model."""
    inner = config.get("config")
    layers = inner if isinstance(inner, list) else inner.get("layers") if isinstance(inner, dict) else None
    return layers or []


def _with_input_layers(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with each Sequential's input shape moved to an InputLayer, where Keras 3 expects it."""
    layers = [_with_input_layers(layer) for layer in _layer_configs(config)]
    if not layers:
        return config
    first = layers[0]["config"]
    if config["class_name"] == "Sequential" and isinstance(first, dict) and "batch_input_shape" in first:
        shape = first["batch_input_shape"]
        layers[0] = {**layers[0], "config": {k: v for k, v in first.items() if k != "batch_input_shape"}}
        entry = {"batch_shape": shape, "dtype": first.get("dtype", "float32"), "name": f"{first['name']}_input"}
        layers.insert(0, {"class_name": "InputLayer", "config": entry})
    return {**config, "config": {**config["config"], "layers": layers}}


def _wrapped_group(weights: h5py.Group, source: str, name: str | None) -> h5py.Group:
    """The one group that holds weights."""
    layer_names = read_names(weights, "layer_names")
    if not layer_names:
        raise _not_wrapper_shaped(source, "no list of layers")
    missing = [layer for layer in layer_names if not isinstance(weights.get(layer), h5py.Group)]
    if missing:
        raise _not_wrapper_shaped(source, f"no group for the layer {missing[0]!r}")
    weighty = [layer for layer in layer_names if read_names(weights[layer], "weight_names")]
    if len(weighty) != 1 or len(layer_names) < 2 or (name is not None and weighty != [name]):
        raise _not_wrapper_shaped(source, f"weights in the layers {weighty}")
    group = weights[weighty[0]]
    prefixes = {_layer_of(weight) for weight in read_names(group, "weight_names")}
    if prefixes == {weighty[0]}:
        raise _not_wrapper_shaped(source, f"weights in the single layer {weighty[0]!r}, which is no model")
    return group


def is_wrapper_shaped(weights: h5py.Group) -> str | None:
    """The name of the one model that holds all weights of a wrapper-shaped file; None for a plain file."""
    try:
        group = _wrapped_group(weights, "", None)
    except ValueError:
        return None
    return str(group.name).rsplit("/", maxsplit=1)[-1]


def is_wrapper_config(config: dict[str, Any]) -> bool:
    """Whether this is the configuration of a Keras 2 `multi_gpu_model`: slices of inputs, one model, merges."""
    layers = _layer_configs(config)
    classes = [layer["class_name"] for layer in layers if not _layer_configs(layer)]
    return len(layers) - len(classes) == 1 and "Lambda" in classes and set(classes) <= WRAPPER_LAYERS


def _layer_of(weight_name: str) -> str:
    return weight_name.split("/")[0]


def _known_layers(config: dict[str, Any] | None, template: keras.Model | None) -> dict[str, set[str]] | None:
    """The prefixes that weights of each top-level layer may have; None if the layers are unknown."""
    if config is not None:
        return {_name_of(layer): _inner_names(layer) for layer in _layer_configs(config)}
    if template is not None:
        return {layer.name: _names_inside(layer) for layer in template.layers}
    return None


def _names_inside(layer: Any) -> set[str]:
    """The names of a Keras layer and of all layers inside it."""
    return {layer.name}.union(*(_names_inside(inner) for inner in getattr(layer, "layers", ())))


def _name_of(layer: dict[str, Any]) -> str:
    inner = layer.get("config")
    return str(inner["name"] if isinstance(inner, dict) and "name" in inner else layer.get("name"))


def _inner_names(layer: dict[str, Any]) -> set[str]:
    """The names in a layer's configuration: of the layer and of all layers inside it."""
    return {_name_of(layer)}.union(*(_inner_names(inner) for inner in _layer_configs(layer)))


def _deal_out(weight_names: Sequence[str], known: dict[str, set[str]] | None) -> Layers:
    """Assign weights to layers. Layers are in the model's order, weights in the order of the list."""
    if known is None:
        found: Layers = {}
        for weight in weight_names:
            found.setdefault(_layer_of(weight), []).append(weight)
        return found
    owners = {inner: layer for layer, names in known.items() for inner in names}
    layers: Layers = {layer: [] for layer in known}
    for weight in weight_names:
        prefix = _layer_of(weight)
        stem, _, number = prefix.rpartition("_")
        # A cloned model (`cpu_relocation=True`) has weights `dense_1_1/...` in a layer `dense_1`.
        owner = owners.get(prefix) or (owners.get(stem) if number.isdigit() else None)
        if owner is None:
            raise ValueError(
                f"template must hold the layer of each weight, got none for {weight!r} among "
                f"{sorted(owners)}: pass the model that was wrapped"
            )
        layers[owner].append(weight)
    return layers


def _write(
    target: h5py.File, config: dict[str, Any] | None, layers: Layers, group: h5py.Group, old: h5py.Group
) -> None:
    """Write the template's file: its weights, and its configuration if the source has one."""
    top: h5py.Group = target
    if config is not None:
        target.attrs["model_config"] = json.dumps(_with_input_layers(config)).encode()
        top = target.create_group("model_weights")
    for holder in {target.name: target, top.name: top}.values():
        for name in ("backend", "keras_version"):
            if name in old.attrs:
                holder.attrs[name] = old.attrs[name]
    _write_names(top, "layer_names", list(layers))
    for layer, weight_names in layers.items():
        layer_group = top.create_group(layer)
        _write_names(layer_group, "weight_names", weight_names)
        for weight in weight_names:
            layer_group.create_dataset(weight, data=own_data(group, weight, old.file.filename, "source"))


def _write_names(group: h5py.Group, name: str, names: Sequence[str]) -> None:
    """Store a list of names in the form that Keras reads."""
    array = np.array([item.encode() for item in names], dtype=bytes if names else "S1")
    parts = max(1, -(-array.nbytes // ATTRIBUTE_NBYTES))
    while any(chunk.nbytes > ATTRIBUTE_NBYTES for chunk in np.array_split(array, parts)):
        parts += 1
    for number, chunk in enumerate(np.array_split(array, parts)):
        group.attrs[name if parts == 1 else f"{name}{number}"] = chunk
