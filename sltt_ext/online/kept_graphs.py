"""The graphs of a pass that is back-propagated later: those of its last calls are kept, the others are dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from sltt_ext.errors import LossError, warn
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.outputs import Outputs
from sltt_ext.online.packing import leave_saving_contexts
from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.online.states import keep_charged
from sltt_ext.online.storages import storage_of

__all__ = ["Compared", "Found", "Graphs", "Opening"]


class Found:
    """What recordings of one network have found out.

    Attributes:
        bytes: How much autograd has saved in a call, at most.
        backwards: How many backward passes there were.
        again: How many of them have run steps again.
        compares: Whether outputs of the second run are still compared with those of the first.
        holding: The recordings that keep graphs.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.backwards = self.again = 0
        self.compares = True
        self.holding: WeakSet[Graphs] = WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is alive in this process."""
        return {**vars(self), "holding": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, holding=WeakSet())

    def is_held(self) -> bool:
        """Whether a recording still keeps a graph for its backward pass."""
        return any(graphs.kept for graphs in self.holding)


class Graphs(SpeedUp, Outputs):
    """Graphs of calls that run again are dropped; what autograd saves for them is counted. The others are kept.

    Calls that run again have a graph the first time, too: so they compute the same.

    Args:
        outputs: Where the outputs go.
        found: What was found out.

    Attributes:
        kept: Calls whose graphs are kept, with their outputs.
    """

    def __init__(self, outputs: Outputs, found: Found) -> None:
        self.kept: list[tuple[Call, Any]] = []
        self._outputs = outputs
        self._found = found
        self._neurons: Sequence[StatefulModule] = ()
        self._call: Call | None = None
        self._first_run: list[list[Tensor]] = []
        self._weights: set[int] = set()
        self._saved = _Saved(self._weights)

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """See what is saved anyway."""
        one.replaced.if_cut_short(lambda: leave_saving_contexts(self._saved.is_asked))
        self._neurons = one.neurons
        self._weights = {storage_of(parameter) for parameter in one.net.parameters()}
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Drop what autograd saves, or keep it."""
        self._call = call
        if call.keeps_graph:
            keep_charged(self._neurons)
        dropping: AbstractContextManager[Any] = nullcontext()
        saved = self._saved = _Saved(self._weights)
        if call.differentiable and not call.keeps_graph:
            dropping = saved_tensors_hooks(saved.drop, _refuse)
        with dropping:
            yield
        self._found.bytes = max(self._found.bytes, saved.bytes)

    def add(self, output_seq: Any) -> None:
        """Take in the outputs of the call."""
        call = self._call
        assert call is not None
        if call.keeps_graph:
            self.kept.append((call, output_seq))
            self._found.holding.add(self)
        elif call.differentiable and self._found.compares:
            self._first_run.append([head_seq.detach() for head_seq in output_seq])
        self._outputs.add(output_seq)

    @property
    def compares(self) -> bool:
        """Whether the second run is still compared with the first."""
        return self._found.compares

    def comparison(self) -> Outputs:
        """Where the outputs of the second run go."""
        first_run, self._first_run = self._first_run, []
        self._found.again += 1
        self._found.compares = False
        return Compared(first_run)


class _Saved:
    """What autograd would save in a call.

    Args:
        weights: Memory that does not count.
    """

    def __init__(self, weights: set[int]) -> None:
        self.bytes = 0
        self._seen = set(weights)
        self._asked = False

    def is_asked(self) -> bool:
        """Whether a tensor was dropped since it was asked last."""
        asked, self._asked = self._asked, False
        return asked

    def drop(self, tensor: Tensor) -> None:
        """Count a tensor, and let it go."""
        self._asked = True
        storage = storage_of(tensor)
        if storage not in self._seen:
            self._seen.add(storage)
            self.bytes += tensor.untyped_storage().nbytes() if storage else tensor.numel() * tensor.itemsize


class Opening:
    """A hook that asks whether gradients may come to what the kept graphs start from: only through the outputs of the network."""

    def __init__(self) -> None:
        self._is_open = False

    def __enter__(self) -> None:
        self._is_open = True

    def __exit__(self, *details: Any) -> None:
        self._is_open = False

    def __call__(self, gradient: Tensor) -> None:
        """See a gradient come.

        Raises:
            LossError: If it comes past the outputs.
        """
        if not self._is_open:
            _refuse()


def _refuse(dropped: None = None) -> Tensor:
    raise LossError(
        "the loss depends on a tensor that the network stored while it ran over time (in an attribute, or by a forward "
        "hook), and the graph of that tensor is not kept: return it as a part of the output, in a dict or tuple, or use "
        "an OnlineTrainer with a loss of each step (loss_on='step')"
    )


class Compared(Outputs):
    """The outputs of a second run, which have to be those of the first.

    Args:
        first_run: Those.
    """

    def __init__(self, first_run: Iterable[Sequence[Tensor]]) -> None:
        self._first_run = iter(first_run)

    def add(self, output_seq: Any) -> None:
        """Compare the outputs of the next call."""
        for first, second in zip(next(self._first_run, ()), output_seq):
            if isinstance(first, FakeTensor) or first.shape != second.shape:
                continue
            tolerance = 1e-3 * float(first.abs().nan_to_num(0.0, 0.0, 0.0).max()) if first.numel() else 0.0
            if not torch.allclose(first, second.detach(), atol=tolerance, rtol=0.0, equal_nan=True):
                warn(
                    "the network computes something else when its time steps run again in backward, so the gradient is "
                    "that of other outputs: draw random numbers from the global generators of torch, NumPy or Python, and keep no "
                    "state outside of the network"
                )
                self._first_run = iter(())
                return
