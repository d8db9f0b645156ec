"""The counters of batch norms, ``num_batches_tracked``, updated by one operator for a whole pass.

Each norm in training adds 1 to its counter whenever it runs. During a pass Python counts, and a tensor stands in for the
counter. The counter is updated as soon as anybody reads it, and at the end of the pass. A norm without ``momentum`` reads its
counter at every step, and is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from sltt_ext.online.compiled import eager_modules
from sltt_ext.online.distributed import is_distributed
from sltt_ext.online.launching import pays_off
from sltt_ext.online.passes import Pass, SpeedUp
from sltt_ext.time_invariant import is_counting_batch_norm

__all__ = ["CountedAtEnd"]

_NAME = "num_batches_tracked"


class CountedAtEnd(SpeedUp):
    """Counts the batches of one pass."""

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Stand in for the counters."""
        counters: dict[int, _Counter] = {}
        one.replaced.at_end(partial(_bring_up_to_date, counters.values()))
        leaves_alone = torch.is_inference_mode_enabled() or is_distributed(one.net)
        for module in () if leaves_alone else eager_modules(one.net):
            if is_counting_batch_norm(module) and module.momentum is not None:
                tensor = module._buffers.get(_NAME)
                if type(tensor) is Tensor and pays_off(tensor) and not tensor.is_inference():
                    counter = counters.setdefault(id(tensor), _Counter.of(tensor))
                    one.replaced.at_end(partial(_give_back, module._buffers, counter))
                    module._buffers[_NAME] = counter
        yield


def _give_back(buffers: dict[str, Tensor | None], counter: _Counter) -> None:
    """The norm's own counter, unless it was given another one meanwhile."""
    if buffers.get(_NAME) is counter:
        buffers[_NAME] = counter.counted


def _bring_up_to_date(counters: Iterable[_Counter]) -> None:
    by_device: dict[torch.device, tuple[list[Tensor], list[int]]] = {}
    for counter in counters:
        number, counter.waiting = counter.waiting, 0
        if number:
            tensors, numbers = by_device.setdefault(counter.counted.device, ([], []))
            tensors.append(counter.counted)
            numbers.append(number)
    for tensors, numbers in by_device.values():
        torch._foreach_add_(tensors, numbers)


class _Counter(Tensor):
    """A counter that counts in Python, for as long as nobody reads it.

    Attributes:
        counted: The tensor that it stands in for.
        waiting: What is to be added to that.
    """

    counted: Tensor
    waiting: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Counter:
        """What stands in for ``tensor``."""
        counter = tensor.as_subclass(cls)
        counter.counted, counter.waiting = tensor, 0
        return counter

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.add_ and not kwargs and type(args[0]) is cls and type(args[1]) is int:
            args[0].waiting += args[1]
            return args[0]
        _bring_up_to_date(leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is cls)
        args, kwargs = tree_map_only(cls, lambda counter: counter.counted, (args, kwargs or {}))
        return func(*args, **kwargs)
