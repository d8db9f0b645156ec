"""Batch norms in a call that stands for several of the user's own calls: each part gets the statistics of its own.

What such a norm is called with has to be cut along time, and nobody may guess where time is. A norm that takes sequences
(step mode ``"m"``) has it in front. Any other norm was seen in calls of the user's own size: how many rows it got there
for one sample tells what it gets here, all steps at once or one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sltt_ext.errors import ConfigurationError
from sltt_ext.forwards import Layer, Replacements
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.time_invariant import is_batch_norm

__all__ = ["NormRows", "NormsInParts"]


class NormRows:
    """How many rows each batch norm was called with, for a sample of the input, in calls of the user's own.

    A norm that takes sequences has one row for each step.
    """

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[nn.Module, set[tuple[int, Fraction]]] = WeakKeyDictionary()
        self._at_step: WeakKeyDictionary[nn.Module, dict[int, Fraction]] = WeakKeyDictionary()
        self._in_call: dict[nn.Module, int] = {}

    def see(self, norm: nn.Module, x: Tensor, call: Call) -> None:
        """Take in that a norm is called."""
        self._in_call[norm] = self._in_call.get(norm, 0) + len(x)
        if len(call.parts) == 1:
            self._seen.setdefault(norm, set()).add((call.steps, Fraction(len(x), _samples(norm, call))))

    def end_of_call(self, call: Call) -> None:
        """See to it that several steps in one call give a norm as many rows as they do in calls of their own.

        Raises:
            ConfigurationError: If they do not.
        """
        rows, self._in_call = self._in_call, {}
        steps = range(call.start, call.stop)
        before = {step for at_step in self._at_step.values() for step in at_step}
        for norm in {*rows, *self._at_step}:
            number, samples = rows.get(norm, 0), _samples(norm, call)
            at_step = self._at_step.setdefault(norm, dict.fromkeys(before, Fraction(0)))
            if len(call.parts) == 1:
                at_step.update(dict.fromkeys(steps, Fraction(number, samples * call.steps)))
            elif number != samples * _expected(at_step, steps):
                raise _cannot_tell(norm, number)

    def holds_all_steps(self, norm: nn.Module, x: Tensor, call: Call) -> bool:
        """Whether ``x`` holds all steps of a call, and not one of them.

        Raises:
            ConfigurationError: If nobody can tell.
        """
        if _takes_sequences(norm):
            return len(x) == call.steps
        rows = Fraction(len(x), call.batch)
        seen = self._seen.get(norm, set())
        all_steps = any(before * call.steps / steps == rows for steps, before in seen)
        one_step = any(before == rows for _, before in seen)
        if all_steps == one_step:
            raise _cannot_tell(norm, len(x))
        return all_steps

    def state_dict(self, net: nn.Module) -> dict[str, Any]:
        """What was seen, by the norms' paths."""
        return {
            path: {
                "seen": [(steps, str(rows)) for steps, rows in sorted(self._seen.get(module, ()))],
                "at step": {step: str(rows) for step, rows in self._at_step[module].items()},
            }
            for path, module in net.named_modules()
            if module in self._at_step
        }

    def load_state_dict(self, net: nn.Module, state: dict[str, Any]) -> None:
        """Go on with what was seen."""
        modules = dict(net.named_modules())
        self._seen.clear()
        self._at_step.clear()
        for path, saved in state.items():
            if path in modules:
                self._seen[modules[path]] = {(steps, Fraction(rows)) for steps, rows in saved["seen"]}
                self._at_step[modules[path]] = {step: Fraction(rows) for step, rows in saved["at step"].items()}


def _expected(at_step: dict[int, Fraction], steps: range) -> Fraction:
    """The rows, for a sample, that these steps have given a norm; as many in each that was never seen, if all were alike."""
    alike = set(at_step.values())
    usual = alike.pop() if len(alike) == 1 else Fraction(-1)
    return sum((at_step.get(step, usual) for step in steps), Fraction(0))


def _samples(norm: nn.Module, call: Call) -> int:
    return 1 if _takes_sequences(norm) else call.batch


def _takes_sequences(norm: nn.Module) -> bool:
    return getattr(norm, "step_mode", None) == "m"


def _cannot_tell(norm: nn.Module, rows: int) -> ConfigurationError:
    return ConfigurationError(
        f"several steps share a call of the network, and a {type(norm).__name__} is called with {rows} rows there, other "
        "than those steps would give it one by one: give chunk=time_steps, or chunk=1 without k"
    )


class NormsInParts(SpeedUp):
    """Lets batch norms take their statistics over the parts of a call.

    Args:
        rows: What they were seen to be called with.
        evaluated_once: Whether a norm of a tensor is time-invariant: it counts the parts by itself.
    """

    def __init__(self, rows: NormRows, evaluated_once: Callable[[nn.Module, Tensor], bool]) -> None:
        self._rows = rows
        self._evaluated_once = evaluated_once
        self._call: Call | None = None

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Stand in for the forward of every norm that reads batch statistics."""
        with Replacements() as replaced:
            if one.multi_step:
                for norm in _norms(one.net):
                    replaced.forward(norm, Layer.PARTS, self._forward)
            yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Tell the norms what the call stands for."""
        self._call = call
        try:
            yield
            self._rows.end_of_call(call)
        finally:
            self._call = None

    def _forward(self, norm: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        call = self._call
        if call is None:
            return forward(x)
        self._rows.see(norm, x, call)
        if len(call.parts) == 1 or self._evaluated_once(norm, x) or not self._rows.holds_all_steps(norm, x, call):
            return forward(x)
        per_step = len(x) // call.steps
        return torch.cat([forward(part) for part in x.split([per_step * steps for steps in call.parts])])


def _norms(net: nn.Module) -> Iterator[nn.Module]:
    """The batch norms that read batch statistics, but for those of modules that keep the steps of a call apart."""
    waiting = [net]
    seen: set[nn.Module] = set()
    while waiting:
        module = waiting.pop()
        if module in seen or (isinstance(module, StatefulModule) and module.keeps_steps_apart):
            continue
        seen.add(module)
        waiting += module.children()
        if is_batch_norm(module) and (module.training or module._buffers.get("running_mean") is None):
            yield module
