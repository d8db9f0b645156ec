"""The methods that are compared: BPTT, SLTT and SLTT-K, behind one interface."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sltt_ext.bptt import BPTTTrainer
from sltt_ext.conversion import convert
from sltt_ext.errors import ConfigurationError
from sltt_ext.neuron import StatefulModule
from sltt_ext.online import OnlineTrainer
from sltt_ext.online.outputs import Output
from sltt_ext.online.trainer import LossFn

__all__ = ["Method", "Sequences", "check_time_steps", "method_named", "stepping"]


@dataclass(frozen=True)
class Method:
    """A way to get gradients.

    Attributes:
        name: ``"BPTT"``, ``"SLTT"`` or ``"SLTT-K"`` with a number for K.
        k: How many steps SLTT-K back-propagates; None: all.
    """

    name: str
    k: int | None = None

    @property
    def is_bptt(self) -> bool:
        """Whether the error goes back through time."""
        return self.name == "BPTT"

    def backpropagated(self, time_steps: int) -> int:
        """How many of the steps are back-propagated."""
        return time_steps if self.k is None else min(self.k, time_steps)

    def trainer(
        self,
        net: nn.Module,
        loss_fn: LossFn,
        time_steps: int,
        sequences: Sequences | None = None,
        *,
        one_call: bool = False,
        cache_invariant: bool = False,
        backward: Callable[[Tensor], Any] | None = None,
    ) -> OnlineTrainer:
        """What computes the gradients; ``net`` is converted or reverted for it, in place.

        Args:
            net: The network.
            loss_fn: ``(output of one step, target) -> scalar``.
            time_steps: T.
            sequences: How inputs, targets and outputs are to be read.
            one_call: A multi-step network takes all steps in one call under SLTT too, as under BPTT.
            cache_invariant: Evaluate what does not depend on time once; False shows the method as it is defined.
            backward: How a loss is back-propagated.
        """
        read = vars(sequences or Sequences())
        if self.is_bptt:
            return BPTTTrainer(net, loss_fn, time_steps, backward=backward, **read)
        neurons = [module for module in convert(net).modules() if isinstance(module, StatefulModule)]
        whole = any(neuron.whole_sequence or (one_call and neuron.multi_step) for neuron in neurons)
        return OnlineTrainer(
            net,
            loss_fn,
            time_steps,
            k=None if self.k is None else min(self.k, time_steps),
            chunk=time_steps if whole else 1,
            cache_invariant=cache_invariant,
            backward=backward,
            **read,
        )


@dataclass(frozen=True)
class Sequences:
    """How inputs, targets and outputs are to be read, as `OnlineTrainer` takes it.

    Attributes:
        time_dim: The axis of time in the input; None shows the same input at every step.
        target_time_dim: The axis of time in the target.
        output: What the loss reads of the network's return value.
    """

    time_dim: int | None = None
    target_time_dim: int | None = None
    output: Output = None


def method_named(name: str) -> Method:
    """The method of a name: ``"bptt"``, ``"sltt"``, or ``"sltt-K"`` with a number for K.

    Raises:
        ConfigurationError: If there is none of that name.

    >>> method_named("sltt-2")
    Method(name='SLTT-2', k=2)
    """
    match = re.fullmatch(r"bptt|sltt(?:-([1-9]\d*))?", str(name).lower())
    if match is None:
        raise ConfigurationError(f"method must be 'bptt', 'sltt' or 'sltt-K' such as 'sltt-2', got {name!r}")
    return Method(str(name).upper(), int(match[1]) if match[1] else None)


def check_time_steps(time_steps: Any) -> None:
    """Raises ConfigurationError unless ``time_steps`` is a positive integer."""
    if not isinstance(time_steps, int) or isinstance(time_steps, bool) or time_steps < 1:
        raise ConfigurationError(f"time_steps must be a positive integer, got {time_steps!r}")


def stepping(net: nn.Module) -> nn.Module:
    """The network to measure: that inside a `sltt_ext.snntorch.MultiStep`, which BPTT cannot run, or ``net``."""
    room = sys.modules.get("sltt_ext.snntorch.multi_step")
    if room is not None and isinstance(net, room.MultiStep):
        inner: nn.Module = net.net
        return inner
    return net
