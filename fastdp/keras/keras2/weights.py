"""`save_weights` and `load_weights`: weight files of Keras 2's format, of parallel models too."""

from __future__ import annotations

import keras

from fastdp.keras.h5_files import by_name as weight_files
from fastdp.keras.template_view import TemplateView


def save_weights(model: keras.Model, filepath: weight_files.Path, overwrite: bool = True) -> None:
    """Write a model's weights as Keras 2's `save_weights` did: a file that can be loaded in order and by name.

    Keras 3's own format, `.weights.h5`, stores the classes and positions of layers, but not their names.

    Args:
        model: a built model. For a parallel model, the template's weights are written.
        filepath: a path that ends in `.h5` or `.hdf5`, but not in `.weights.h5`.
        overwrite: whether to replace an existing file.

    The file appears only when it is complete. Any Keras loads it without fastdp.

    Raises:
        ValueError: `filepath` has another ending, or the model is not built.
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
        model: a built model. For a parallel model, the template is loaded, and all replicas follow at the next step.
        filepath: a path that ends in `.h5` or `.hdf5`, but not in `.weights.h5`.
        by_name: load the layers whose names are in the file, and leave the others unchanged. Otherwise all layers are
            loaded, in order.
        skip_mismatch: leave layers (by name) or weights (in order) of another shape unchanged, and warn about each,
            instead of raising.

    By name, either all layers whose names are in the file change, or none, unless mismatches are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: `filepath` has another ending, the file holds something else, layers have weights of other shapes
            (the message names all of them), or the file was saved from a Keras 2 `multi_gpu_model`, which
            `fastdp convert` unwraps.

    Warns:
        UserWarning: no layer was loaded by name, or a mismatch was skipped.

    Example:
        >>> load_weights(model, "my_model_weights.h5", by_name=True)
    """
    weight_files.load_weights(_plain(model), filepath, by_name=by_name, skip_mismatch=skip_mismatch)


def _plain(model: keras.Model) -> keras.Model:
    """The template of a parallel model."""
    return model.template if isinstance(model, TemplateView) else model
