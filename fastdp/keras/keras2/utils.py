"""The utilities of Keras 2's `keras.utils`, with Keras 2's signatures, on Keras 3."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras.src import activations, constraints, initializers, losses, metrics, regularizers

from fastdp.keras.h5_files import by_name as weight_files
from fastdp.keras.keras2.functions import get_layer_output
from fastdp.keras.keras2.get_file import get_file
from fastdp.keras.keras2.summary import print_summary
from fastdp.keras.template_view import TemplateView

__all__ = [
    "CustomObjectScope",
    "Sequence",
    "get_file",
    "get_layer_output",
    "load_weights",
    "normalize",
    "plot_model",
    "print_summary",
    "save_weights",
    "to_categorical",
]

# Keras 3 looks up regularizers, activations and the like by name in these tables, not in the scope.
_TABLES: tuple[dict[str, Any], ...] = tuple(
    module.ALL_OBJECTS_DICT for module in (activations, constraints, initializers, losses, metrics, regularizers)
)


class CustomObjectScope(keras.utils.CustomObjectScope):
    """Registers names for classes and functions inside a `with`, for files and for arguments of layers.

    Keras 3's own scope works only for files: `Dense(3, kernel_regularizer="MyObject")` fails in it. The names apply to
    the whole process while the scope lasts, and override names of Keras.

    Args:
        custom_objects: classes and functions by name.

    Example:
        >>> with CustomObjectScope({"MyObject": MyObject}):
        ...     layer = keras.layers.Dense(3, kernel_regularizer="MyObject")
    """

    def __enter__(self) -> Any:
        self._hidden = [{name: table[name] for name in self.custom_objects if name in table} for table in _TABLES]
        for table in _TABLES:
            table.update(self.custom_objects)
        return super().__enter__()

    def __exit__(self, *args: Any, **kwargs: Any) -> None:
        super().__exit__(*args, **kwargs)
        for table, hidden in zip(_TABLES, self._hidden, strict=True):
            for name in self.custom_objects:
                table.pop(name, None)
            table.update(hidden)


class Sequence(keras.utils.PyDataset):
    """Base class of data sets that return one batch per index: `keras.utils.PyDataset`, also for Keras 2 code.

    A subclass has `__len__`, the number of batches, and `__getitem__(i)`, which returns a tuple `(x,)`,
    `(x, y)` or `(x, y, sample_weight)` of arrays with the rows of global batch `i`. It may have
    `on_epoch_end`. Its `__init__` need not call `super().__init__()`, which Keras 3 requires, but may call it
    to set `workers`, `use_multiprocessing` and `max_queue_size`.

    Example:
        >>> class Squares(Sequence):
        ...     def __init__(self, x):
        ...         self.x = x
        ...     def __len__(self):
        ...         return len(self.x) // 32
        ...     def __getitem__(self, i):
        ...         x = self.x[32 * i : 32 * (i + 1)]
        ...         return x, x**2
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__new__(cls)
        keras.utils.PyDataset.__init__(instance)
        return instance


def to_categorical(y: Any, num_classes: int | None = None, dtype: Any = "float32") -> Any:
    """Class numbers as one-hot rows.

    Args:
        y: ints from 0, of any shape; a last axis of length 1 is dropped.
        num_classes: length of a row; None means the greatest number in `y` plus one.
        dtype: dtype of the result.

    Returns a new array of shape `y.shape + (num_classes,)`; a tensor if `y` is a tensor.

    Raises:
        ValueError: a number in `y` is not from 0 to `num_classes - 1`, or `y` is empty without `num_classes`.

    Example:
        >>> to_categorical([0, 2, 1])
        array([[1., 0., 0.],
               [0., 0., 1.],
               [0., 1., 0.]], dtype=float32)
    """
    if keras.ops.is_tensor(y):
        num_classes = num_classes or int(keras.ops.max(y)) + 1
        return keras.ops.cast(keras.utils.to_categorical(y, num_classes), dtype)
    classes = np.asarray(y).astype(np.int64)
    if classes.ndim > 1 and classes.shape[-1] == 1:
        classes = classes[..., 0]
    if not num_classes and not classes.size:
        raise ValueError("num_classes must be given where y is empty, got None: pass the number of classes")
    num_classes = num_classes or int(classes.max()) + 1
    outside = classes[(classes < 0) | (classes >= num_classes)]
    if outside.size:
        raise ValueError(
            f"y must hold class numbers from 0 to {num_classes - 1}, got {outside[0]}: "
            "renumber the classes, or pass a larger num_classes"
        )
    rows = np.zeros((*classes.shape, num_classes), dtype)
    np.put_along_axis(rows, classes[..., np.newaxis], 1, axis=-1)
    return rows


def normalize(x: Any, axis: int = -1, order: Any = 2) -> Any:
    """Divide an array by its norm along an axis. If the norm is 0, the values stay 0.

    Keras 3.15's own function fails for `axis=0`.

    Args:
        x: array of any shape.
        axis: the axis to take norms along.
        order: as in `numpy.linalg.norm`: 1, 2, `np.inf`, ...

    Returns a new array of the shape of `x`; a tensor if `x` is a tensor.

    Example:
        >>> normalize(np.array([[3.0, 4.0]]))
        array([[0.6, 0.8]])
    """
    if keras.ops.is_tensor(x):
        return keras.utils.normalize(x, axis=axis, order=order)
    x = np.asarray(x)
    norm = np.linalg.norm(x, order, axis, keepdims=True)
    return x / np.where(norm == 0, 1, norm)


def plot_model(
    model: keras.Model,
    to_file: Any = "model.png",
    show_shapes: bool = False,
    show_layer_names: bool = True,
    rankdir: str = "TB",
    expand_nested: bool = False,
    dpi: int = 96,
) -> Any:
    """Draw a model's graph to a file with `keras.utils.plot_model`, with Keras 2's arguments and defaults.

    Needs `pydot` and Graphviz. Returns the same as Keras: an image to show in a notebook, or None.

    Raises:
        ImportError: `pydot` or Graphviz is missing.
        ValueError: the model is not built.

    Example:
        >>> plot_model(model, "model.png", show_shapes=True)
    """
    return keras.utils.plot_model(
        model,
        to_file=to_file,
        show_shapes=show_shapes,
        show_layer_names=show_layer_names,
        rankdir=rankdir,
        expand_nested=expand_nested,
        dpi=dpi,
    )


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
