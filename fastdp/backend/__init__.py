"""Device layers: `host` (virtual devices on NumPy memory) and `cuda` (CuPy); one small interface, `base`.

Scripts written for Keras 2 say `from keras import backend as K`. What they use of it for intermediate outputs,
`K.function` and `K.learning_phase`, is found here too, so that they change that line alone:
`from fastdp import backend as K`. It lives in `fastdp.keras.functions`, and is loaded when it is asked for: the
device layers know neither Keras nor torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["function", "get_layer_output", "learning_phase"]


def __getattr__(name: str) -> Any:
    """Load one of Keras 2's names.

    Raises:
        AttributeError: there is no such name; Keras 3 has the arithmetic of Keras 2's backend in `keras.ops`.
        ImportError: Keras or torch is missing; says how to install them.
    """
    if name not in __all__:
        raise AttributeError(
            f"module 'fastdp.backend' has no attribute {name!r}: of Keras 2's backend it has {__all__}, and "
            "Keras 3 has the arithmetic in keras.ops"
        )
    try:
        module = importlib.import_module("fastdp.keras.functions")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] in ("keras", "torch"):
            raise ImportError(
                f"fastdp.backend.{name} needs Keras and torch. Install them with: pip install 'fastdp[keras]'"
            ) from error
        raise
    return getattr(module, name)
