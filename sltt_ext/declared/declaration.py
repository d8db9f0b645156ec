"""How users declare their own neurons: by one step, or by the names of the state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import nn

from sltt_ext.conversion import register_adapter
from sltt_ext.declared.adapters import Declared, DeclaredState, DeclaredStep
from sltt_ext.declared.record import Declaration
from sltt_ext.errors import ConfigurationError
from sltt_ext.neuron import SLTTNeuron, adapter_subclass, framework_neurons

__all__ = ["declare_neuron"]

StepT = TypeVar("StepT", bound=Callable[..., Any])


def declare_neuron(
    cls: type[nn.Module],
    *,
    time_dim: Literal[0, 1] | None = None,
    state: str | Sequence[str] = (),
    spikes: int | None = None,
    as_lif: Callable[[Any], Mapping[str, Any]] | None = None,
) -> Callable[[StepT], StepT]:
    """Make `convert` know a neuron class of your own. The class itself does not change.

    There are three forms, and one of them is enough:

    - A decorated function computes one step, ``step(module, x, *states) -> (output, *states)``, as in the equations. Each
      state is None at the first step of a sequence. The class's ``forward`` takes whole sequences, with time on axis
      ``time_dim``, and starts each from rest. The declared step replaces its loop.
    - ``state`` names the attributes in which the class keeps its state. Its ``forward`` runs one step.
    - ``as_lif`` gives the settings that make it a leaky integrate-and-fire neuron. The fused kernels run it.

    In each form, the state that enters a step is a constant for the gradient. The first call of a converted neuron is
    compared with the class's own ``forward``, on its input and on random numbers.

    Args:
        cls: The neuron's class; its subclasses are declared with it.
        time_dim: The time axis of the input and output of ``forward``: 0 for ``[T, N, ...]``, 1 for ``[N, T, ...]``. None if a
            call is one step ``[N, ...]``.
        state: With ``time_dim=None``, the attributes that a step leaves for the next one. With a step function, the states
            have the names of its arguments, unless you give other names here.
        spikes: The index of an output that holds only spikes (0 for the first or only one), so that they can be packed.
        as_lif: A function of a neuron. It returns the arguments of `sltt_ext.functional.multi_step_lif` that describe the
            neuron: ``tau`` (left out for IF), ``decay_input``, ``factored_leak``, ``v_threshold``, ``v_reset``,
            ``detach_reset``, ``surrogate``. For a learnable leak as in `sltt_ext.functional.multi_step_plif` it also
            returns ``w``, a tensor of one element.

    Returns:
        A decorator for the step function. It returns the function unchanged.

    Raises:
        ConfigurationError: If the declaration cannot describe a neuron.

    Examples:
        >>> import torch
        >>> class MyLIF(torch.nn.Module):
        ...     def forward(self, x):                           # [T, N, ...]
        ...         mem, spikes = 0, []
        ...         for step in x:
        ...             mem = 0.5 * mem + step
        ...             spikes.append((mem > 1).float() + (mem.sigmoid() - mem.sigmoid().detach()))
        ...             mem = mem * (1 - spikes[-1])
        ...         return torch.stack(spikes)
        >>> @declare_neuron(MyLIF, time_dim=0, spikes=0)
        ... def step(module, x, mem):
        ...     mem = x if mem is None else 0.5 * mem + x
        ...     spike = (mem > 1).float() + (mem.sigmoid() - mem.sigmoid().detach())
        ...     return spike, mem * (1 - spike)
        >>> import sltt_ext
        >>> sltt_ext.convert(MyLIF())(torch.full((3, 1), 0.8)).flatten().tolist()
        [0.0, 1.0, 0.0]
    """
    names = (state,) if isinstance(state, str) else tuple(state)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigurationError(
            f"declare_neuron takes a class of neurons, a subclass of torch.nn.Module, got {cls!r}"
        )
    if time_dim not in (None, 0, 1):
        raise ConfigurationError(f"time_dim of {cls.__name__} must be 0, 1 or None, got {time_dim!r}")
    if time_dim is not None and names:
        raise ConfigurationError(
            f"{cls.__name__} is declared with time_dim={time_dim} and state=: a neuron that takes sequences starts each from "
            "rest, so give its step function, or time_dim=None if a call is one step"
        )
    if time_dim is None and as_lif is not None and len(names) != 1:
        raise ConfigurationError(
            f"as_lif of {cls.__name__} needs the one attribute that holds its potential: state='mem', or time_dim if forward "
            "takes sequences"
        )

    def declare(step: StepT) -> StepT:
        found = _states_of(step, cls)
        _register(Declaration(cls, step, time_dim, names or found, len(found), spikes, as_lif))
        return step

    if names or as_lif is not None:
        _register(Declaration(cls, None, time_dim, names, 0, spikes, as_lif))
    return declare


def _states_of(step: Callable[..., Any], cls: type[nn.Module]) -> tuple[str, ...]:
    parameters = list(inspect.signature(step).parameters.values())
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) < 3 or any(parameter.kind not in plain for parameter in parameters):
        raise ConfigurationError(
            f"the step of {cls.__name__} must be a function of the module, the input and at least one state, "
            f"step(module, x, mem), got {inspect.signature(step)}"
        )
    return tuple(parameter.name for parameter in parameters[2:])


def _register(declaration: Declaration) -> None:
    Declared.declarations[declaration.cls] = declaration
    register_adapter(declaration.cls)(_adapter_of)
    framework_neurons(declaration.cls, lambda module: True)


def _adapter_of(module: nn.Module) -> type[SLTTNeuron]:
    declaration = Declared.declaration_of(type(module))
    by_names = declaration.step is None and declaration.as_lif is None
    return adapter_subclass(DeclaredState if by_names else DeclaredStep, type(module))
