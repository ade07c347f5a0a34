"""`CustomObjectScope`: names of the user's own classes and functions, for files and for arguments of layers."""

from __future__ import annotations

from typing import Any

import keras
from keras.src import activations, constraints, initializers, losses, metrics, regularizers

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
