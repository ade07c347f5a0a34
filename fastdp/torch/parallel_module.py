"""`TorchParallel`: a torch module whose train and predict steps run on all devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastdp.engine.data_parallel import DataParallel
from fastdp.engine.report import Report, make_report
from fastdp.options import Options
from fastdp.program.torch.loss import LossFunction
from fastdp.program.torch.optimizer import OptimizerFactory
from fastdp.program.torch.program import TorchProgram
from fastdp.program.torch.rows.declared import DeclaredRows
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors.arrays import peak_nbytes
from fastdp.tensors.deterministic import deterministic_algorithms
from fastdp.torch.checks import check_module, check_options


class TorchParallel:
    """A module, run and trained on several devices as if on one. Made by `fastdp.wrap`.

    The module stays the user's own plain torch module: training changes it in place, `state_dict` is its
    own, and it works outside fastdp at any time. `TorchParallel` is not an nn.Module, so no name gets a prefix.

    Args:
        module: a module on the CPU, with all parameters initialized.
        devices: the devices of the replicas; their order is the order of the rows.
        options: the chosen options; `fastdp.wrap` explains them.

    Raises:
        ValueError: the module cannot be replicated; the message has the remedy.

    Replicas run copies of the module: hooks, and attributes that forward assigns, are private to each replica.
    Plain attributes that the user changes (`module.drop.p = 0.2`) reach all replicas.

    Example:
        >>> fastdp.set_virtual_devices(8)  # doctest: +SKIP
        >>> dp = fastdp.wrap(module, gpus=8)  # doctest: +SKIP
        >>> step = dp.train_step(F.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1))  # doctest: +SKIP
        >>> for x, y in loader:  # doctest: +SKIP
        ...     loss = step(x, y)
        >>> torch.save(dp.state_dict(), "weights.pt")  # doctest: +SKIP
    """

    def __init__(
        self,
        module: nn.Module,
        devices: Sequence[QueueDevice],
        options: Options,
    ) -> None:
        check_module(module)
        check_options(options, devices)
        self.module = module
        self.devices = list(devices)
        self.cpu_merge = options.cpu_merge
        self.cpu_relocation = options.cpu_relocation
        self._options = replace(options, cpu_relocation=False)  # a module's parameters stay with the first device
        self._scope = deterministic_algorithms if options.deterministic else nullcontext
        self._declared = DeclaredRows(module, options.rows if isinstance(options.rows, dict) else None)
        self._engine: DataParallel[TorchProgram] | None = None

    def __repr__(self) -> str:
        return f"TorchParallel({type(self.module).__name__} on {[device.name for device in self.devices]})"

    # Running.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs for a global batch, without gradients.

        Args:
            args, kwargs: the module's arguments: tensors or NumPy arrays with rows along the first axis, in
                any nest of tuples, lists and dicts. Zero-dim tensors and plain values go to all replicas.

        Returns:
            The module's outputs for all rows in order, on the CPU; the caller owns them. A zero-dim output is
            averaged by rows.

        The module's training mode is respected: dropout drops, and batch normalization uses the batch's
        moments. The call still changes nothing: running statistics move only in train steps.

        Raises:
            ReplicaError: a replica failed (also an instance of the built-in error that it failed with).
            ValueError: no rows, or arrays of unequal length.
        """
        if self._engine is None:
            program = TorchProgram(self.module, sync_batch_norm=self._options.sync_batch_norm)
            self._engine = DataParallel(program, self.devices, options=self._options)
        batch = self._engine.program.batch(args, kwargs, declared=self._declared)
        with self._scope():
            return self._engine.program.outputs(self._engine.predict(batch))

    def train_step(
        self,
        loss_fn: LossFunction,
        optimizer_factory: OptimizerFactory,
        *,
        reduction: str | None = None,
        clip_grad_norm: float | None = None,
        accumulate: int = 1,
    ) -> TrainStep:
        """Make the function that trains on one global batch.

        Args:
            loss_fn: `loss_fn(outputs, *targets)` returns one number. Any function or nn loss module.
            optimizer_factory: `optimizer_factory(parameters)` makes a new torch optimizer. Called once per
                device; the first one is over the module's own parameters and becomes `optimizer`.
            reduction: None: `loss_fn` may be anything and is computed on the merged outputs (exact for class
                weights, ignore_index, contrastive losses). "mean" or "sum": `loss_fn` is the mean or sum over
                samples, and each replica computes its own part without waiting for the others.
            clip_grad_norm: the largest norm of the global batch's gradient.
            accumulate: update once per `accumulate` calls, with the sum of their gradients divided by
                `accumulate`. Only the last call reduces gradients. Running statistics move in every call.

        Raises:
            TypeError, ValueError: an option or an optimizer cannot be used; the message has the remedy.

        Example:
            >>> step = dp.train_step(nn.CrossEntropyLoss(), torch.optim.Adam)  # doctest: +SKIP
            >>> loss = step(x, y)  # doctest: +SKIP
        """
        program = TorchProgram(
            self.module,
            loss_fn,
            optimizer_factory,
            reduction=reduction,
            sync_batch_norm=self._options.sync_batch_norm,
            clip_grad_norm=clip_grad_norm,
            accumulate=accumulate,
        )
        self._engine = DataParallel(program, self.devices, options=self._options)
        return TrainStep(self._engine, self._scope, self._declared)

    def report(self) -> Report:
        """Report how steps run, where their time goes and what uses the memory. Prints as tables.

        Covers the latest `train_step`, or calls if there is none.
        """
        steps = [{"how": "eager", "why": "a torch.nn.Module is not captured"}]
        return make_report(self._engine, steps, library_nbytes=peak_nbytes)

    # Members of the module.

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The latest train step's optimizer, for schedulers and checkpoints; None before `train_step`.

        Changes of its `param_groups`, such as learning rates, and a loaded state reach all replicas.
        """
        optimizers = self._engine.program.optimizers if self._engine is not None else None
        return optimizers.first if optimizers is not None else None

    def parameters(self) -> Iterator[nn.Parameter]:
        """The module's own parameters."""
        return self.module.parameters()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The module's own state dict, without prefixes or entries of fastdp. Its tensors follow the training."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict into the module. All replicas have it at the next step."""
        return self.module.load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> TorchParallel:
        """Set the module's training mode."""
        self.module.train(mode)
        return self

    def eval(self) -> TorchParallel:
        """Set the module's evaluation mode."""
        return self.train(False)


