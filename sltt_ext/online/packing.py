"""What is saved for backward, in the fewest bits.

A convolution or linear layer saves the spikes it reads, to compute its weight's gradient: 32 bits for what is one.
The neurons say which tensors are their spikes; where autograd saves one of these, or a view of it, bits are kept,
and the floats are made again when backward reads them. The float tensor is freed as soon as the forward pass is
done with it. Average pooling saves its input, and backward reads nothing but its shape: that is kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from sltt_ext.neuron import SLTTNeuron
from sltt_ext.stateless import is_average_pooling

__all__ = ["Packing", "packing"]

_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: these bits in the highest byte


@contextmanager
def packing(net: nn.Module, enabled: bool) -> Iterator[Packing]:
    """Surround a pass through time, in which `Packing.saving` packs what it saves."""
    packing = Packing()
    with ExitStack() as stack:
        for module in net.modules() if enabled else ():
            if isinstance(module, SLTTNeuron):
                stack.callback(module.register_forward_hook(packing.remember).remove)
            elif is_average_pooling(module):  # these two next to its forward, inside of all other hooks
                stack.callback(module.register_forward_pre_hook(packing.begin_average).remove)
                end = module.register_forward_hook(packing.end_average, prepend=True, always_call=True)
                stack.callback(end.remove)
        yield packing


class Packing:
    """What is known of the tensors that are being saved."""

    def __init__(self) -> None:
        self._spikes: dict[int, _Spikes] = {}
        self._averaging = False

    def saving(self) -> saved_tensors_hooks:
        """A context in which autograd saves packed tensors, whatever other hooks there are around."""
        return saved_tensors_hooks(self._pack, _unpack)

    def begin_average(self, pool: Any, inputs: Any) -> None:
        """Forward pre-hook of average pooling."""
        self._averaging = True

    def end_average(self, pool: Any, inputs: Any, output: Any) -> None:
        """Forward hook of average pooling."""
        self._averaging = False

    def remember(self, neuron: Any, inputs: Any, output: Any) -> None:
        """Forward hook of a neuron."""
        fired = neuron.spikes(output)
        if fired is None or not fired[0].requires_grad:
            return
        tensor, factor = fired
        storage = tensor.untyped_storage()
        key = id(storage)
        known = _Spikes(tensor, factor, weakref.ref(storage, lambda _: self._spikes.pop(key, None)))
        self._spikes[key] = known

    def _pack(self, tensor: Tensor) -> Any:
        if self._averaging:
            return _Shape(tensor)
        storage = tensor.untyped_storage()
        known = self._spikes.get(id(storage))
        if known is None or not known.is_still(tensor, storage):
            return tensor
        return known.pack(tensor)


class _Spikes:
    """The memory of a neuron's spikes: zeros and, for a spike, ones or ``factor``."""

    def __init__(self, tensor: Tensor, factor: Tensor | None, storage: weakref.ref[Any]) -> None:
        self.version = tensor._version
        self.dtype = tensor.dtype
        self.storage = storage
        self._factor = factor
        self._numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
        self._bits: Tensor | None = None

    def is_still(self, tensor: Tensor, storage: Any) -> bool:
        """Whether ``tensor`` is a view of these spikes, unchanged since the neuron fired them."""
        same = self.storage() is storage and self.dtype == tensor.dtype
        return same and self.version == tensor._version

    def pack(self, tensor: Tensor) -> _Saved:
        if self._bits is None:
            self._bits = pack_bits(tensor.detach().as_strided((self._numbers,), (1,), 0))
        return _Saved(self, tensor)

    def unpack(self) -> Tensor:
        assert self._bits is not None
        numbers = unpack_bits(self._bits, self._numbers, self.dtype)
        return numbers if self._factor is None else numbers.mul_(self._factor)


class _Saved:
    """One saved view of the spikes."""

    def __init__(self, spikes: _Spikes, tensor: Tensor) -> None:
        self._spikes = spikes
        self._view = (tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self) -> Tensor:
        return self._spikes.unpack().as_strided(*self._view)


class _Shape:
    """A tensor of which backward reads the shape alone."""

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._number = tensor.shape, tensor.new_zeros(())

    def unpack(self) -> Tensor:
        return self._number.expand(self._shape)


def _unpack(saved: Any) -> Tensor:
    unpacked: Tensor = saved if isinstance(saved, Tensor) else saved.unpack()
    return unpacked


def pack_bits(numbers: Tensor) -> Tensor:
    """Which of ``numbers`` ``[n]`` are not zero, eight in a byte.

    >>> pack_bits(torch.tensor([1.0, 0.0, 1.0])).tolist()
    [5]
    """
    fired = numbers.bool()
    if len(fired) % 8:
        fired = F.pad(fired, (0, -len(fired) % 8))
    gathered = fired.view(torch.int64) * _GATHER
    return gathered.view(torch.uint8)[7::8].clone(memory_format=torch.contiguous_format)


def unpack_bits(bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The zeros and ones ``[count]`` that `pack_bits` packed.

    >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 3, torch.float32)
    tensor([1., 0., 1.])
    """
    every_byte = torch.arange(256, device=bits.device).unsqueeze(1)
    bits_of = (every_byte >> torch.arange(8, device=bits.device)).bitwise_and_(1).to(dtype)
    return F.embedding(bits.int(), bits_of).flatten()[:count]  # a table: one pass over memory
