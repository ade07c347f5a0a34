"""Issues warnings that point at the user's own line, however deep in fastdp, Keras or torch they arise."""

from __future__ import annotations

import sys
import warnings

# Packages whose frames are skipped: a step passes through them on its way from the user's script.
_PASSED_THROUGH = frozenset(("fastdp", "keras", "torch", "contextlib", "functools", "runpy", "threading", "concurrent"))


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as if from the innermost line outside fastdp, Keras and torch.

    Python's warning filters use that line's module, and the message names its file. If a thread has no frame outside
    these packages, its outermost frame is used.

    Args:
        message: the text of the warning.
        category: the class of the warning.

    Example:
        >>> warn_user("fastdp: steps of the model 'm' run on one device")  # doctest: +SKIP
    """
    level, frame = 2, sys._getframe(1)  # the caller is level 2, as `warnings.warn` counts
    while frame.f_back is not None and _is_passed(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_passed(module: str) -> bool:
    return module.partition(".")[0] in _PASSED_THROUGH
