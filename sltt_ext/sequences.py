"""Stateful modules that are no neurons, whatever framework they come from: recurrent cells, and what takes sequences."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sltt_ext.neuron import SLTTNeuron

__all__ = ["Container", "RecurrentCell", "Sequence", "WholeSequence"]


class RecurrentCell(SLTTNeuron, nn.Module):
    """A spiking RNN, LSTM or GRU cell: the state that it has left is constant when its caller passes it again."""

    @property
    def multi_step(self) -> bool:
        return False

    def reset_state(self) -> None:
        """Nothing to forget: the caller keeps the state."""

    def detach_state(self) -> None:
        """Nothing to detach: the caller keeps the state."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        output = super().forward(x, self._entering(state))
        self._leave(output)
        return output


class Sequence(SLTTNeuron, nn.Module):
    """A module without state of its own that takes sequences, whatever the modules in it take."""

    @property
    def multi_step(self) -> bool:
        return bool(getattr(self, "step_mode", "m") == "m")

    @property
    def fires(self) -> bool:
        return False

    def reset_state(self) -> None:
        """It carries nothing."""

    def detach_state(self) -> None:
        """It carries nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """All steps; through time, where nobody has told of a call of the network, this is one for what is in it."""
        if not self.through_time or self.told_steps is not None:
            return super().forward(*args, **kwargs)
        for neuron in self._neurons():
            neuron.detach_state()
        self._tell_again(self.steps_of(*args))
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._tell_again(None)


class Container(Sequence):
    """A container that calls what is in it step by step, or, without state in it, once for all steps."""

    @property
    def keeps_steps_apart(self) -> bool:  # type: ignore[override]
        """Whether it calls step by step."""
        return bool(getattr(self, "stateful", True))


class WholeSequence(Sequence):
    """As `Sequence`, and all T steps have to come in one call."""

    whole_sequence = True
