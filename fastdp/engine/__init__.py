"""The engine: scatter, run, reduce, update, merge."""

from fastdp.engine.data_parallel import DataParallel

__all__ = ["DataParallel"]
