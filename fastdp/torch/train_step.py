"""`TrainStep`: forward, loss, backward and update on one global batch per call."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastdp.engine.data_parallel import DataParallel
from fastdp.engine.step import StepResult
from fastdp.program.torch.passes import no_totals
from fastdp.program.torch.program import TorchProgram
from fastdp.program.torch.rows.declared import DeclaredRows
from fastdp.tensors.compiled import not_compiled
from fastdp.tensors.thread_state import check_around
from fastdp.torch.captured import is_observed
from fastdp.torch.resident import ResidentInputs, ResidentValues
from fastdp.torch.step_state import read_state, write_state
from fastdp.torch.train_result import TrainResult, read_result


class TrainStep:
    """Trains on one global batch per call. Made by `TorchParallel.train_step`.

    Attributes:
        result: of the latest call; None before the first. A failed call leaves it.
    """

    def __init__(
        self,
        engine: DataParallel[TorchProgram],
        scope: Callable[[], Any],
        declared: DeclaredRows,
        inputs: ResidentInputs,
        *,
        outputs: bool,
    ) -> None:
        self.result: TrainResult | None = None
        self._program = engine.program
        self._engine = engine
        self._scope = scope
        self._declared = declared
        self._inputs = inputs
        self._outputs = outputs
        self._needs_targets = _takes_targets(engine.program.loss_fn)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """This step's optimizer, over the module's own parameters.

        Raises:
            RuntimeError: it has several.
        """
        assert self._program.optimizers is not None
        return self._program.optimizers.only

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All optimizers of this step, in the order in which they update."""
        assert self._program.optimizers is not None
        return list(self._program.optimizers.all)

    @not_compiled
    def __call__(self, inputs: Any, *targets: Any) -> torch.Tensor:
        """Run forward, loss, backward and update on one global batch.

        Args:
            inputs: the module's input: a tensor or array with rows first, a tuple or list of several arguments,
                or a dict of keyword arguments. Arrays may be those of a `fastdp.data.DeviceDataset`'s batch.
            targets: further arguments of `loss_fn` after the outputs; may be nested.

        Returns:
            The loss of the whole batch before the update, a zero-dim tensor without gradient.

        The module should be in training mode, as with plain torch. Random draws come from torch's global generator, so
        `torch.manual_seed` makes a run repeatable.

        Raises:
            ReplicaError: a replica failed; the message names device and rows. Weights are unchanged, and the
                next call works.
            ValueError: no rows, arrays of unequal length, or tensors that require gradients.
            TypeError: there are no targets, and `loss_fn` takes some.
            NotImplementedError: the step is inside a mode that other threads do not see.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self(inputs, *targets)
        if not targets and self._needs_targets:
            raise TypeError(
                "A train step must get the targets that `loss_fn` takes after the outputs: step(x, y). Received: none. "
                "A `loss_fn` of outputs alone has one argument."
            )
        args, kwargs = _arguments(inputs)
        resident = self._inputs.among((args, kwargs, targets), self._engine.devices)
        if resident is not None:
            args, kwargs, targets = resident.on_host
        if self._engine.size > 1 or self._engine.devices[0].on_gpu:
            check_around(self._program.module, "A train step")
        with self._scope():
            result = self._engine.surviving(lambda: self._step(args, kwargs, targets, resident))
        self._program.calls += 1
        self.result = read_result(result, self._program.applied, outputs=self._outputs)
        return self.result.loss

    def _step(
        self, args: Sequence[Any], kwargs: dict[str, Any], targets: Sequence[Any], resident: ResidentValues | None
    ) -> StepResult:
        """Run the step on the replicas that there are. `resident` has what lies on the devices."""
        batch = self._program.batch(args, kwargs, targets, self._declared, no_graphs=True)
        with torch.enable_grad():
            batch = self._program.judge(batch, self._engine.size)
        if resident is not None:
            batch = resident.placed(batch)
        captures = self._program.captures
        if captures is not None:
            captures.prepare(batch, self._outputs, eager=is_observed())
        began = time.perf_counter()
        result = self._engine.train(batch, wants_outputs=self._outputs, reduce=self._program.reduces)
        if captures is not None:
            captures.note(time.perf_counter() - began)
        return result

    def flush(self) -> bool:
        """End a window of `accumulate` calls that was cut short, at the end of an epoch, say: update by what is there.

        As in the usual loop, the gradients are those of the losses divided by `accumulate`, also if fewer calls were
        made. The next call begins a new window. `result` is that of the latest call, with what the update tells.

        Returns:
            Whether the weights have changed. They have not if no gradients wait, or if the update was skipped.

        Raises:
            ReplicaError: the update failed. Weights are unchanged, and the gradients still wait.
        """
        program = self._program
        with self._scope():
            if not program.window.calls or not self._engine.end_window(no_totals()):
                return False
        assert program.applied is not None
        if self.result is not None:
            self.result = self.result.after(program.applied)
        return program.applied.updated

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The state of the training besides the module: with it a run goes on as if it had not been interrupted.

        Returns:
            A dict for `torch.save`, which `torch.load` reads with its default `weights_only=True`. It has the states of
            the optimizers and of the scaler, the number of calls, the place in the window of `accumulate` with the
            gradients that wait (on each device), how captured steps run, and the states of torch's generators. The
            optimizers' tensors are their own, as of torch's `state_dict`: training changes them. Everything else is a
            copy.

        Weights and buffers are in the module's `state_dict`. Schedulers, and generators of Python and NumPy, are yours.

        Example:
            >>> torch.save({"model": model.state_dict(), "step": step.state_dict()}, "checkpoint.pt")  # doctest: +SKIP
        """
        return read_state(self._engine)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was called. Also sets torch's generators.

        The number of devices may be another one. With the same number the run goes on bit for bit: captured steps run
        in the form that they had, unless the clock had not yet chosen it (`compile="inductor"` and "auto"). Tensors are
        copied.

        Args:
            state_dict: what `state_dict` of a step has returned, with the same parameters and kinds of optimizers.

        Raises:
            TypeError, ValueError: it is something else, or of a step that differs; the message names the difference.
                Nothing has changed.
        """
        write_state(self._engine, state_dict)
        self.result = None


def _takes_targets(loss_fn: Any) -> bool:
    """Whether a loss function cannot be called with outputs alone, as far as it tells."""
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
        signature.bind(None)
    except TypeError:
        return True
    except ValueError:  # functions of extensions may have no signature
        return False
    return False


def _arguments(inputs: Any) -> tuple[Sequence[Any], dict[str, Any]]:
    """Positional and keyword arguments of the module."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs, {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})
