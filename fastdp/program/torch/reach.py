"""Says which objects, attributes and functions a torch module's step reads: rules for `fastdp.capture.reach`."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributions import Distribution
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from fastdp.capture.reach import Reach, Rules
from fastdp.capture.watch import Watch

# What `nn.Module.__init__` sets and a call reads: tables of parts, and hooks.
TABLES = ("_parameters", "_buffers", "_modules")
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_READ = {"training", *TABLES, *HOOKS}
UNREAD = frozenset(vars(nn.Module())) - _READ  # for saving and loading
GLOBAL_HOOKS = tuple(
    getattr(torch_module, name)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
        "_global_forward_hooks_always_called",
        "_global_forward_hooks_with_kwargs",
    )
)


class TorchRules(Rules):
    """Rules for objects of torch's that the walk enters, and the user's."""

    unread = (RemovableHandle,)

    def looks_into(self, cls: type) -> bool:
        """Enter instances of torch's modules, and what a loss may read: rates, epochs, distributions."""
        return super().looks_into(cls) or issubclass(cls, (nn.Module, Optimizer, LRScheduler, Distribution))

    def name_of(self, value: Any, what: str) -> str:
        """The name of a module's part without the tables that it was found in."""
        return what.replace("._modules", "").replace("._parameters", "").replace("._buffers", "")

    def read_names(self, value: Any, names: Iterable[str]) -> Iterable[str]:
        """All attributes of a module but those that only saving and loading read; the groups of an optimizer."""
        if isinstance(value, Optimizer):
            return [name for name in names if name in ("param_groups", "defaults")]
        return [name for name in names if name not in UNREAD] if isinstance(value, nn.Module) else names

    def has_further_attributes(self, value: Any) -> bool:
        """True for an optimizer, to which schedulers and profilers add."""
        return isinstance(value, Optimizer)

    def unread_methods(self, cls: type) -> Iterable[str]:
        """A module is made before it is trained."""
        return ("__init__",) if issubclass(cls, nn.Module) else ()

    def functions(self, cls: type) -> Iterable[str]:
        """The functions of torch's modules that a call may reach."""
        if not issubclass(cls, nn.Module) or cls is nn.Module:
            return ()
        return [
            name for name, one in vars(cls).items() if isinstance(one, types.FunctionType) and not name.startswith("__")
        ]


def reach_of(watch: Watch, inputs: Iterable[Any]) -> Reach:
    """A walk over modules, loss functions and what they hold. The parameters and buffers among `inputs` are given.

    Args:
        watch: gets all that is found, and torch's hooks on all modules.
        inputs: tensors whose values are inputs of the step, such as the module's parameters.
    """
    for hooks in GLOBAL_HOOKS:
        watch.values({"": hooks}, [""], "global hooks of torch.nn")
    return Reach(watch, inputs, TorchRules())
