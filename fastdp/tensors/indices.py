"""Which operations of torch read indices, and which range each index may have.

Kernels check their indices while they run. In a compiled kernel the check throws in the middle of a parallel region,
which ends the whole process; on a GPU it ends the CUDA context. So indices are checked before the kernels run
(`fastdp.capture.graph.indices`). This module also serves to explain such errors in any kind of step
(`fastdp.program.keras.indices`). Integer divisors are handled in the same way, since a zero among them throws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_WRAPPING = {aten.index_fill, aten.take, aten.put}
_ALONG_DIM = {
    aten.gather,
    aten.scatter,
    aten.scatter_add,
    aten.scatter_reduce,
    aten.index_select,
    aten.index_add,
    aten.index_copy,
    aten.index_reduce,
    aten.index_fill,
}
_OF_ALL = {aten.take, aten.put}
_OF_CLASSES = {aten.nll_loss_forward, aten.nll_loss2d_forward, aten.nll_loss_backward, aten.nll_loss2d_backward}
_BY_DIMENSION = {aten.index, aten.index_put, aten._index_put_impl}
_DIVISIONS = {aten.floor_divide, aten.remainder, aten.fmod, aten.div}
# Torch itself makes the indices of these operations, in the forward pass of the same step.
_OWN = {
    aten.max_pool2d_with_indices_backward,
    aten.max_pool3d_with_indices_backward,
    aten.adaptive_max_pool2d_backward,
    aten.adaptive_max_pool3d_backward,
    aten.fractional_max_pool2d_backward,
    aten.fractional_max_pool3d_backward,
    aten.value_selecting_reduction_backward,
    aten._unsafe_index,
    aten._unsafe_index_put,
    aten._unsafe_masked_index,
    aten._unsafe_masked_index_put_accumulate,
}


@dataclass(frozen=True, slots=True)
class Use:
    """Integers that an operation takes as indices or divisors, and their valid range.

    Attributes:
        value: the tensor, or the node that stands for it.
        place: the position of its argument, and its position in that argument if it is a list.
        low, high: the range, without `high`; `high` is None for a divisor, for which only 0 is wrong.
        ignored: a number outside the range that means "none".
    """

    value: Any
    place: tuple[int, int | None]
    low: int
    high: int | None
    ignored: int | None = None

    def wrong(self, value: torch.Tensor) -> torch.Tensor:
        """A bool tensor that is True where the numbers are wrong."""
        if self.high is None:
            return value == 0
        wrong = (value < self.low) | (value >= self.high)
        return wrong if self.ignored is None else wrong & (value != self.ignored)

    @property
    def expected(self) -> str:
        """The range as text."""
        if self.high is None:
            return "any but 0"
        ignored = f", or {self.ignored} for none" if self.ignored is not None else ""
        return f"{self.low} to {self.high - 1}{ignored}"


def uses(target: Any, args: Sequence[Any], value_of: Callable[[Any], Any] = lambda value: value) -> list[Use]:
    """The indices and integer divisors of an operation; most operations have none.

    Args:
        target: an overload, such as `aten.gather.default`.
        args: all arguments of the call, in the order of its schema.
        value_of: maps an entry of `args` to a value with its shape and dtype.

    Raises:
        NotImplementedError: the operation has indices whose range is not known here.
    """
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return []
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, args, strict=False))
    if packet in _DIVISIONS:
        return list(_divisors(given, names, value_of))
    if packet in _BY_DIMENSION:
        return list(_by_dimension(given, names, value_of))
    if packet in _OF_CLASSES:
        shape = value_of(given["self"]).shape
        high, ignored = shape[1 if len(shape) > 1 else 0], given.get("ignore_index", -100)
        inside = 0 <= ignored < high
        return [Use(given["target"], (names.index("target"), None), 0, high, None if inside else ignored)]
    name = "index" if "index" in given else "indices"
    if not _is_index(given.get(name), value_of) or target.namespace != "aten" or packet in _OWN:
        return []
    high = _limit(packet, given, value_of)
    if high is None:
        raise NotImplementedError(f"{target}, whose indices fastdp cannot check")
    return [Use(given[name], (names.index(name), None), -high if packet in _WRAPPING else 0, high)]


def _limit(packet: Any, given: dict[str, Any], value_of: Callable[[Any], Any]) -> int | None:
    """The number of valid indices of an operation; None if it is not known."""
    if packet is aten.embedding:
        return int(value_of(given["weight"]).shape[0])
    if packet is aten.embedding_dense_backward:
        return int(given["num_weights"])
    if packet in _OF_ALL:
        return int(value_of(given["self"]).numel())
    if packet in _ALONG_DIM:
        shape = value_of(given["self"]).shape
        return int(shape[given["dim"]]) if len(shape) else 1
    return None


def _by_dimension(given: dict[str, Any], names: list[str], value_of: Callable[[Any], Any]) -> Iterator[Use]:
    """The index tensors of `x[i, j]`, one or none per axis. A bool mask spans several axes and needs no check."""
    shape, at = value_of(given["self"]).shape, 0
    for number, index in enumerate(given["indices"]):
        if index is not None and value_of(index).dtype in (torch.bool, torch.uint8):
            at += value_of(index).ndim
            continue
        if index is not None:
            yield Use(index, (names.index("indices"), number), -shape[at], shape[at])
        at += 1


def _divisors(given: dict[str, Any], names: list[str], value_of: Callable[[Any], Any]) -> Iterator[Use]:
    """The divisor of an integer division whose quotient is an integer too."""
    other = given["other"]
    whole = [_is_index(value, value_of) or type(value) is int for value in (given["self"], other)]
    if all(whole) and _is_index(other, value_of) and ("rounding_mode" not in names or given.get("rounding_mode")):
        yield Use(other, (names.index("other"), None), 0, None)


def _is_index(value: Any, value_of: Callable[[Any], Any]) -> bool:
    """Whether this is a tensor of integers."""
    tensor = value_of(value) if value is not None else None
    return isinstance(tensor, torch.Tensor) and not (tensor.is_floating_point() or tensor.is_complex())


class CheckedOneHot(torch.overrides.TorchFunctionMode):
    """A mode in which `torch.nn.functional.one_hot` is traced with its check of the classes.

    torch's version reads the largest class on the host. It skips the check if tensors have no values, so a trace would
    turn classes that do not exist into rows of zeros.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, or its replacement."""
        if function is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """one_hot as torch computes it after its check of the classes."""
    if num_classes <= 0 or not tensor.numel():
        return torch.nn.functional.one_hot(tensor, num_classes)
    zeros = torch.zeros(*tensor.shape, num_classes, dtype=torch.int64, device=tensor.device)
    return zeros.scatter(-1, tensor.unsqueeze(-1), 1)


@dataclass(frozen=True, slots=True)
class Wrong:
    """The first index, in the order of the elements, that an operation would have refused, and its range."""

    target: Any
    use: Use
    found: int


class Watch(TorchDispatchMode):
    """Checks the indices of each operation before it runs.

    Args:
        told: called with each wrong index that the operation refuses and with the error, which it may raise.
    """

    def __init__(self, told: Callable[[Wrong, Exception], None]) -> None:
        super().__init__()
        self._told = told

    def __torch_dispatch__(self, target: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check the indices, then run the operation."""
        for use in _uses_of_call(target, args, kwargs or {}):
            wrong = use.wrong(use.value)
            if bool(wrong.any()):
                error = _error_of(target, args, kwargs or {}, use)
                if error is not None:
                    self._told(Wrong(target, use, int(use.value[wrong][0])), error)
        return target(*args, **(kwargs or {}))


def _error_of(target: Any, args: Sequence[Any], kwargs: dict[str, Any], use: Use) -> Exception | None:
    """The error of an operation for a wrong index. It is not run on a GPU, where it would end the CUDA context."""
    if not use.value.is_cpu:
        return IndexError("index out of range")
    try:
        target(*args, **kwargs)
    except (IndexError, ValueError, RuntimeError) as error:
        return error
    return None


def _uses_of_call(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Use]:
    """The indices and divisors of a call with tensors."""
    try:
        return uses(target, bound(target, args, kwargs))
    except NotImplementedError:  # the range is not known; the operation has its own check
        return []


def bound(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments of a call in the order of the schema, with their defaults."""
    schema = getattr(target, "_schema", None)
    arguments = schema.arguments[len(args) :] if schema is not None else []
    return [*args, *(kwargs.get(a.name, a.default_value if a.has_default_value() else None) for a in arguments)]