class TrainStep:
    """Trains on one global batch per call. Made by `TorchParallel.train_step`."""

    def __init__(self, engine: DataParallel[TorchProgram], scope: Callable[[], Any], declared: DeclaredRows) -> None:
        self._program = engine.program
        self._engine = engine
        self._scope = scope
        self._declared = declared

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """This step's optimizer, over the module's own parameters."""
        assert self._program.optimizers is not None
        return self._program.optimizers.first

    def __call__(self, inputs: Any, *targets: Any) -> torch.Tensor:
        """Run forward, loss, backward and update on one global batch.

        Args:
            inputs: the module's input: a tensor or array with rows first, a tuple or list of several arguments,
                or a dict of keyword arguments.
            targets: further arguments of `loss_fn` after the outputs; may be nested.

        Returns:
            The loss of the whole batch before the update, a zero-dim tensor without gradient.

        The module should be in training mode, as with plain torch. A step with random draws takes one number
        from torch's global generator, so `torch.manual_seed` makes a run repeatable.

        Raises:
            ReplicaError: a replica failed; the message names device and rows. Weights are unchanged, and the
                next call works.
            ValueError: no rows, or arrays of unequal length.
        """
        args, kwargs = _arguments(inputs)
        batch = self._program.batch(args, kwargs, targets, self._declared)
        with self._scope():
            result = self._engine.train(batch, wants_outputs=False, reduce=self._program.reduces)
        self._program.calls += 1
        return self._program.loss(result)


def _arguments(inputs: Any) -> tuple[Sequence[Any], dict[str, Any]]:
    """Positional and keyword arguments of the module."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs, {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})
