"""Keras 2's `keras.backend` as far as scripts need it for intermediate outputs: `K.function`, `K.learning_phase`.

Scripts written for Keras 2 say `from keras import backend as K` and change only that line:
`from fastdp import backend as K`. The functions live in `fastdp.keras.keras2.functions`, which is loaded on first use,
so that `import fastdp` needs neither Keras nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdp.keras.keras2.functions import function, get_layer_output, learning_phase

__all__ = ["function", "get_layer_output", "learning_phase"]


def __getattr__(name: str) -> Any:
    """Load one of Keras 2's names.

    Raises:
        AttributeError: unknown name; for the arithmetic of Keras 2's backend, use Keras 3's `keras.ops`.
        ImportError: Keras or torch is missing; the message says how to install them.
    """
    if name not in __all__:
        raise AttributeError(
            f"module 'fastdp.backend' has no attribute {name!r}. It provides {__all__} of Keras 2's backend; use "
            "keras.ops for arithmetic."
        )
    try:
        module = importlib.import_module("fastdp.keras.keras2.functions")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] in ("keras", "torch"):
            raise ImportError(
                f"fastdp.backend.{name} needs Keras and torch. Install them with: pip install 'fastdp[keras]'"
            ) from error
        raise
    return getattr(module, name)
