"""`TorchParallel`: a torch module whose train and predict steps run on all devices."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.utils import stateless
from torch.optim import Optimizer

from fastdp.capture.kinds import CapturesByKind
from fastdp.comm.processes import launched, several
from fastdp.engine.data_parallel import DataParallel
from fastdp.engine.make_report import make_report
from fastdp.engine.report import Report
from fastdp.options import Options, check_flag
from fastdp.program.torch.loop import LoopProgram
from fastdp.program.torch.loss import LossFunction
from fastdp.program.torch.optimizer import OptimizerFactory
from fastdp.program.torch.program import TorchProgram
from fastdp.program.torch.rows.declared import DeclaredRows
from fastdp.program.torch.update import UpdateRules
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.roster import Roster
from fastdp.tensors import pytree
from fastdp.tensors.arrays import peak_nbytes, to_tensor
from fastdp.tensors.compiled import not_compiled
from fastdp.tensors.deterministic import deterministic_algorithms
from fastdp.tensors.thread_state import check_around
from fastdp.torch.autograd import Calls
from fastdp.torch.captured import capture
from fastdp.torch.checks import check_module, check_options
from fastdp.torch.members import ModuleMembers
from fastdp.torch.plain_calls import PlainCalls
from fastdp.torch.resident import ResidentInputs, ResidentValues
from fastdp.torch.train_step import TrainStep
from fastdp.tracing.trace import Traceable

FUNCTIONAL_CALL = stateless._functional_call.__code__  # what calls a module inside torch.func.functional_call


class TorchParallel(Traceable, ModuleMembers[nn.Module]):
    """A module, run and trained on several devices as if on one. Made by `fastdp.wrap`.

    The module stays the user's own plain torch module: training changes it in place, `state_dict` is its
    own, and it works outside fastdp at any time. `TorchParallel` is not an nn.Module, so no name gets a prefix.

    Args:
        module: a module on the CPU, with all parameters initialized.
        devices: the devices of the replicas; their order is the order of the rows.
        options: the chosen options; `fastdp.wrap` explains them.

    Raises:
        ValueError: the module cannot be replicated; the message has the remedy.

    The first replica runs the module itself, the others run copies, which follow it at each step: weights, modes,
    attributes and what is in them, hooks, and functions with what they keep. Other parameters are an error.

    Example:
        >>> fastdp.set_virtual_devices(8)  # doctest: +SKIP
        >>> dp = fastdp.wrap(module, gpus=8)  # doctest: +SKIP
        >>> step = dp.train_step(F.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1))  # doctest: +SKIP
        >>> for x, y in loader:  # doctest: +SKIP
        ...     loss = step(x, y)
        >>> torch.save(dp.state_dict(), "weights.pt")  # doctest: +SKIP
    """

    _program_class: type[LoopProgram] = LoopProgram  # what runs calls

    _OWN = ModuleMembers._OWN | {
        "cpu_merge",
        "cpu_relocation",
        "_options",
        "_roster",
        "_scope",
        "_declared",
        "_engine",
        "_calls",
        "_inputs",
        "_plain",
    }

    def __init__(
        self,
        module: nn.Module,
        devices: Sequence[QueueDevice],
        options: Options,
    ) -> None:
        check_module(module)
        check_options(options, devices)
        super().__init__(module, devices)
        self.cpu_merge = options.cpu_merge
        self.cpu_relocation = options.cpu_relocation
        self._roster = Roster(self.devices, options, launched())
        self._roster.follow(self.devices)
        self._options = replace(options, cpu_relocation=False)  # a module's parameters stay with the first device
        self._scope = deterministic_algorithms if options.deterministic else nullcontext
        self._declared = DeclaredRows(module, options.rows if isinstance(options.rows, dict) else None)
        self._engine: DataParallel[TorchProgram] | None = None
        self._calls: Calls | None = None
        self._plain: PlainCalls | None = None
        self._inputs = ResidentInputs()

    def __repr__(self) -> str:
        return f"TorchParallel({type(self.module).__name__} on {[device.name for device in self.devices]})"

    # Running.

    @not_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs for a global batch, as of the module itself: part of autograd, with gradients enabled.

        Args:
            args, kwargs: the module's arguments: tensors, NumPy arrays or arrays of a `DeviceDataset`'s batch, with
                rows along the first axis, or where trials find them, in any nest of tuples, lists and dicts. Zero-dim
                tensors and plain values go to all replicas.

        Returns:
            The module's outputs for all rows in order, on the CPU; the caller owns them.

        Backward passes through the outputs run on all devices. They add the gradients of the global batch to the `grad`
        of the module's parameters, and give those of the arguments. One device, or one row, is plain torch.

        Raises:
            ReplicaError: a replica failed (also an instance of the built-in error that it failed with).
            ValueError: the batch cannot be split by rows exactly; the message has the remedies.
            NotImplementedError: the call is inside a mode that other threads do not see.
        """
        values = (args, kwargs, ())
        resident = self._inputs.among(values, self.devices)
        if resident is not None:
            values = resident.on_host
        if len(self.devices) == 1 and not several():
            return self._alone(values)
        if sys._getframe(1).f_code is FUNCTIONAL_CALL:
            raise NotImplementedError(
                "torch.func.functional_call of a parallel module: the other devices would not see the tensors that it "
                "puts in place of parameters. Call it with the module itself, model.module."
            )
        if torch.is_inference_mode_enabled():  # whose tensors, as memory of the replicas, could never be trained
            with torch.inference_mode(False), torch.no_grad():
                return self._together(values, resident, inference=True)
        return self._together(values, resident)

    forward = __call__

    def _together(
        self,
        values: tuple[tuple[Any, ...], dict[str, Any], Any],
        resident: ResidentValues | None = None,
        *,
        inference: bool = False,
    ) -> Any:
        """The outputs of all devices. `inference`: the call is in torch's inference mode."""
        check_around(self.module, "A call of a parallel module")
        args, kwargs, _ = values
        batch = TorchProgram.batch(args, kwargs, declared=self._declared)
        if batch.rows == 1:
            with torch.inference_mode() if inference else nullcontext():
                return self._alone(values)
        if self._calls is None:
            self._calls = Calls(self.module, self._roster, self._options, self._scope, self._program_class)
        calls, made, placed = self._calls, [batch], None if resident is None else resident.placed

        def once() -> Any:
            batch = made.pop() if made else TorchProgram.batch(args, kwargs, declared=self._declared)
            return calls.run(batch, values, inference=inference, placed=placed)

        return calls.engine.surviving(once)

    def rejoin_devices(self) -> list[str]:
        """Take back devices that were lost and answer again; see `on_device_loss` of `fastdp.wrap`.

        Called between steps, at the end of an epoch, say. The next step runs on them too.

        Returns:
            Their names; empty where none is back.
        """
        return self._roster.rejoin()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Does nothing: for loops that were written for DistributedDataParallel.

        There, backward passes inside leave each process with a part of the gradient until the first one outside. Here
        every backward adds the gradient of the whole batch to `p.grad`, inside as outside, so after the window `p.grad`
        is the same, and at each moment in it that of one device. It costs an all-reduce per backward.
        """
        yield

    def _alone(self, values: tuple[Any, dict[str, Any], Any]) -> Any:
        """The outputs of the module itself, by plain torch on the first device."""
        first = self.devices[0]
        if first.on_gpu and self._engine is None and self._calls is None:
            self._engine = self._predicting()  # its parameters move to the device
        if not first.on_gpu:
            if self._plain is None or self._plain.module is not self.module:
                self._plain = PlainCalls(self.module, first, self._options)
            with self._scope():
                return self._plain(*values[:2])
        args, kwargs, _ = pytree.tree_map(to_tensor, values)
        with self._scope():
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(first.torch_device), (args, kwargs))
            return pytree.tree_map_only(torch.Tensor, lambda y: y.cpu(), self.module(*args, **kwargs))

    def _predicting(self) -> DataParallel[TorchProgram]:
        """An engine for forward passes."""
        program = TorchProgram(self.module, sync_batch_norm=self._options.sync_batch_norm)
        return DataParallel(program, self._roster, options=self._options)

    def train_step(
        self,
        loss_fn: LossFunction,
        optimizer: OptimizerFactory | Optimizer | Sequence[Optimizer],
        *,
        reduction: str | None = None,
        clip_grad_norm: float | None = None,
        accumulate: int = 1,
        outputs: bool = False,
        grad_norm: bool = False,
        skip_nonfinite: bool = False,
        scaler: GradScaler | None = None,
    ) -> TrainStep:
        """Make the function that trains on one global batch.

        Args:
            loss_fn: `loss_fn(outputs, *targets)` returns one number. Any function or nn loss module. It may return
                several: a tuple or list, of which the first is trained on, or a dict with "loss" in it. The others are
                for `step.result.losses`.
            optimizer: a torch optimizer over the module's parameters; or a function that makes one from the list of
                them, which have moved to the first device; or a list of optimizers, which step in its order. They stay
                yours: whatever you change in them between two steps counts.
            reduction: None: `loss_fn` may be anything and is computed on the merged outputs (exact for contrastive
                losses, masked means). "mean" or "sum": `loss_fn` is the mean or sum over samples, and each replica
                computes its own part without waiting for the others. So are the other numbers that it returns, which
                must be tensors then. Of torch's own losses replicas compute their parts in any case (exact for class
                weights, ignore_index).
            clip_grad_norm: the largest norm of the global batch's gradient.
            accumulate: update once per `accumulate` calls, with the sum of their gradients divided by
                `accumulate`. Only the last call reduces gradients. Running statistics move in every call.
            outputs: merge the module's outputs, for `step.result.outputs`.
            grad_norm: compute the norm of the global batch's gradient, for `step.result.grad_norm`. `clip_grad_norm`
                computes it anyway.
            skip_nonfinite: leave weights and optimizer as they are, on all devices, if the loss or the gradient of the
                global batch has an infinite number or a NaN; `step.result.skipped` tells. Buffers such as running
                statistics have moved, as in plain torch. On GPUs each update then waits for the gradient.
            scaler: scales the loss before backward, for float16 under autocast. The step does what a loop does with it:
                `scale`, `unscale_`, clipping, `step` for each optimizer and `update`. It stays yours.

        Raises:
            TypeError, ValueError: an option or an optimizer cannot be used; the message has the remedy.

        Example:
            >>> step = dp.train_step(nn.CrossEntropyLoss(), torch.optim.Adam)  # doctest: +SKIP
            >>> loss = step(x, y)  # doctest: +SKIP
        """
        for name, flag in (("outputs", outputs), ("grad_norm", grad_norm), ("skip_nonfinite", skip_nonfinite)):
            check_flag(name, flag)
        program = TorchProgram(
            self.module,
            loss_fn,
            optimizer,
            reduction=reduction,
            sync_batch_norm=self._options.sync_batch_norm,
            rules=UpdateRules(clip_grad_norm, grad_norm, skip_nonfinite, scaler),
            accumulate=accumulate,
            shards_optimizer=self._options.shard_optimizer,
        )
        capture(program, self._options, self.devices)
        with torch.inference_mode(False):
            self._engine = DataParallel(program, self._roster, options=self._options)
        return TrainStep(self._engine, self._scope, self._declared, self._inputs, outputs=outputs)

    def report(self) -> Report:
        """Report how steps run, where their time goes and what uses the memory. Prints as tables.

        Covers the latest `train_step`, and calls of the module.
        """
        passes = [entry for calls in self._captured_calls() for entry in calls.report]
        engine = self._engine if self._engine is not None or self._calls is None else self._calls.engine
        steps = [{"how": "eager", "why": "no train_step yet"}]
        if engine is not None and engine.program.optimizers is not None:
            steps = engine.program.steps_report
        return make_report(engine, steps, library_nbytes=peak_nbytes, passes=passes, inputs=self._inputs.entries())

    def _is_traced(self, program: object) -> bool:
        return isinstance(program, TorchProgram) and program.module is self.module

    def _captured_calls(self) -> Iterator[CapturesByKind[Any] | PlainCalls]:
        """The captured passes of calls, without gradients and with them."""
        calls = (self._calls.captures, self._calls.loops) if self._calls is not None else ()
        yield from (one for one in calls if one is not None)
        if self._plain is not None:
            yield self._plain

    @property
    def compiling(self) -> bool:
        """Whether a step or a call is compiling in the background, or is about to be replaced by its compiled form."""
        captures = self._engine.program.captures if self._engine is not None else None
        steps = captures is not None and captures.compiling
        return steps or any(calls.compiling for calls in self._captured_calls())

    def wait_compiled(self, timeout: float | None = None) -> None:
        """Wait until no step and no call is compiling, and let compiled ones take over. Meant for benchmarks.

        Raises:
            DeviceTimeoutError: compiling took longer than `timeout` seconds; it continues.
        """
        captures = self._engine.program.captures if self._engine is not None else None
        deadline = None if timeout is None else time.monotonic() + timeout
        for one in (*((captures,) if captures is not None else ()), *self._captured_calls()):
            one.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))

    # Members of the module.

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The latest train step's optimizer, for schedulers and checkpoints; None before `train_step`.

        Raises:
            RuntimeError: it has several.
        """
        optimizers = self._engine.program.optimizers if self._engine is not None else None
        return optimizers.only if optimizers is not None else None

    def _converted(self) -> None:
        """Engines hold arrays of the dtypes that the module had."""
        self._engine = self._calls = self._plain = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchParallel:
        """A parallel module over a copy of the module, on the same devices."""
        return TorchParallel(copy.deepcopy(self.module, memo), self.devices, self._options)
