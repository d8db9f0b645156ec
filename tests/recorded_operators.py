"""A CUDA graph without a device: operators are recorded once, and run again on the same tensors, without any Python between them.

As in a graph, a replay reads and writes the memory that the recording read and wrote, and what is recorded is executed by
replays only: what the recording itself has changed in the network is put back.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sltt_ext.online.cuda_graphs import Captured
from sltt_ext.online.snapshot import Snapshot


class RecordedOperators:
    """A `GraphBackend` on the CPU.

    Args:
        net: The network, which has to be as it was after a recording.

    Attributes:
        replays: How often a recording was replayed.
    """

    device_type = "cpu"

    def __init__(self, net):
        self.net = net
        self.replays = 0
        self.generators = []

    def aside(self, device):
        return nullcontext()

    def capture(self, run, generators, device):
        self.generators.append(list(generators))
        before = Snapshot(self.net)
        try:
            with _Recording() as recording:
                outputs = run()
        finally:
            before.restore()
        recording.forget()

        def replay():
            self.replays += 1
            recording.replay()

        return Captured(outputs, replay)


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self._operators = []
        self._made = []

    @torch.no_grad()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        given = _aliases((args, kwargs or {}))
        returned = func(*args, **(kwargs or {}))
        self._operators.append((func, given, _aliases(returned)))
        own = {tensor.untyped_storage().data_ptr() for tensor in _tensors(given)}
        self._made += [
            tensor
            for tensor in _tensors(self._operators[-1][2])
            if tensor.untyped_storage().data_ptr() not in own
        ]
        return returned

    def forget(self):
        """All that was computed: what no replay has written yet, nobody may read."""
        for tensor in self._made:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)

    @torch.no_grad()
    def replay(self):
        for func, given, returned in self._operators:
            args, kwargs = _aliases(given)
            again = func(*args, **kwargs)
            for kept, tensor in zip(_tensors(returned), _tensors(again), strict=True):
                if kept.data_ptr() != tensor.data_ptr():
                    kept.data.copy_(tensor)


def _aliases(value):
    """The same memory, in the shape that it has now: operators such as ``unsqueeze_`` change shapes."""
    return tree_map_only(Tensor, torch.ops.aten.alias.default, value)


def _tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
