"""The members of the module that `TorchParallel` has too, so that loops need not say `.module`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from fastdp.runtime.queue import QueueDevice

_PREFIX = "module."  # what DataParallel and DistributedDataParallel put in front of every name that they save
ModuleT = TypeVar("ModuleT", bound=nn.Module)
SelfT = TypeVar("SelfT", bound="ModuleMembers[Any]")


class ModuleMembers(Generic[ModuleT]):
    """Whatever is asked of a parallel module and is not its own is asked of the user's module, and set there.

    A method of the module that is reached this way (`model.generate(x)`) is the module's own: it runs on one device.

    Args:
        module: the user's own.
        devices: the devices of its replicas.
    """

    # The attributes of the parallel module itself. All others are the module's.
    _OWN: frozenset[str] = frozenset(("module", "devices"))

    module: ModuleT
    devices: list[QueueDevice]

    def __init__(self, module: ModuleT, devices: Sequence[QueueDevice]) -> None:
        self.module = module
        self.devices = list(devices)

    # Attributes.

    def __getattr__(self, name: str) -> Any:
        """An attribute of the module, since this object has none of that name."""
        if name in self._OWN or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return getattr(self.module, name)
        except AttributeError as error:
            kind = type(self.module).__name__
            raise AttributeError(f"Neither {type(self).__name__} nor its module ({kind}) has {name!r}.") from error

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the module, where it has an effect."""
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute of the module."""
        delattr(self.module, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.module)})

    # What Python looks up on the class alone. A class that has `__len__` is asked for its truth by it.

    def __len__(self) -> int:
        return len(self._with("__len__"))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._with("__iter__"))

    def __getitem__(self, key: Any) -> Any:
        return self._with("__getitem__")[key]

    def __contains__(self, item: object) -> bool:
        return item in self._with("__contains__", "__iter__")

    def __bool__(self) -> bool:
        return bool(self.module)

    def _with(self, *names: str) -> Any:
        """The module, which has one of these methods.

        Raises:
            TypeError: it has none, as of the module itself.
        """
        kind = type(self.module)
        if not any(hasattr(kind, name) for name in names):
            raise TypeError(f"The module {kind.__name__} of a {type(self).__name__} has no {names[0]}.")
        return self.module

    # Parts, parameters and buffers: the module's own, under the module's own names.

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The module's own parameters, for an optimizer."""
        return self.module.parameters(recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's own parameters with their names."""
        return self.module.named_parameters(*args, **kwargs)

    def buffers(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """The module's own buffers."""
        return self.module.buffers(recurse)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The module's own buffers with their names."""
        return self.module.named_buffers(*args, **kwargs)

    def modules(self) -> Iterator[nn.Module]:
        """The module and all of its parts."""
        return self.module.modules()

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The module and all of its parts with their names."""
        return self.module.named_modules(*args, **kwargs)

    def children(self) -> Iterator[nn.Module]:
        """The module's direct parts."""
        return self.module.children()

    # Modes.

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self.module.training

    def train(self: SelfT, mode: bool = True) -> SelfT:
        """Set the module's training mode."""
        self.module.train(mode)
        return self

    def eval(self: SelfT) -> SelfT:
        """Set the module's evaluation mode."""
        return self.train(False)

    def requires_grad_(self: SelfT, requires_grad: bool = True) -> SelfT:
        """Freeze the module's parameters, or train them."""
        self.module.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the module's parameters."""
        self.module.zero_grad(set_to_none)

    def apply(self: SelfT, fn: Callable[[nn.Module], object]) -> SelfT:
        """Call `fn` with each part of the module, and with the module."""
        self.module.apply(fn)
        return self

    # Devices and dtypes.

    def to(self: SelfT, *args: Any, **kwargs: Any) -> SelfT:
        """Convert the module's parameters and buffers to a dtype; arguments as of `torch.nn.Module.to`.

        A device changes nothing. It may be the host, where a module is built, or the kind of the replicas' devices.
        After a conversion make optimizers and train steps anew.

        Raises:
            ValueError: another device, or a memory format.
        """
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        kinds = {"cpu", *(one.torch_device.split(":")[0] for one in self.devices)}
        if device is not None and device.type not in kinds:
            raise ValueError(
                f"`to` must get a dtype, or a device of the kind that the replicas run on ({sorted(kinds)}). "
                f"Received: {device}. Choose the devices when you wrap the module: fastdp.wrap(module, gpus=...)."
            )
        if memory_format not in (None, torch.preserve_format):
            raise ValueError(
                f"`to` cannot change the memory format of parameters, which lie in one flat array. Received: "
                f"{memory_format}. Give the inputs that format: x.to(memory_format={memory_format})."
            )
        if dtype is not None:
            self.module.to(dtype)
            self._converted()
        return self

    def cpu(self: SelfT) -> SelfT:
        """As `to("cpu")`."""
        return self.to("cpu")

    def cuda(self: SelfT, device: Any = None) -> SelfT:
        """As `to("cuda")`. The devices are those of `fastdp.wrap`."""
        return self.to(
            "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device
        )

    def half(self: SelfT) -> SelfT:
        """As `to(torch.float16)`."""
        return self.to(torch.float16)

    def bfloat16(self: SelfT) -> SelfT:
        """As `to(torch.bfloat16)`."""
        return self.to(torch.bfloat16)

    def float(self: SelfT) -> SelfT:
        """As `to(torch.float32)`."""
        return self.to(torch.float32)

    def double(self: SelfT) -> SelfT:
        """As `to(torch.float64)`."""
        return self.to(torch.float64)

    def _converted(self) -> None:
        """Called when the module's tensors have another dtype."""

    # Files.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The module's own state dict, without prefixes or entries of fastdp. Its tensors follow the training."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict into the module. All replicas have it at the next step.

        The names may all begin with "module.", as in files of DataParallel and DistributedDataParallel.

        Args, result and errors: as of `torch.nn.Module.load_state_dict`.
        """
        own = self.module.state_dict(keep_vars=True)
        if state_dict and _all_prefixed(state_dict) and not (own and _all_prefixed(own)):
            state_dict = copy.copy(state_dict)  # with its metadata, an attribute
            if hasattr(state_dict, "_metadata"):
                state_dict._metadata = copy.copy(state_dict._metadata)
            consume_prefix_in_state_dict_if_present(state_dict, _PREFIX)
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: devices are not part of a file."""
        raise TypeError(
            f"A {type(self).__name__} cannot be pickled, since its devices are those of this process. Save "
            "model.state_dict(), or the module: torch.save(model.module, path)."
        )


def _all_prefixed(names: Mapping[str, Any]) -> bool:
    return all(name.startswith(_PREFIX) for name in names)
