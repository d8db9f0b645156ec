"""The methods that are compared, BPTT, SLTT and SLTT-K, each with its options, behind one interface."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from sltt_ext.bptt import BPTTTrainer
from sltt_ext.conversion import convert
from sltt_ext.errors import ConfigurationError
from sltt_ext.neuron import StatefulModule
from sltt_ext.online import OnlineResult, OnlineTrainer
from sltt_ext.online.draws import Draws
from sltt_ext.online.objective import LossFn
from sltt_ext.online.options import TimeDim
from sltt_ext.online.outputs import Output
from sltt_ext.online.schedule import Schedule

__all__ = ["COMPARED", "GradientTrainer", "Method", "check_time_steps", "method_named"]

COMPARED = ("bptt", "sltt", "sltt-2", "sltt-1")
"""The methods that are compared where nobody names others."""


class GradientTrainer(Protocol):
    """What computes gradients by some method: `OnlineTrainer` and `BPTTTrainer` do.

    Attributes:
        net: The network.
        loss_fn: ``(output of one step, target) -> scalar``.
        time_steps: T.
        backward: How a loss is back-propagated; None is ``loss.backward()``.
        wrapper: The DistributedDataParallel module around ``net``, where ``net`` is called without it.
    """

    net: nn.Module
    loss_fn: LossFn
    time_steps: int
    backward: Callable[[Tensor], Any] | None
    wrapper: nn.Module | None

    def forward_backward(self, x: Any, target: Any, *, sync: bool = True) -> OnlineResult:
        """Accumulate the gradient of one batch into ``.grad``."""
        ...

    def predict(self, x: Any) -> Tensor:
        """The network's output averaged over all T steps, without gradients."""
        ...


@dataclass(frozen=True)
class Method:
    """A way to compute gradients, and how it is run. What is said of SLTT alone does not concern BPTT.

    Attributes:
        algorithm: ``"bptt"`` or ``"sltt"``.
        k: How many steps SLTT-K back-propagates; None: all.
        schedule: How they are drawn, as in `OnlineTrainer`.
        scale: As in `OnlineTrainer`, and so are the following.
        chunk: How many steps go through the network in one call; ``"all"`` takes all T where the network is
            multi-step, as BPTT does, and one where it is not; ``"auto"`` plans it, as in `OnlineTrainer`.
        full_output: Whether the steps after the last one that is back-propagated run as well.
        cache_invariant: Whether what does not depend on time is evaluated once; or ``"auto"``.
        pack_spikes: Whether spikes are kept for backward as bits; or ``"auto"``.
        memory_budget: As in `OnlineTrainer`, for what is ``"auto"``.
        graph: Whether whole iterations run as CUDA graphs, as in `OnlineTrainer`.
        backend: What the fused neurons run on, as in `convert`.

    Raises:
        ConfigurationError: If BPTT is given a K.
    """

    algorithm: Literal["bptt", "sltt"]
    k: int | None = None
    schedule: Draws = "random"
    scale: Literal["mean", "paper"] = "mean"
    chunk: int | Literal["auto", "all"] = 1
    full_output: bool = True
    cache_invariant: bool | Literal["auto"] = True
    pack_spikes: bool | Literal["auto"] = False
    memory_budget: int | str | None = None
    graph: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.is_bptt and self.k is not None:
            raise ConfigurationError("BPTT back-propagates all steps: leave k out, or use SLTT")

    @property
    def name(self) -> str:
        """``"BPTT"``, ``"SLTT"``, or ``"SLTT-2"`` with the number K."""
        return self.algorithm.upper() + (f"-{self.k}" if self.k is not None else "")

    @property
    def is_bptt(self) -> bool:
        """Whether the error goes back through time."""
        return self.algorithm == "bptt"

    def backpropagated(self, time_steps: int) -> int:
        """How many of T steps are back-propagated: all, or K of them."""
        return time_steps if self.k is None else min(self.k, time_steps)

    def for_at_most(self, time_steps: int) -> Method:
        """The method with K not above T, for comparisons over T."""
        return self if self.k is None else replace(self, k=self.backpropagated(time_steps))

    def trainer(
        self,
        net: nn.Module,
        loss_fn: LossFn,
        time_steps: int,
        *,
        time_dim: TimeDim | None = None,
        target_time_dim: TimeDim | None = None,
        output: Output = None,
        backward: Callable[[Tensor], Any] | None = None,
        schedule: Schedule | None = None,
    ) -> GradientTrainer:
        """What computes the gradients; ``net`` is converted or reverted for it, in place.

        Args:
            net: A network that `convert` knows.
            loss_fn: ``(output of one step, target) -> scalar``.
            time_steps: T.
            time_dim: As in `OnlineTrainer`, and so are the following.
            target_time_dim: The axis of time in the target.
            output: What the loss reads of the network's return value.
            backward: How a loss is back-propagated.
            schedule: Says which steps SLTT-K back-propagates, instead of drawing K.

        Raises:
            ConversionError: If ``net`` has no spiking neuron, or some that SLTT cannot train.
            ConfigurationError: If an option cannot work, such as a K above T.
        """
        if self.is_bptt:
            return BPTTTrainer(
                net, loss_fn, time_steps,
                time_dim=time_dim, output=output, backward=backward, target_time_dim=target_time_dim,
            )  # fmt: skip
        convert(net, backend=self.backend)
        k, draws = (None, None) if schedule is not None or self.k is None else (self.k, self.schedule)
        return OnlineTrainer(
            net, loss_fn, time_steps, k=k, chunk=self._chunk(net, time_steps),
            scale=self.scale, schedule=schedule or draws, time_dim=time_dim, output=output, full_output=self.full_output,
            backward=backward, target_time_dim=target_time_dim, cache_invariant=self.cache_invariant,
            pack_spikes=self.pack_spikes, memory_budget=self.memory_budget, graph=self.graph,
        )  # fmt: skip

    def _chunk(self, net: nn.Module, time_steps: int) -> int | Literal["auto"]:
        stateful = [module for module in net.modules() if isinstance(module, StatefulModule)]
        if any(module.whole_sequence for module in stateful):  # it cannot be given its steps in parts
            return time_steps
        if self.chunk == "all":
            return time_steps if any(module.multi_step for module in stateful) else 1
        return self.chunk


def method_named(name: str) -> Method:
    """The method of a name: ``"bptt"``, ``"sltt"``, or ``"sltt-2"`` with any number K.

    Raises:
        ConfigurationError: If there is none of that name.

    Examples:
        >>> method_named("sltt-2").k
        2
    """
    match = re.fullmatch(r"bptt|sltt(?:-([1-9]\d{0,8}))?", str(name).lower())
    if match is None:
        raise ConfigurationError(f"method must be 'bptt', 'sltt' or 'sltt-K' such as 'sltt-2', got {name!r}")
    return Method("bptt" if match[0] == "bptt" else "sltt", int(match[1]) if match[1] else None)


def check_time_steps(time_steps: Any) -> None:
    """Raise a ConfigurationError unless ``time_steps`` is a positive integer."""
    if not isinstance(time_steps, int) or isinstance(time_steps, bool) or time_steps < 1:
        raise ConfigurationError(f"time_steps must be a positive integer, got {time_steps!r}")
