"""Activation memory, counted from the storages that operators return.

A dispatch mode sees every operator's outputs. Each storage that an operator creates is counted from then on until it is freed,
which a weak reference tells. So one counter works for CPU, CUDA and fake tensors. It counts exactly what is in use at the same
time: saved activations, states, gradients on their way, and temporaries between operators (but not those inside an operator).
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sltt_ext.forwards import LookingAtOperators

__all__ = ["ActivationMeter", "LiveStorages"]


class LiveStorages:
    """Which of the storages that were added still live, and their bytes by owner.

    A storage that is freed calls back an ``append`` written in C, and what was appended is taken off when it is asked
    for. Python code in its place could be where Ctrl-C strikes, and Python drops an exception in such a callback.
    """

    def __init__(self) -> None:
        self._living: dict[int, _Reference] = {}
        self._freed: deque[_Reference] = deque()
        self._by_owner: dict[str, int] = {}

    def __contains__(self, storage: torch.UntypedStorage) -> bool:
        self._take_off_freed()
        return id(storage) in self._living

    def add(self, storage: torch.UntypedStorage, owner: str = "") -> None:
        """Count ``storage`` from now on."""
        self._take_off_freed()
        reference = _Reference(storage, self._freed.append)
        reference.key, reference.owner, reference.size = id(storage), owner, storage.nbytes()
        self._living[reference.key] = reference
        self._by_owner[owner] = self._by_owner.get(owner, 0) + reference.size

    def remove(self, storage: torch.UntypedStorage) -> None:
        """Stop counting ``storage``."""
        if storage in self:
            self._take_off(self._living[id(storage)])

    def by_owner(self) -> dict[str, int]:
        """Bytes that live now, by owner."""
        self._take_off_freed()
        return dict(self._by_owner)

    def bytes(self) -> int:
        """Bytes that live now."""
        self._take_off_freed()
        return sum(self._by_owner.values())

    def _take_off_freed(self) -> None:
        while self._freed:
            self._take_off(self._freed.popleft())

    def _take_off(self, reference: _Reference) -> None:
        del self._living[reference.key]
        self._by_owner[reference.owner] -= reference.size


class _Reference(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage that knows what to take off."""

    __slots__ = ("key", "owner", "size")
    key: int
    owner: str
    size: int


class ActivationMeter(LookingAtOperators):
    """Counts the bytes of live storages that operators create inside the ``with`` block.

    Storages from before the block (parameters, the input) do not count.

    Attributes:
        live_bytes: Bytes that live now.
        peak_bytes: The most bytes that lived at the same time.

    Examples:
        >>> import torch
        >>> with ActivationMeter() as meter:
        ...     y = torch.ones(1000) + 1
        >>> meter.live_bytes, meter.peak_bytes
        (4000, 8000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._storages = LiveStorages()

    @property
    def live_bytes(self) -> int:
        """Bytes that live now."""
        return self._storages.bytes()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(outputs):
            if id(storage) not in given and storage not in self._storages:
                self._storages.add(storage)
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return outputs

    def exclude(self, tensor: Tensor) -> None:
        """Stop counting the memory of ``tensor``."""
        self._storages.remove(tensor.untyped_storage())


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    # sparse tensors are seen as the dense ones that they are made of
    return [
        leaf.untyped_storage()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided
    ]
