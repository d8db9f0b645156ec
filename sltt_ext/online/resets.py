"""Networks that reset their neurons in forward: to them a call is a whole sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sltt_ext.errors import ConfigurationError
from sltt_ext.forwards import Replacements
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.online.compiled import eager_modules
from sltt_ext.online.passes import Call, Pass, SpeedUp

__all__ = ["NoResets"]


class NoResets(SpeedUp):
    """No network that takes sequences resets its neurons in a call of some of the steps: the others would start from rest."""

    def __init__(self) -> None:
        self._steps: tuple[int, int] = (1, 1)

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Stand in the place of the neurons' ``reset``."""
        with Replacements() as replaced:
            if one.multi_step:
                for module in eager_modules(one.net):
                    if isinstance(module, SLTTNeuron) and callable(getattr(module, "reset", None)):
                        replaced.attribute(module, "reset", self._reset(module))
            self._steps = (one.stop, one.stop)
            yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Know how many of the steps it has."""
        self._steps = (call.steps, self._steps[1])
        yield

    def _reset(self, module: Any) -> Any:
        own = module.reset

        def reset() -> None:
            steps, of = self._steps
            if steps < of:
                raise ConfigurationError(
                    f"the network resets a {type(module).__name__} in a call of {steps} of {of} steps: a network that resets "
                    "itself, or mixes steps, needs all of them in one call, by chunk=time_steps without k, or by "
                    "sltt_ext.convert alone and a backward of your own"
                )
            own()

        return reset
