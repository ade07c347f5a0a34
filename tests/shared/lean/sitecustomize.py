"""Makes Keras's import shorter in the tests and in all processes that they start: without scikit-learn and Matplotlib.

Keras imports both for wrappers and pictures that no test here is about, with SciPy a third of its time. It takes them
as not installed; whoever imports them later gets them. Python imports this module at its start, from PYTHONPATH.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

LEFT_OUT = ("matplotlib", "sklearn")


class NotForKeras(Loader):
    """While Keras is imported, finds what is left out, as torch asks for, and refuses to load it."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The spec of a module that is left out; None at any other time, and for all others."""
        keras = getattr(sys.modules.get("keras"), "__spec__", None)
        if fullname not in LEFT_OUT or not getattr(keras, "_initializing", False):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As Python does."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Refuse, as for a module that is not there."""
        raise ModuleNotFoundError(f"{module.__name__} is left out of Keras's import in tests", name=module.__name__)


sys.meta_path.insert(0, NotForKeras())
