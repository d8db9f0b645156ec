"""Back-propagation through time with the interface of `OnlineTrainer`, to compare SLTT with it.

All T steps run forward and stay in memory. Then one backward pass follows the error through space and time.
The network has the framework's own neurons: if it is converted, it is reverted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from sltt_ext.conversion import convert, revert
from sltt_ext.errors import LossError, SLTTWarning
from sltt_ext.forwards import Replacements
from sltt_ext.neuron import StatefulModule, state_dtype
from sltt_ext.online import OnlineResult, options
from sltt_ext.online.distributed import synchronised_once
from sltt_ext.online.frames import frames
from sltt_ext.online.objective import (
    Backward,
    IterationLoss,
    LossFn,
    back_propagate,
    targets_of_steps,
    total_loss,
)
from sltt_ext.online.outputs import Output, output_sequence
from sltt_ext.online.states import all_or_nothing

__all__ = ["BPTTTrainer"]


class BPTTTrainer:
    """Gradients by back-propagation through time, with the memory of all T steps.

    It can replace an `OnlineTrainer` anywhere, so that methods differ in nothing else:

        trainer = BPTTTrainer(net, loss_fn, time_steps=6)
        trainer.forward_backward(x, target)

    A multi-step network takes all T steps in one call. The total loss is the mean of the steps' losses.

    Args:
        net: A network that `convert` knows, original or converted. It is reverted here.
        loss_fn: ``(output of one step, target) -> scalar``.
        time_steps: T, how many steps one input is shown.
        time_dim: As in `OnlineTrainer`, like those that follow.
        output: What the loss reads of the network's return value.
        backward: How the loss is back-propagated; default ``loss.backward()``.
        target_time_dim: The time axis of a target that differs from step to step.
        wrapper: The DistributedDataParallel module around ``net``, if ``net`` is called without it.

    Raises:
        ConfigurationError: If an option cannot work.
        ConversionError: If ``net`` has no spiking neuron that `convert` knows.
    """

    def __init__(
        self,
        net: nn.Module,
        loss_fn: LossFn,
        time_steps: int,
        *,
        time_dim: options.TimeDim | None = None,
        output: Output = None,
        backward: Backward | None = None,
        target_time_dim: options.TimeDim | None = None,
        wrapper: nn.Module | None = None,
    ) -> None:
        self.net = net
        self.loss_fn = options.loss_of_a_step(loss_fn)
        self.time_steps = options.count("time_steps", time_steps)
        self.time_dim = options.axis("time_dim", time_dim)
        self.output = options.reads(output)
        self.backward = backward
        self.target_time_dim = options.axis("target_time_dim", target_time_dim)
        self.wrapper = wrapper
        self.on_step = None
        self._reset()

    def forward_backward(self, x: Any, target: Any, *, sync: bool = True) -> OnlineResult:
        """Accumulate the gradient of one batch into ``.grad``; see `OnlineTrainer.forward_backward`."""
        if not torch.is_grad_enabled():
            raise LossError("gradients are disabled: call forward_backward outside of torch.no_grad()")
        targets = targets_of_steps(target, self.time_steps, self.target_time_dim)
        whole = all_or_nothing(self.net.parameters(), self._reset)
        with (
            whole,
            whole,  # entered twice, in case of an interrupt
            synchronised_once(self.wrapper or self.net, sync) as step,
            step(True),
        ):
            output_seq = self._all_steps(x)
            loss = total_loss(self.loss_fn, output_seq, targets) / self.time_steps
            back_propagate(loss, self.backward)
        self._reset()
        return OnlineResult(
            IterationLoss.of(loss), _mean(output_seq), tuple(range(self.time_steps)), self.time_steps
        )

    @torch.no_grad()
    def predict(self, x: Any) -> Any:
        """The network's output averaged over all T steps, without gradients."""
        return _mean(self._all_steps(x))

    def state_dict(self) -> dict[str, Any]:
        """An empty dict: this trainer draws no steps and measures nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, because `state_dict` is empty."""

    def _all_steps(self, x: Any) -> Any:
        multi_step = self._reset()
        take = frames(x, self.time_steps, self.time_dim, multi_step).take
        size = self.time_steps if multi_step else 1
        with _state_with_its_graph(self.net):
            outputs = [
                output_sequence(self.net(take(t, t + size)), size, self.output, multi_step)
                for t in range(0, self.time_steps, size)
            ]
            return tree_map(lambda *parts: torch.cat(parts), *outputs)

    def _reset(self) -> bool:
        """Reset the network's state by the adapters' rules, which know every framework; whether it is multi-step."""
        multi_step = False
        for module in _converted(self.net).modules():
            if isinstance(module, StatefulModule):
                module.reset_state()
                multi_step |= module.multi_step
        revert(self.net)
        return multi_step


@contextmanager
def _state_with_its_graph(net: nn.Module) -> Iterator[None]:
    """Let what carries the state of a network, and is no neuron to revert, carry its graph as well."""
    carriers = [module for module in net.modules() if isinstance(module, StatefulModule)]
    with Replacements() as replaced:
        for carrier in carriers:
            replaced.attribute(carrier, "detach_state", lambda: None)
        yield


def _converted(net: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SLTTWarning)  # what SLTT's gradient lacks, BPTT's does not
        return convert(net)


def _mean(output_seq: Any) -> Any:
    return tree_map(lambda seq: seq.detach().mean(0, dtype=state_dtype(seq.dtype)), output_seq)
