"""How a peer talks with the driver, line by line: it is ready, and then one timed round for each line that it gets."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

PREFIX = "peer: "  # marks answers, since libraries print on stdout too


def serve(prepare: Callable[[], tuple[Callable[[], float], dict[str, Any]]]) -> None:
    """Prepare, report ready with facts about the model, then answer each line of stdin with the seconds of a round."""
    began = time.perf_counter()
    run, facts = prepare()
    _say({"ready": time.perf_counter() - began, **facts})
    for _ in sys.stdin:
        _say({"seconds": run()})


def _say(answer: dict[str, Any]) -> None:
    """Print one answer on its own line, even after an unfinished line."""
    print(f"\n{PREFIX}{json.dumps(answer)}", flush=True)
