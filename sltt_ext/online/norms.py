"""Batch norms in a call that stands for several of the user's own calls: each part gets its own statistics.

The input of such a norm has to be cut along time, so it has to be known which axis is time. Time is in front for a norm that
takes sequences (step mode ``"m"``), for one with ``sltt_folds_time = True``, and for one in a container that folds time into
the batch. A module that runs its steps one by one cuts by itself. A network with any other norm keeps to the user's own
calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sltt_ext.errors import ConfigurationError
from sltt_ext.forwards import Layer
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.time_invariant import folds_time, is_batch_norm

__all__ = ["NormsInParts", "norms_of_batches", "norms_over_time", "takes_sequences", "untold_norm"]


class NormsInParts(SpeedUp):
    """Lets batch norms take their statistics over the parts of a call.

    Args:
        evaluated_once: Whether a norm of a tensor is time-invariant: it counts the parts by itself.
    """

    def __init__(self, evaluated_once: Callable[[nn.Module, Tensor], bool]) -> None:
        self._evaluated_once = evaluated_once
        self._call: Call | None = None

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Stand in for the forward of every norm that reads batch statistics."""
        shares = max(one.sizes.chunk, one.sizes.group) > one.sizes.part
        for _, norm, folded in _norms(one.net) if shares else ():
            if folded or takes_sequences(norm):
                one.replaced.forward(norm, Layer.PARTS, self._folded if folded else self._sequence)
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Tell the norms what the call stands for."""
        self._call = call
        try:
            yield
        finally:
            self._call = None

    def _sequence(self, norm: nn.Module, forward: Callable[[Tensor], Tensor], x_seq: Tensor) -> Tensor:
        if self._call is not None and len(x_seq) == 1:  # a loop of the network's own
            return forward(x_seq)
        return self._folded(norm, forward, x_seq)

    def _folded(self, norm: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        call = self._call
        if call is None or len(call.parts) == 1 or self._evaluated_once(norm, x):
            return forward(x)
        if len(x) % call.steps or (takes_sequences(norm) and len(x) != call.steps):
            raise ConfigurationError(
                f"{call.steps} steps share a call of the network, and a {type(norm).__name__} is called with shape "
                f"{list(x.shape)}, which does not have time in front: give chunk=1, and no k"
            )
        per_step = len(x) // call.steps
        return torch.cat([forward(part) for part in x.split([per_step * steps for steps in call.parts])])


def untold_norm(net: nn.Module) -> str | None:
    """The path of a norm that reads batch statistics, and nobody tells where it has its time; None if there is none."""
    return next((path for path, norm, folded in _norms(net) if not (folded or takes_sequences(norm))), None)


def norms_over_time(net: nn.Module) -> dict[str, str]:
    """The norms that read the batch statistics of all steps of a call at once, by path."""
    return {path: f"a {type(norm).__name__}" for path, norm, _ in norms_of_batches(net)}


def takes_sequences(norm: nn.Module) -> bool:
    """Whether a norm has time in front of the batch."""
    return getattr(norm, "step_mode", None) == "m"


def _norms(net: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Paths of the norms of a known kind that read batch statistics, and whether they read time folded into the batch."""
    return (entry for entry in norms_of_batches(net) if is_batch_norm(entry[1]))


def norms_of_batches(net: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Paths of the norms that read batch statistics, and whether they read time folded into the batch.

    Those of modules that keep the steps of a call apart are left out.
    """
    waiting = [("", net, False)]
    seen: set[nn.Module] = set()
    while waiting:
        path, module, folded = waiting.pop()
        if module in seen or (isinstance(module, StatefulModule) and module.keeps_steps_apart):
            continue
        seen.add(module)
        folded = folded or folds_time(module)
        children = module.named_children()
        waiting += [(f"{path}.{name}" if path else name, child, folded) for name, child in children]
        if isinstance(module, _BatchNorm) and (
            module.training or module._buffers.get("running_mean") is None
        ):
            yield path, module, folded
