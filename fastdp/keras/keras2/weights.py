"""`save_weights` and `load_weights`: weight files of Keras 2's format, of parallel models too."""

from __future__ import annotations

import keras

from fastdp.keras.h5_files import by_name as weight_files
from fastdp.keras.template_view import TemplateView


def save_weights(model: keras.Model, filepath: weight_files.Path, overwrite: bool = True) -> None:
    """Write a model's weights as Keras 2's `save_weights` did: a file that loads in order and by name.

    Keras 3's own format, `.weights.h5`, knows the classes and the places of layers, and not their names.

    Args:
        model: a built model; of a parallel model its template's weights.
        filepath: ends in `.h5` or `.hdf5`, and not in `.weights.h5`.
        overwrite: replace a file that exists.

    The file appears only once it is complete. Any Keras loads it, without fastdp.

    Raises:
        ValueError: another ending; a model that is not built.
        FileExistsError: the file exists and `overwrite` is False.

    Example:
        >>> save_weights(model, "my_model_weights.h5")
    """
    weight_files.save_weights(_plain(model), filepath, overwrite)


def load_weights(
    model: keras.Model, filepath: weight_files.Path, *, by_name: bool = False, skip_mismatch: bool = False
) -> None:
    """Load a weight file of Keras 2's format, or the weights of a whole model's `.h5` file.

    Args:
        model: a built model; of a parallel model its template, and all replicas follow at the next step.
        filepath: ends in `.h5` or `.hdf5`, and not in `.weights.h5`.
        by_name: load the layers that have a namesake in the file, and leave the others as they are. Otherwise all
            layers are loaded, in their order.
        skip_mismatch: leave layers (by name) or weights (in order) of another shape as they are, and warn of
            each, instead of raising.

    By name, either all layers with a namesake change, or none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, a file of something else, layers whose weights have other shapes (all are named),
            or a file saved from a Keras 2 `multi_gpu_model`, which `fastdp convert` unwraps.

    Warns:
        UserWarning: by name, nothing was loaded; a mismatch was skipped.

    Example:
        >>> load_weights(model, "my_model_weights.h5", by_name=True)
    """
    weight_files.load_weights(_plain(model), filepath, by_name=by_name, skip_mismatch=skip_mismatch)


def _plain(model: keras.Model) -> keras.Model:
    """The template of a parallel model."""
    return model.template if isinstance(model, TemplateView) else model
