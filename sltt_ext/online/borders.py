"""What one block of a network hands to the next, for all calls of a pass: the values, in the fewest bits, and their gradients.

Spikes are kept as one bit for each number. A sum of spikes, as in a SEW ResNet, takes as many bits as its largest number
needs. Anything else is kept as it is. If a value is the same at every step (that of a time-invariant stem), it is kept as one
tensor, and its gradient as one sum.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

from sltt_ext.errors import ConfigurationError
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.online.chain import module_of
from sltt_ext.online.packing import pack_bits, unpack_bits

__all__ = ["Border", "Samples", "levels"]

_MOST = 15  # numbers up to here are kept as bits
_SAME_NUMBERS = {
    "flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "max_pool1d", "max_pool2d",
    "max_pool3d", "boolean_dispatch",
}  # fmt: skip
_SAME_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)

Levels = tuple[int, Tensor | None]
"""Whole numbers up to the first, each times the second (None: 1)."""


def levels(node: fx.Node) -> Levels | None:  # noqa: PLR0911
    """Which numbers the value of a node may be; None where that is not known."""
    inputs = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if node.op == "call_module":
        module = module_of(node)
        if module is None or module._forward_hooks or torch.nn.modules.module._global_forward_hooks:
            return None
        if isinstance(module, SLTTNeuron):
            return _of_neuron(module, None)
        if isinstance(module, _SAME_MODULES) and not getattr(module, "return_indices", False):
            return levels(inputs[0]) if len(inputs) == 1 else None
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target is operator.getitem and inputs[0].op == "call_module":
        module, place = module_of(inputs[0]), node.args[1]
        if isinstance(module, SLTTNeuron) and isinstance(place, int) and not module._forward_hooks:
            return _of_neuron(module, place)
        return None
    if name in ("add", "iadd", "mul", "imul") and len(inputs) == 2 and not node.kwargs:
        first, second = levels(inputs[0]), levels(inputs[1])
        if first is None or second is None or first[1] is not None or second[1] is not None:
            return None
        most = first[0] + second[0] if "add" in name else first[0] * second[0]
        return (most, None) if most <= _MOST else None
    if name in _SAME_NUMBERS and len(inputs) == 1:
        return levels(inputs[0])
    return None


def _of_neuron(module: SLTTNeuron, place: int | None) -> Levels | None:
    """What a neuron returns, or what is at a place of the tuple that it returns."""
    given: Any = torch.zeros(0) if place is None else tuple(torch.zeros(0) for _ in range(max(place, 0) + 3))
    fired = module.spikes(given)
    whole = given if place is None else given[place]
    return (1, fired[1]) if fired is not None and fired[0] is whole else None


@dataclass(frozen=True)
class Samples:
    """A part of a batch.

    Attributes:
        axis: Where the batch is.
        start: Its first sample.
        stop: The sample after its last one.
        batch: How many samples the batch has.
    """

    axis: int
    start: int
    stop: int
    batch: int

    def of(self, value: Tensor) -> Tensor:
        """This part of a value."""
        return value.narrow(self.axis, self.start, self.stop - self.start)

    def whole(self, value: Tensor) -> Tensor:
        """A value of the whole batch, of zeros, like one of a part."""
        shape = list(value.shape)
        shape[self.axis] = self.batch
        return value.new_zeros(shape)


class Border:
    """The values between two blocks, of all calls of a pass, each by the step that its call begins with.

    Args:
        name: What the value is called.
        levels: Tells which numbers it may be; None for any.
        wants_gradient: Whether anything before it wants a gradient.
        may_be_same: Whether the value may be the same at all steps: equal values are then one.
    """

    def __init__(
        self, name: str, levels: Callable[[], Levels | None], wants_gradient: bool, may_be_same: bool = False
    ) -> None:
        self.name = name
        self.wants_gradient = wants_gradient
        self._may_be_same = may_be_same
        self.gathers = False
        self._levels = levels
        self._values: dict[int, list[_Packed | _AsItIs]] = {}  # one for each part of the batch
        self._gradients: dict[int, Tensor] = {}

    def put(self, start: int, value: Any, samples: Samples | None = None) -> None:
        """Keep the value of a call, for the batch or the next part of it.

        Raises:
            ConfigurationError: If it is no tensor.
        """
        if not isinstance(value, Tensor):
            raise ConfigurationError(
                f"blocks= has a border at {self.name!r}, whose value is a {type(value).__name__}, not a tensor: name other blocks"
            )
        value = value.detach()
        first = next(iter(self._values.values()), [None])[0]
        if (
            self._may_be_same
            and isinstance(first, _AsItIs)
            and start not in self._values
            and first.equals(value)
        ):
            self._values[start] = [first]
            return
        known = self._levels() if value.is_floating_point() and value.layout is torch.strided else None
        self._axis = 0 if samples is None else samples.axis
        self._values.setdefault(start, []).append(_AsItIs(value) if known is None else _Packed(value, *known))

    def value(self, start: int) -> Tensor:
        """The value of a call.

        Raises:
            ConfigurationError: If the block that reads it has changed it in place.
        """
        parts = self._values[start]
        if any(isinstance(part, _AsItIs) and part.is_changed() for part in parts):
            raise ConfigurationError(
                f"blocks= has a border at {self.name!r}, whose value the next layers change in place: make them compute out of "
                "place (inplace=False, x = x + y), or name other blocks"
            )
        values = [part.value() for part in parts]
        return values[0] if len(values) == 1 else torch.cat(values, self._axis)

    def enter(
        self,
        start: int,
        token: Tensor,
        last: bool,
        fired: Callable[[Tensor, Tensor | None], None],
        samples: Samples | None,
    ) -> Tensor:
        """The value of a call as the next block reads it, whose gradient comes back here.

        Args:
            start: The first step of the call.
            token: A leaf, by which autograd knows that a gradient is wanted.
            last: Whether nobody reads it again.
            fired: Told of a value that is spikes.
            samples: The part of the batch that is read; None for all.
        """
        value, kept = self.value(start), self._values[start][0]
        if samples is not None:
            value = samples.of(value) if isinstance(kept, _AsItIs) else samples.of(value).clone()
        if last:
            del self._values[start]
        if not (self.wants_gradient and torch.is_grad_enabled()):
            return value
        holder = [value]
        del value
        entered: Tensor = _Enter.apply(token, holder, partial(self._add, start, samples))
        if isinstance(kept, _Packed) and kept.most == 1:
            fired(entered, kept.factor)
        return entered

    def starts(self) -> list[int]:
        """The first steps of the calls whose values are kept."""
        return list(self._values)

    def forget(self) -> None:
        """Let go of all values and gradients."""
        self._values, self._gradients = {}, {}

    @property
    def is_static(self) -> bool:
        """Whether all calls have one tensor."""
        kept = [part for parts in self._values.values() for part in parts]
        first = kept[0] if kept else None
        return len(kept) > 1 and isinstance(first, _AsItIs) and all(map(first.is_same, kept))

    def gather(self) -> None:
        """Have the gradients of all calls added up as they come, since their values are one tensor."""
        self.gathers = True

    def gradient(self, start: int, samples: Samples | None) -> Tensor | None:
        """The gradient of the value of a call, or of all calls; it is no longer kept once the last samples have theirs."""
        start = 0 if self.gathers else start
        if samples is None:
            return self._gradients.pop(start, None)
        whole = self._gradients.get(start)
        if samples.stop == samples.batch:
            self._gradients.pop(start, None)
        return None if whole is None else samples.of(whole)

    def _add(self, start: int, samples: Samples | None, gradient: Tensor) -> None:
        start = 0 if self.gathers else start
        if samples is not None:
            if start not in self._gradients:
                self._gradients[start] = samples.whole(gradient)
            samples.of(self._gradients[start]).add_(gradient)
            return
        before = self._gradients.get(start)
        if before is None:
            # what autograd gives may be used elsewhere, too: only a sum is our own
            self._gradients[start] = gradient.clone() if self.gathers else gradient
        else:
            before.add_(gradient)


class _AsItIs:
    """A value in its own memory."""

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._version = _version(value)

    def is_changed(self) -> bool:
        return _version(self._value) != self._version

    def equals(self, value: Tensor) -> bool:
        """Whether a value has the same numbers; they are read only where it is in other memory."""
        if self.is_same(_AsItIs(value)):
            return True
        alike = self._value.shape == value.shape and self._value.dtype == value.dtype
        return alike and (isinstance(value, FakeTensor) or torch.equal(self._value, value))

    def is_same(self, other: Any) -> bool:
        mine = self._value
        if not isinstance(other, _AsItIs) or mine.layout is not torch.strided:
            return False
        theirs = other._value
        return (
            mine.untyped_storage()._cdata == theirs.untyped_storage()._cdata
            and (mine.shape, mine.stride(), mine.storage_offset())
            == (theirs.shape, theirs.stride(), theirs.storage_offset())
            and self._version == other._version
        )

    def value(self) -> Tensor:
        return self._value.detach()


class _Packed:
    """Small whole numbers as bits: one plane for each binary digit."""

    def __init__(self, value: Tensor, most: int, factor: Tensor | None) -> None:
        self.most, self.factor = most, factor
        self._dtype, self._shape = value.dtype, value.shape
        if not _is_dense(value):
            value = value.contiguous()
        self._stride = value.stride()
        numbers = value.as_strided((value.numel(),), (1,), value.storage_offset())
        if most == 1:
            self._planes = [pack_bits(numbers)]
        else:
            whole = numbers.to(torch.uint8)
            self._planes = [pack_bits(whole >> digit & 1) for digit in range(most.bit_length())]

    def value(self) -> Tensor:
        count = self._shape.numel()
        numbers = unpack_bits(self._planes[0], count, self._dtype)
        for digit, plane in enumerate(self._planes[1:], 1):
            numbers.add_(unpack_bits(plane, count, self._dtype), alpha=2**digit)
        if self.factor is not None:
            numbers.mul_(self.factor)
        return numbers.as_strided(self._shape, self._stride)


def _is_dense(value: Tensor) -> bool:
    """Whether a tensor's numbers fill its memory from its first on, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


class _Enter(torch.autograd.Function):
    """A value that comes from a border; its gradient goes back there."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, holder: list[Tensor], back: Callable[[Tensor], None]) -> Tensor:
        ctx.back = back
        return holder.pop()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.back(gradient)
        return None, None, None
