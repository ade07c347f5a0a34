"""Tells a checkpoint that is of no use from troubles of the machine, for which no older one may be taken."""

from __future__ import annotations

import errno

# Rights, memory, space, open files, servers: the content may be all right, and can be read another time.
_OF_THE_MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        "EACCES",
        "EAGAIN",
        "EDQUOT",
        "EINTR",
        "EMFILE",
        "ENFILE",
        "ENOMEM",
        "ENOSPC",
        "EPERM",
        "ESTALE",
        "ETIMEDOUT",
    )
    if hasattr(errno, name)
)


def of_the_machine(error: BaseException) -> bool:
    """Whether an error tells nothing of the content of what was read."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE)


def of_content(error: BaseException) -> bool:
    """Whether loading a checkpoint has failed by what it holds, as far as errors tell.

    Of RuntimeErrors only those of no other class: torch's "size mismatch" is one, its OutOfMemoryError is not.
    """
    return isinstance(error, (ValueError, TypeError)) or type(error) is RuntimeError
