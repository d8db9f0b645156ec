"""What must not happen in the middle of a pass through time, because the gradient would silently be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import ConfigurationError, InputError, LossError
from sltt_ext.online.passes import Call, Pass, SpeedUp

__all__ = ["Alone", "GraphOfStep", "OneBackward", "WeightsStay", "has_graph", "shares_graph"]


class Alone(SpeedUp):
    """No other pass runs through the network before this one is over: the states would be those of the other."""

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Be the latest pass."""
        self._pass = one
        one.replaced.begins_at(one.neurons)
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Still be the latest pass.

        Raises:
            ConfigurationError: If it is not.
        """
        self._check()
        yield
        self._check()

    def _check(self) -> None:
        if not self._pass.replaced.is_latest_at(self._pass.neurons):
            raise ConfigurationError(
                "another pass ran through the network in the middle of this one and changed its states: call predict and "
                "forward_backward between iterations, not in on_step=, backward= or the loss, or use another copy of the network"
            )


class WeightsStay(SpeedUp):
    """No optimizer updates the network before the last back-propagated call.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        self._weights = set(map(id, net.parameters()))

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Have optimizers watched."""
        _watch_optimizers()
        one.replaced.at_end(partial(_REFUSING.discard, self))
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Refuse an update before it is made."""
        if not call.selected or call.last:
            yield
            return
        _REFUSING.add(self)
        try:
            yield
        finally:
            _REFUSING.discard(self)

    def check(self, optimizer: Optimizer) -> None:
        """Nothing if ``optimizer`` updates other weights.

        Raises:
            LossError: If it updates the network's.
        """
        groups: Iterable[dict[str, Any]] = optimizer.param_groups
        if any(id(weight) in self._weights for group in groups for weight in group["params"]):
            raise LossError(
                f"{type(optimizer).__name__} updates the network at a time step, before the gradient of the iteration is "
                "complete (does backward= call optimizer.step(), as timm's NativeScaler does?): call it after forward_backward, "
                "or use on_step= for an update at every step"
            )


_REFUSING: set[WeightsStay] = set()


@cache
def _watch_optimizers() -> None:
    """One hook for all passes, which stays: no interrupt can come between a hook and its removal."""
    register_optimizer_step_pre_hook(_check_update)


def _check_update(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for guard in tuple(_REFUSING):
        guard.check(optimizer)


class OneBackward(SpeedUp):
    """A network that is back-propagated once an iteration is not back-propagated at every step."""

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Refuse a call that is not the only one."""
        if call.selected and not call.last:
            raise ConfigurationError(
                "DistributedDataParallel(static_graph=True) takes one backward pass in an iteration, but the time loop has one "
                "for each call: leave static_graph out"
            )
        yield


class GraphOfStep(SpeedUp):
    """The graph that a call frees is the network's, and not one that later calls need as well.

    Args:
        x: The input.
        target: The target.
    """

    def __init__(self, x: Any, target: Any) -> None:
        self._x = x
        self._target = target

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Refuse inputs that have a graph, where another call is to come."""
        if call.selected and not call.last:
            for name, value in (("x", self._x), ("the target", self._target)):
                if has_graph(value):
                    raise InputError(shares_graph(name))
        yield


def has_graph(value: Any) -> bool:
    """Whether a tensor, or one in a dict, tuple or list, has been computed with gradients; frames may have graphs of their own."""
    return any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in tree_leaves(value))


def shares_graph(name: str) -> str:
    """What to do about an input whose graph all time steps share."""
    return (
        f"{name} has a graph, which the backward pass of the first time step would free: compute it under torch.no_grad(), "
        "or detach() it; to train what computes it, make that a part of the network"
    )
