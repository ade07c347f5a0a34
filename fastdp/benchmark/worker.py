"""A worker process of `fastdp bench`: `main()` takes the request from the command line, as JSON."""

from __future__ import annotations

import os
import sys

from fastdp.benchmark.process import module_command
from fastdp.benchmark.request import Request
from fastdp.benchmark.serve import serve
from fastdp.benchmark.ways import prepare


def command(request: Request) -> list[str]:
    """The command that starts a worker for a request."""
    return module_command("fastdp.benchmark.worker", request.to_json())


def main() -> None:
    """Serve the request of the command line."""
    if os.environ.get("KERAS_BACKEND") != "tensorflow":  # Keras would import it if installed: slower, more threads
        sys.modules["tensorflow"] = None  # type: ignore[assignment]
    request = Request.from_json(sys.argv[1])
    serve(lambda: prepare(request))
