"""`plot_model`: draws a model's graph, with Keras 2's arguments and defaults."""

from __future__ import annotations

from typing import Any

import keras


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
