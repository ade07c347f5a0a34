"""The torch facade: `TorchParallel`, which `fastdp.wrap` makes of a torch.nn.Module."""

from fastdp.torch.parallel_module import TorchParallel
from fastdp.torch.train_result import TrainResult
from fastdp.torch.train_step import TrainStep

__all__ = ["TorchParallel", "TrainResult", "TrainStep"]
