"""What is saved for backward, in the fewest bits.

A convolution or linear layer saves the spikes that it reads, to compute the gradient of its weight. This takes 32 bits for
each one-bit spike. The neurons tell which tensors are their spikes. If autograd saves one of these tensors, or a view of it,
only bits are kept, and the floats are made again when backward reads them. The float tensor is freed as soon as the forward
pass is done with it. Some neurons carry, for their own backward, the potential from which they have fired. Then even the bits
are not needed: the spikes are made again from that potential. Average pooling saves its input, but backward reads only its
shape: so the shape is kept.

What is kept never holds the tensor that autograd saves, but another tensor on the same memory, because a node that saves its
own output would keep itself alive. It also remembers the version of the tensor: autograd checks that nobody has changed what
backward reads, but leaves this check to anyone who saves something else.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from sltt_ext.forwards import Layer
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.online.compiled import eager_modules
from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.time_invariant import is_average_pooling

__all__ = ["PackedSpikes", "leave_saving_contexts", "others_save"]

_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: these bits in the highest byte


class PackedSpikes(SpeedUp):
    """Packs what the calls of one pass save.

    Args:
        enabled: False saves everything as it is.

    Attributes:
        has_packed: Whether there was anything to pack.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self.has_packed = False
        self._spikes: dict[int, _Spikes] = {}
        self._freed: deque[_Storage] = deque()
        self._tables = _Tables()
        self._averaging = 0
        self._asked = False  # to pack something
        self._call: Call | None = None

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Stand next to the forward of neurons and average poolings, inside of all hooks."""
        one.replaced.if_cut_short(self._stop_saving)
        for module in eager_modules(one.net) if self._enabled else ():
            if isinstance(module, SLTTNeuron):
                one.replaced.forward(module, Layer.OWN, self._fire)
            elif is_average_pooling(module):
                one.replaced.forward(module, Layer.OWN, self._average)
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Pack what a call saves, if its graph is kept."""
        self._call = call
        if not (self._enabled and call.keeps_graph):
            yield
            return
        with self.saving():
            yield

    def saving(self) -> AbstractContextManager[Any]:
        """A context in which autograd saves packed tensors, whatever other hooks there are around."""
        return saved_tensors_hooks(self._pack, _unpack)

    def _stop_saving(self) -> None:
        """Leave the contexts that an interrupt has kept from ending."""
        leave_saving_contexts(self._is_asked)

    def _is_asked(self) -> bool:
        asked, self._asked = self._asked, False
        return asked

    def _average(self, pool: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._averaging += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self._averaging -= 1

    def _fire(self, neuron: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        fired = neuron.spikes(output)
        if fired is not None:
            spikes, factor = fired
            self.fired(spikes, factor, neuron.potential(output) if spikes.requires_grad else None)
        return output

    def fired(self, spikes: Tensor, factor: Tensor | None, potential: tuple[Any, ...] | None = None) -> None:
        """Take note of a tensor of zeros and, for a spike, ones or ``factor``; ``potential`` is what it can be made of again."""
        if not (self._enabled and spikes.requires_grad):
            return
        while self._freed:
            freed = self._freed.popleft()
            if (known := self._spikes.get(freed.key)) is not None and known.storage is freed:
                del self._spikes[freed.key]
        storage = _Storage(
            spikes.untyped_storage(), self._freed.append
        )  # no code that an interrupt could hit
        storage.key = id(spikes.untyped_storage())
        source = None if potential is None else _Potential(*potential)
        self._spikes[storage.key] = _Spikes(spikes, factor, storage, self._call, source, _Bits(self._tables))

    def _pack(self, tensor: Tensor) -> _Saved:
        self._asked = True
        if self._averaging:
            self.has_packed = True
            return _Shape(tensor)
        if tensor.layout is not torch.strided:
            return _AsItIs(tensor)
        storage = tensor.untyped_storage()
        known = self._spikes.get(id(storage))
        if known is None or not known.is_still(tensor, storage):
            return _AsItIs(tensor)
        self.has_packed = True
        return known.pack(tensor, self._call)


def others_save() -> bool:
    """Whether hooks of the user's own may say how autograd saves tensors: those of a call would take their place.

    Older releases of torch do not tell.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def leave_saving_contexts(is_asked: Callable[[], bool]) -> None:
    """Leave contexts that an interrupt has kept from ending: those in which a tensor is still given to their hook.

    Args:
        is_asked: Whether the hook has been called since it was asked last.
    """
    is_asked()
    while True:
        with torch.enable_grad():
            torch.zeros((), requires_grad=True).exp()
        if not is_asked():
            return
        torch._C._autograd._pop_saved_tensors_default_hooks()


class _Saved:
    """What is kept in the place of a tensor that autograd saves."""

    def unpack(self) -> Tensor:
        """The tensor, or one that is equal."""
        raise NotImplementedError


class _Storage(weakref.ref[torch.UntypedStorage]):
    """A weak reference to the memory of some spikes, and where it is found in the list of all of them."""

    __slots__ = ("key",)
    key: int


class _Spikes:
    """The memory of a neuron's spikes: zeros and, for a spike, ones or ``factor``."""

    def __init__(
        self,
        tensor: Tensor,
        factor: Tensor | None,
        storage: _Storage,
        call: Call | None,
        source: _Potential | None,
        bits: _Bits,
    ) -> None:
        self.version = tensor._version
        self.dtype = tensor.dtype
        self.storage = storage
        self._factor = factor
        self._numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
        self._call = call
        self._source = source
        self._bits = bits

    def is_still(self, tensor: Tensor, storage: Any) -> bool:
        """Whether ``tensor`` is a view of these spikes, unchanged since the neuron fired them."""
        same = self.storage() is storage and self.dtype == tensor.dtype
        return same and self.version == tensor._version

    def pack(self, tensor: Tensor, call: Call | None) -> _View:
        """What is kept of a view in ``call``: the potential is written over after the one in which the neuron fired."""
        if self._source is not None and call is self._call:
            return _View(self, self._source, tensor)
        self._bits.keep(tensor, self._numbers)
        return _View(self, self._bits, tensor)

    def unpack(self, source: _Bits | _Potential) -> Tensor:
        numbers = source.fired(self._numbers, self.dtype)
        return numbers if self._factor is None else numbers.mul_(self._factor)


class _Bits:
    """Spikes as bits.

    Args:
        tables: Of the pass.
    """

    def __init__(self, tables: _Tables) -> None:
        self._tables = tables
        self._bits: Tensor | None = None

    def keep(self, tensor: Tensor, numbers: int) -> None:
        """Keep the memory of ``tensor``, so many numbers."""
        if self._bits is None:
            self._bits = pack_bits(tensor.detach().as_strided((numbers,), (1,), 0))

    def fired(self, numbers: int, dtype: torch.dtype) -> Tensor:
        """Zeros and ones."""
        assert self._bits is not None
        return unpack_bits(self._bits, numbers, dtype, self._tables.of(self._bits.device, dtype))


class _Potential:
    """Spikes as what is at least ``threshold`` in ``h``, which is kept by the neuron anyway.

    Args:
        h: In the order that the spikes have in memory.
        threshold: Where the neuron fires.
    """

    def __init__(self, h: Tensor, threshold: float) -> None:
        self._h = _AsItIs(h)
        self._threshold = threshold

    def fired(self, numbers: int, dtype: torch.dtype) -> Tensor:
        """Zeros and ones."""
        h = self._h.unpack()
        h = h.as_strided((numbers,), (1,), h.storage_offset())
        return torch.ge(h, self._threshold, out=torch.empty_like(h, dtype=dtype))


class _Tables:
    """The eight numbers that each byte stands for, made once a pass: for each stream, as none waits for another."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def of(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The table ``[256, 8]``."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        if (table := self._made.get((device, dtype, stream))) is None:
            table = self._made[device, dtype, stream] = table_of_bits(device, dtype)
        return table


class _View(_Saved):
    """One view of the spikes."""

    def __init__(self, spikes: _Spikes, source: _Bits | _Potential, tensor: Tensor) -> None:
        self._spikes = spikes
        self._source = source
        self._view = (tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self) -> Tensor:
        return self._spikes.unpack(self._source).as_strided(*self._view)


class _AsItIs(_Saved):
    """A tensor in its own memory, with autograd's check that it is unchanged."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._version = tensor._version

    def unpack(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of "
                f"shape {list(self._tensor.shape)} is at version {self._tensor._version}; expected version {self._version} "
                "instead"
            )
        return self._tensor


class _Shape(_Saved):
    """A tensor of which backward reads the shape alone."""

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._number = tensor.shape, tensor.new_zeros(())

    def unpack(self) -> Tensor:
        return self._number.expand(self._shape)


def _unpack(saved: _Saved) -> Tensor:
    return saved.unpack()


def pack_bits(numbers: Tensor) -> Tensor:
    """Which of ``numbers`` ``[n]`` are not zero, eight in a byte.

    Examples:
        >>> pack_bits(torch.tensor([1.0, 0.0, 1.0])).tolist()
        [5]
    """
    fired = numbers.bool()
    if len(fired) % 8:
        fired = F.pad(fired, (0, -len(fired) % 8))
    gathered = fired.view(torch.int64) * _GATHER
    return gathered.view(torch.uint8)[7::8].clone(memory_format=torch.contiguous_format)


def table_of_bits(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The eight zeros and ones that each byte stands for, ``[256, 8]``."""
    every_byte = torch.arange(256, device=device).unsqueeze(1)
    return (every_byte >> torch.arange(8, device=device)).bitwise_and_(1).to(dtype)


def unpack_bits(bits: Tensor, count: int, dtype: torch.dtype, table: Tensor | None = None) -> Tensor:
    """The zeros and ones ``[count]`` that `pack_bits` packed; ``table`` is that of `table_of_bits`.

    Examples:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 3, torch.float32)
        tensor([1., 0., 1.])
    """
    table = table_of_bits(bits.device, dtype) if table is None else table
    return F.embedding(bits.int(), table).flatten()[:count]  # a table: one pass over memory
