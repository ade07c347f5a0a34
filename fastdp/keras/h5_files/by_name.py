"""Writes and loads Keras 2's weight files, in order or by the names of layers.

Such a file has one group per layer, named after the layer, with a list of its weights, trainable weights first. A file
of a whole model has the same in its group `model_weights`. Keras 3 reads these files in order, but writes only its own
`.weights.h5`, which identifies layers by class and position, not by name.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import Any

import h5py
import keras
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group
from numpy.typing import NDArray

from fastdp.data.h5_checks import check_tree, damage_named, own_data, read_names
from fastdp.keras.h5_files.convert import is_wrapper_shaped
from fastdp.warn import warn_user

Path = str | os.PathLike[str]
TOP = "top_level_model_weights"  # the group of the weights that belong to no layer


@dataclass(slots=True)
class _Saved:
    """The weights of one layer in a file, together with the variables of the layer of this name."""

    layer: Any
    variables: list[Any]
    names: list[str]
    values: list[NDArray[Any]]

    def mismatch(self) -> str | None:
        """A description of what does not fit; None if everything fits."""
        name = self.layer.name
        if len(self.values) != len(self.variables):
            return f"{name!r} has {len(self.variables)} weights, the file has {len(self.values)}"
        for variable, saved, value in zip(self.variables, self.names, self.values, strict=True):
            if tuple(variable.shape) != value.shape:
                return (
                    f"{name!r} has {variable.name} of shape {tuple(variable.shape)}, the file {saved} of {value.shape}"
                )
        return None

    def load(self) -> None:
        """Assign the values to the variables."""
        for variable, value in zip(self.variables, self.values, strict=True):
            variable.assign(value)
        if hasattr(self.layer, "finalize_state"):  # as in Keras: Normalization computes values from loaded weights
            self.layer.finalize_state()


def is_keras_2_file(path: Any) -> bool:
    """Whether a file name is that of a Keras 2 weight file or of a whole model in that format."""
    name = str(path)
    return name.endswith((".h5", ".hdf5")) and not name.endswith(".weights.h5")


def save_weights(model: keras.Model, filepath: Path, overwrite: bool = True) -> None:
    """Write the weights of a plain model: see `fastdp.utils.save_weights`."""
    path = _checked(filepath)
    if not model.built:
        raise ValueError(f"The model {model.name!r} is not built, so it has no weights: call it on a batch first.")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"`filepath` must be a new file with overwrite=False. Received: {path!r}, which exists")
    folder = os.path.dirname(os.path.abspath(path))
    with tempfile.TemporaryDirectory(prefix=".weights-", dir=folder) as temporary:
        partial = os.path.join(temporary, "partial.h5")
        with h5py.File(partial, "w") as file:
            save_weights_to_hdf5_group(file, model)
        os.replace(partial, path)


def load_weights(model: keras.Model, filepath: Path, *, by_name: bool = False, skip_mismatch: bool = False) -> None:
    """Load weights into a plain model: see `fastdp.utils.load_weights`."""
    path = _checked(filepath)
    if not os.path.exists(path):
        raise FileNotFoundError(f"`filepath` must be an existing file. Received: {path!r}: check the path")
    with damage_named(path, "`filepath`"), h5py.File(path, "r") as file:
        group = file["model_weights"] if "layer_names" not in file.attrs and "model_weights" in file else file
        check_tree(group, path, "`filepath`")
        names = read_names(group, "layer_names")
        if not names:
            raise ValueError(
                f"`filepath` must be a Keras 2 weight file, one group for each layer. Received: {path!r}, which has no "
                "list of layers. A file in Keras 3's format must be named `.weights.h5`."
            )
        _check_not_wrapped(group, model, path)
        pairs = _pairs(group, names, model, path) if by_name else []
    if by_name:
        _load_by_name(pairs, names, model, path, skip_mismatch)
        return
    with damage_named(path, "`filepath`"):
        model.load_weights(path, skip_mismatch=skip_mismatch)


def _checked(filepath: Path) -> str:
    """The path, checked to have an ending of Keras 2's files."""
    path = os.fspath(filepath)
    if not is_keras_2_file(path):
        raise ValueError(
            "`filepath` must end in .h5 or .hdf5, and not in .weights.h5, since only Keras 2's files store the names "
            f"of layers. Received: {path!r}. Write one by fastdp.utils.save_weights(model, 'weights.h5'), or load "
            "Keras 3's by model.load_weights(path)."
        )
    return path


def _check_not_wrapped(group: h5py.Group, model: keras.Model, path: str) -> None:
    """Refuse a file saved from a parallel model of Keras 2. A model with the same nesting may load such a file."""
    nested = is_wrapper_shaped(group)
    if nested is not None and nested not in [layer.name for layer in model.layers]:
        raise ValueError(
            f"`filepath` holds all weights inside one model {nested!r}, as files saved from a parallel model of "
            f"Keras 2 do. Received: {path!r}. Unwrap it by `fastdp convert {os.path.basename(path)} plain.h5`, "
            "and load that."
        )


def _pairs(group: h5py.Group, names: list[str], model: keras.Model, path: str) -> list[_Saved]:
    """Read the layers of the file whose names occur in the model."""
    owners: list[tuple[str, Any, list[Any]]] = [
        (layer.name, layer, [*layer.trainable_weights, *layer.non_trainable_weights]) for layer in model.layers
    ]
    own = [*model._trainable_variables, *model._non_trainable_variables]
    if TOP in group and own:
        owners.append((TOP, model, own))
    pairs = []
    for name, layer, variables in owners:
        if name in names or name == TOP:
            saved = read_names(group[name], "weight_names")
            if saved or variables:
                pairs.append(_Saved(layer, variables, saved, [_value(group[name], key, path) for key in saved]))
    return pairs


def _value(group: h5py.Group, name: str, path: str) -> NDArray[Any]:
    return own_data(group, name, path, "`filepath`")


def _load_by_name(pairs: list[_Saved], names: list[str], model: keras.Model, path: str, skip: bool) -> None:
    """Load the layers that fit. Raise or warn about the others."""
    if not pairs:
        warn_user(
            f"No layer was loaded from {path!r}: it has the layers {names}, and the model {model.name!r} has "
            f"{[layer.name for layer in model.layers]}."
        )
    found = {id(pair): problem for pair in pairs if (problem := pair.mismatch()) is not None}
    if found and not skip:
        raise ValueError(
            f"The layers of the same name must have the same weights as in {path!r}. Received: "
            f"{'; '.join(found.values())}. Nothing was loaded. Rename these layers, or pass skip_mismatch=True."
        )
    for pair in pairs:
        if id(pair) in found:
            warn_user(f"A layer was not loaded from {path!r}: {found[id(pair)]}.")
        else:
            pair.load()
