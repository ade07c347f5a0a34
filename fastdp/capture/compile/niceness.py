"""How much of the cores a compiler's process gets beside the training: what is left, or its share after a while.

While somebody waits for it, it has its share at once.

Where Linux groups processes by session (sched_autogroup_enabled), a niceness counts within its group alone. A worker
has a session of its own, so the group has to have one: `man 7 sched`, "The autogroup feature".
"""

from __future__ import annotations

from pathlib import Path

# A helper thread of OpenMP that loses its core to a compiler keeps all others of the training waiting, awake.
YIELDING = 19
SHARING = 0
# Training that leaves nothing would go on for minutes without what is compiled: a worker that has not ended by then
# gets its share.
YIELDING_SECONDS = 30.0


def set_group(process: int, niceness: int) -> bool:
    """Set the niceness of a process's session among others; -20 to 19, but for root not below 0.

    Returns:
        Whether it is so now, or never can be: the system does not group processes by session. False if it is to be
        tried again: without privileges Linux allows one change in a tenth of a second.
    """
    try:
        Path(f"/proc/{process}/autogroup").write_text(str(niceness), encoding="ascii")
    except BlockingIOError:
        return False
    except OSError:  # no such file, or the process has ended
        return True
    return True
