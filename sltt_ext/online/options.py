"""The values that the options of a trainer may have. Each is checked here and nowhere else."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from sltt_ext.errors import ConfigurationError, listed, warn
from sltt_ext.neuron import OLDEST_THAT_TRACES, TRACES_NEURONS, SLTTNeuron
from sltt_ext.online.draws import DRAWS, Draws
from sltt_ext.online.schedule import Schedule, in_windows

__all__ = [
    "SIZE",
    "UNASKED",
    "LossOn",
    "Scale",
    "TimeDim",
    "axes",
    "axis",
    "budget",
    "called_with_one_input",
    "chunk_size",
    "count",
    "graph",
    "loss_of_a_step",
    "not_captured",
    "on_or_off",
    "one_loss",
    "one_of",
    "reads",
    "room",
    "selected",
    "selection",
    "window",
]

Scale = Literal["mean", "paper"]
LossOn = Literal["step", "mean", "sequence"]
TimeDim = Literal[0, 1]
Choice = TypeVar("Choice")


class _Unasked(str):
    """Text that is known from equal text by its identity."""


SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT])iB")
UNASKED: Any = _Unasked("auto")
"""``"auto"`` that nobody has written: what it cannot do is no news to anyone."""

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def count(name: str, value: Any, at_most: int | None = None, otherwise: str = "") -> int:
    """A positive integer, of Python or NumPy."""
    number: int | None = None
    if not isinstance(value, bool):
        with suppress(TypeError):
            number = operator.index(value)
    if number is None or number < 1 or (at_most is not None and number > at_most):
        limit = "a positive integer" if at_most is None else f"an integer from 1 to time_steps={at_most}"
        raise ConfigurationError(f"{name} must be {limit}{otherwise}, got {value!r}")
    return number


def chunk_size(value: Any) -> int | Literal["auto"]:
    """``chunk``: a number of steps, or ``"auto"``."""
    return (
        "auto"
        if isinstance(value, str) and value == "auto"
        else count("chunk", value, otherwise=" or 'auto'")
    )


def budget(value: Any, *choices: Any) -> int | str | None:
    """``memory_budget``: bytes, a part of the device's memory as text, ``"least"``, or None."""
    if value is None:
        return None
    if "auto" not in choices:
        raise ConfigurationError(
            "memory_budget chooses between plans, but chunk, pack_spikes and cache_invariant are all given: leave it out, or "
            "set one of them to 'auto'"
        )
    return "least" if isinstance(value, str) and value == "least" else room(value)


def on_or_off(name: str, value: Any) -> bool | Literal["auto"]:
    """``pack_spikes``, ``cache_invariant``: True, False, or ``"auto"``."""
    if isinstance(value, bool):
        return value
    return one_of(name, value, ("auto",), "True, False or 'auto'")


def room(value: Any) -> int | str | None:
    """Memory: bytes, text with a unit, a part of the device's memory as text, or None."""
    if value is None:
        return None
    if isinstance(value, str):
        with suppress(ValueError):
            if SIZE.fullmatch(value) or 0 < float(value) <= 1:
                return value
    elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ConfigurationError(
        f"memory_budget must be a number of bytes, or a part of the device's memory as text, '0.8' or '6GiB', got {value!r}"
    )


def window(chunk: int | Literal["auto"], time_steps: int | None) -> int:
    """``chunk`` where the gradient goes back through the steps of a call."""
    if chunk == "auto":
        raise ConfigurationError(
            "chunk='auto' depends on memory, but with temporal='call' the chunk decides how many steps the gradient goes back "
            "through: give a number"
        )
    if time_steps is None:
        return chunk
    if chunk > time_steps:
        raise ConfigurationError(
            f"chunk={chunk} is longer than time_steps={time_steps}, and the gradient goes back through the steps of a call: "
            f"use chunk={time_steps} for all of them"
        )
    if time_steps % chunk:
        warn(
            f"chunk={chunk} does not divide time_steps={time_steps}: the gradient goes back through {chunk} steps, and in the "
            f"last window through {time_steps % chunk}"
        )
    return chunk


def selection(
    k: Any, schedule: Schedule | Draws | None, time_steps: int | None, window: int
) -> Schedule | None:
    """``k``, ``schedule``, or ``k`` with the name of a schedule: which steps are back-propagated; None is all of them.

    With ``k``, windows of steps are drawn.
    """
    if callable(schedule):
        if k is not None:
            raise ConfigurationError(
                "give k or a schedule= of your own, not both: k goes with 'random', 'stratified' or 'early'"
            )
        return schedule
    name = "random" if schedule is None else schedule
    drawn_by = DRAWS[
        one_of("schedule", name, tuple(DRAWS), "'random', 'stratified', 'early' or a function of your own")
    ]
    if k is None:
        if schedule is not None:
            raise ConfigurationError(f"schedule={schedule!r} draws k of the time steps: say how many with k=")
        return None
    return in_windows(drawn_by(selected(k, time_steps, window)), window)


