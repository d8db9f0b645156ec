"""Whether a network that takes sequences can take them in parts: this is tried once, on its first input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.nn.parallel import DistributedDataParallel

from sltt_ext.errors import warn
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.capture import capturing
from sltt_ext.online.compiled import is_compiled
from sltt_ext.online.distributed import is_distributed
from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.step_trial import StepTrial

__all__ = ["PartsTried"]


class PartsTried(SpeedUp):
    """Tries whether all but the neurons keep the steps of a call apart, treat them alike, and return an output for each.

    Args:
        tell: Called with the reason, where one call of several steps is not those steps one by one.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._is_over = False
        self._trial: StepTrial | None = None
        self._one: Pass | None = None

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Copy the network, before anyone stands between its modules and their forwards."""
        in_parts = one.sizes.part < one.stop or len(one.selected) not in (0, one.stop)
        if not self._is_over and one.multi_step and one.stop > 1 and in_parts and not capturing():
            net = one.net.module if isinstance(one.net, DistributedDataParallel) else one.net
            # a stateful module answers for itself
            if not (is_compiled(net) or is_distributed(net) or isinstance(net, StatefulModule)):
                self._trial = StepTrial.of(net)
            self._one, self._is_over = one, True
        try:
            yield
        finally:
            self._trial = self._one = None

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Try the copy."""
        trial, self._trial = self._trial, None
        if trial is not None and self._one is not None:
            self._try(trial, self._one, call)
        yield

    def _try(self, trial: StepTrial, one: Pass, call: Call) -> None:
        if trial.lacks_steps(call.frame, one.stop, one.output):
            self._tell("it returns no output for each step")
        trial.net.eval()  # statistics of a batch are those of a call
        if (where := trial.mixing(call.frame, one.stop)) is not None:
            self._tell("its layers mix time steps")
            self._say(
                f"the network mixes time steps outside of its neurons: {where} at one step depends on the input of other "
                f"steps, but the trainer shows it {call.steps} of {one.stop} steps in a call, without the others"
            )
        elif (where := trial.places(call.frame, one.stop)) is not None:
            self._tell("it tells steps apart by their place in a call")
            self._say(
                f"the network tells time steps apart by their place in a call: with the same input, {where} is another one at "
                f"other steps. The trainer shows it {call.steps} of {one.stop} steps in a call, and each call begins at the first "
                "place"
            )

    def _say(self, what: str) -> None:
        warn(
            f"{what}. Give all steps in one call, chunk=time_steps without k; or use convert alone, and your own backward"
        )
