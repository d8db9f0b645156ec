"""Networks whose forward takes and returns their states, as the time loop can run them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from sltt_ext.errors import ConfigurationError, InputError
from sltt_ext.neuron import SLTTNeuron, StatefulModule, constant

__all__ = ["Stateful"]

Step = Callable[[nn.Module, Any, Any], tuple[Any, Any]]


class Stateful(StatefulModule, nn.Module):
    """A network that takes and returns its states, as one that keeps them from step to step.

    The step interface is that of a PyTorch RNN cell: ``net(x, state)`` returns ``(output, state)``. The
    state is anything the network likes, tensors in tuples, lists or dicts, also the number of the step. A network may also take
    several states, ``net(x, mem1, mem2)``, and return ``(output, mem1, mem2)``. States are None in the first step of a sequence,
    from which snnTorch's neurons start at rest. They enter each step as constants; where a neuron in the network goes through
    time (``convert(..., temporal="call")``), each call.

    Args:
        net: The network.
        step: Runs one step, ``(net, x, state) -> (output, state)``, for a network with another interface.

    Raises:
        ConfigurationError: If ``net`` is no module, or takes no state.
        InputError: In forward, if a step does not return its output and all states.

    Examples:
        >>> import sltt_ext, snntorch, torch
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc, self.lif = torch.nn.Linear(4, 2), snntorch.Leaky(beta=0.9)
        ...     def forward(self, x, state):
        ...         spk, mem = self.lif(self.fc(x), state)
        ...         return spk, mem
        >>> net = Stateful(sltt_ext.convert(Net()))
        >>> online = sltt_ext.OnlineTrainer(net, torch.nn.functional.cross_entropy, time_steps=5)
        >>> online.forward_backward(torch.rand(8, 4), torch.randint(2, (8,))).output.shape
        torch.Size([8, 2])
    """

    def __init__(self, net: nn.Module, step: Step | None = None) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise ConfigurationError(f"Stateful takes a torch.nn.Module, got {net!r}")
        self.net = net
        self.step = step
        self.state: Any = None
        self._names = _states_of(net) if step is None else ()

    @property
    def multi_step(self) -> bool:
        return False

    def reset_state(self) -> None:
        self.state = None

    def reset(self) -> None:
        """What SpikingJelly's ``reset_net`` calls: the next step begins a sequence."""
        self.reset_state()

    def detach_state(self) -> None:
        self.state = constant(self.state)

    def forward(self, x: Any) -> Any:
        """The output of one step for its input ``[N, ...]``."""
        if self.state is None:  # a neuron that is given None goes on from what it has kept
            for module in self.net.modules():
                if isinstance(module, StatefulModule):
                    module.reset_state()
        if not self._goes_on():
            self.detach_state()
        names = self._names
        if self.step is not None:
            returned = self.step(self.net, x, self.state)
        elif names:
            returned = self.net(x, **dict(zip(names, self.state or [None] * len(names))))
        else:
            returned = self.net(x, self.state)
        if not isinstance(returned, tuple) or len(returned) != 1 + max(len(names), 1):
            wanted = ", ".join(["output", *(names or ["state"])])
            given = f" of {len(returned)}" if isinstance(returned, tuple) else ""
            raise InputError(
                f"one step has to return ({wanted}), as an RNN cell does: change the network's forward, or give "
                f"Stateful a step function; got a {type(returned).__name__}{given}"
            )
        output, *states = returned
        self.state = tuple(states) if names else states[0]
        return output

    def _goes_on(self) -> bool:
        """Whether the gradient goes on into the state, which becomes a constant after the call of several steps."""
        neurons = [module for module in self.net.modules() if isinstance(module, SLTTNeuron)]
        return any(neuron.through_time and neuron.told_steps is not None for neuron in neurons)


def _states_of(net: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of forward that are states and are given by name: those behind the first without another default.

    Raises:
        ConfigurationError: If there are none.
    """
    others = list(inspect.signature(net.forward).parameters.values())[1:]
    names = [one for one in others if one.kind in _NAMED and one.default in (one.empty, None)]
    if not others and not any(
        one.kind == one.VAR_POSITIONAL for one in inspect.signature(net.forward).parameters.values()
    ):
        raise ConfigurationError(
            f"forward of {type(net).__name__} takes no state, and Stateful is for a network that takes and returns its states: leave "
            "Stateful out, or give it a step function"
        )
    by_name = len(names) > 1 or any(one.kind == one.KEYWORD_ONLY for one in names)
    return tuple(one.name for one in names) if by_name else ()


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