def selected(k: Any, time_steps: int | None, window: int) -> int:
    """``k``: how many steps are back-propagated, or windows."""
    if time_steps is None or window == 1:
        return count("k", k, at_most=time_steps)
    windows = -(-time_steps // window)
    number = count("k", k)
    if number > windows:
        raise ConfigurationError(
            f"k={number} is more than the {windows} windows of chunk={window} that there are in time_steps={time_steps}: with "
            "temporal='call', k counts windows"
        )
    return number


def axis(name: str, value: Any) -> TimeDim | None:
    """An axis of time."""
    return one_of(name, value, (None, 0, 1), "None, 0 or 1")


def axes(name: str, value: Any) -> Any:
    """An axis of time, or one for each input."""
    if not isinstance(value, Mapping):
        return axis(name, value)
    return {key: axis(f"{name}[{key!r}]", one) for key, one in value.items()}


def one_of(name: str, value: Any, choices: tuple[Choice, ...], text: str) -> Choice:
    """One of several values."""
    if isinstance(value, bool) or not any(value == choice for choice in choices):
        raise ConfigurationError(f"{name} must be {text}, got {value!r}")
    return next(choice for choice in choices if value == choice)


def compiles(value: Any) -> Any:
    """``compile``: False, True or ``"try"``."""
    if not isinstance(value, bool) and value != "try":
        raise ConfigurationError(f"compile must be False, True or 'try', got {value!r}")
    if value and not TRACES_NEURONS:
        oldest = ".".join(map(str, OLDEST_THAT_TRACES))
        raise ConfigurationError(
            f"compile={value!r} needs torch {oldest} or newer, and this is {torch.__version__}: give the trainer torch.compile(net)"
        )
    return value


def network(net: Any, loss_fn: Any) -> nn.Module:
    """The network, in its place, and not one that runs over time by itself."""
    if not isinstance(net, nn.Module) or (_has_neurons(loss_fn) and not _has_neurons(net)):
        raise ConfigurationError(
            f"OnlineTrainer takes (net, loss_fn, time_steps), got a {type(net).__name__} in the place of the network"
            f"{': give the network first, and the loss second' * isinstance(loss_fn, nn.Module)}"
        )
    if any("_sltt_time_loop" in vars(module) for module in net.modules()):
        raise ConfigurationError(
            "the network runs over T time steps in each call already, after over_time, and OnlineTrainer would call it for each step: "
            "use one of the two; sltt_ext.revert(net) undoes over_time"
        )
    return net


def _has_neurons(net: Any) -> bool:
    return isinstance(net, nn.Module) and any(isinstance(module, SLTTNeuron) for module in net.modules())


def loss_of_a_step(value: Any) -> Any:
    """``loss_fn``: a loss of the output of one step."""
    if not callable(value) or isinstance(value, type):
        kind = value.__name__ if isinstance(value, type) else type(value).__name__
        raise ConfigurationError(f"loss_fn must be a function or a module object, got {kind}")
    if type(value).__module__.startswith("snntorch.functional"):
        name = type(value).__name__
        raise ConfigurationError(
            f"snnTorch's {name} is a loss of whole recordings [T, N, classes], and the trainer has one step's output: "
            f"give loss_fn=sltt_ext.snntorch.step_loss({name}())"
        )
    return value


def called_with_one_input(net: nn.Module) -> None:
    """The network: the trainer calls it with the input of a step, and nothing else."""
    try:
        parameters = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):  # a forward that is not of Python tells nothing
        return
    needed = [one.name for one in parameters if one.default is one.empty and one.kind not in _VARIADIC]
    if len(needed) > 1:
        raise ConfigurationError(
            f"forward({', '.join(needed)}) of {type(net).__name__} needs {' and '.join(needed[1:])}, and the trainer calls it with "
            "one input alone. If these are states of the step before, which forward returns behind its output, wrap the network: "
            "sltt_ext.snntorch.Stateful(net). If they are inputs, have forward take one dict of all inputs; or call the network "
            "yourself, sltt_ext.over_time(net, time_steps=T)"
        )


def reads(value: Any) -> Any:
    """``output``: what the loss reads."""
    if value is None or callable(value):
        return value
    return one_of("output", value, ("spike", "membrane"), "None, 'spike', 'membrane' or a function")


def graph(value: Any, forbidden: Mapping[str, str]) -> bool:
    """``graph``: whether iterations run as CUDA graphs, and what forbids it."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"graph must be True or False, got {value!r}")
    if value and forbidden:
        raise ConfigurationError(
            listed("graph=True captures whole iterations, and does not go with:", forbidden)
        )
    return value


def not_captured(on_step: Any, backward: Any, loss_on: str, wrapper: Any) -> dict[str, str]:
    """Options that forbid a CUDA graph, and why."""
    python = "it is Python code, which a replay of the graph does not call"
    return {
        name: why
        for name, given, why in (
            ("on_step=", on_step is not None, python),
            ("backward=", backward is not None, f"{python}; bfloat16 under autocast needs no scaler"),
            (
                f"loss_on={loss_on!r}",
                loss_on != "step",
                "its backward runs the steps again: use loss_on='step'",
            ),
            ("wrapper=", wrapper is not None, "the exchange of gradients between processes is not captured"),
        )
        if given
    }


def one_loss(loss_on: str, target_time_dim: Any, on_step: Any) -> None:
    """What a single loss for all steps goes with."""
    if target_time_dim is not None or on_step is not None:
        raise ConfigurationError(
            f"loss_on={loss_on!r} has one loss for all steps: it goes with neither target_time_dim nor on_step"
        )
