"""Turn a network's neurons into SLTT neurons, in place, and back.

Knowledge about a framework's modules lives in that framework's room, which registers rules here. A
room is imported only once the user has imported its framework, so importing sltt_ext needs torch alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TypeVar, cast

from torch import nn

from sltt_ext.errors import ConversionError, UnsupportedModuleError
from sltt_ext.kernels import check_backend
from sltt_ext.neuron import SLTTNeuron

__all__ = ["convert", "is_converted", "register_adapter", "revert"]

Module = TypeVar("Module", bound=nn.Module)


Rule = Callable[[nn.Module], type[SLTTNeuron]]

_RULES: dict[type[nn.Module], Rule] = {}

_FRAMEWORKS = {"spikingjelly.activation_based": "sltt_ext.spikingjelly"}


def register_adapter(*classes: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a rule for modules of the given classes and their subclasses.

    The decorated function gets a module and returns its adapter class (a subclass of the module's
    own class and of :class:`SLTTNeuron`), or raises :class:`~sltt_ext.errors.UnsupportedModuleError`. The rule of the closest base
    class wins.
    """

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(classes, rule))
        return rule

    return register


def convert(net: Module, *, backend: str = "auto") -> Module:
    """Give every neuron of ``net`` SLTT's gradient, in place.

    The forward pass stays what it is. Parameters, buffers, hooks, ``state_dict`` and the identity of
    every module stay too; only the neurons' classes change, to subclasses of what they were.
    Converting a converted network again is harmless.

    Args:
        net: A network with SpikingJelly neurons, or one neuron.
        backend: What the fused neurons run on: ``"auto"`` (CUDA kernels where they can be used), ``"torch"``
            or ``"cupy"`` (the kernels or an error).

    Returns:
        ``net`` itself.

    Raises:
        ConversionError: If ``net`` has no spiking neuron, or has modules that SLTT cannot train (the
            error lists each with the reason). ``net`` is then as it was.
        BackendError: If ``backend`` cannot be used.
    """
    if not isinstance(net, nn.Module):
        raise ConversionError(f"convert takes a torch.nn.Module, got {type(net).__name__}")
    check_backend(backend)
    _load_adapters()
    adapters: list[tuple[nn.Module, type[SLTTNeuron]]] = []
    refused: dict[str, str] = {}
    for path, module in net.named_modules():
        if issubclass(type(module), SLTTNeuron):
            adapters.append((module, cast(type[SLTTNeuron], type(module))))
        elif (rule := _rule(type(module))) is not None:
            try:
                adapters.append((module, rule(module)))
            except UnsupportedModuleError as refusal:
                refused[path] = f"{type(module).__name__}: {refusal}"
    if refused:
        raise ConversionError("cannot be trained with SLTT, nothing was converted:", refused)
    if not adapters:
        raise ConversionError(
            f"{type(net).__name__} has no spiking neuron that sltt_ext knows. It knows the neurons of "
            "SpikingJelly (spikingjelly.activation_based); a neuron of your own has to be a subclass of its "
            "BaseNode, or needs a rule given with sltt_ext.conversion.register_adapter."
        )
    for module, adapter in adapters:
        module.__class__ = adapter  # type: ignore[assignment]
        cast(SLTTNeuron, module).sltt_backend = backend
    return net


def revert(net: Module) -> Module:
    """Undo :func:`convert`, in place: every neuron gets the class it had before.

    Returns:
        ``net`` itself. A network that is not converted is returned as it is.
    """
    for module in net.modules():
        if isinstance(module, SLTTNeuron):
            vars(module).pop("sltt_backend", None)
            module.__class__ = module.original  # type: ignore[assignment]
    return net


def is_converted(net: nn.Module) -> bool:
    """Whether ``net`` has SLTT neurons."""
    return any(isinstance(module, SLTTNeuron) for module in net.modules())


def _load_adapters() -> None:
    for framework, room in _FRAMEWORKS.items():
        if framework in sys.modules:
            importlib.import_module(room)


def _rule(cls: type[nn.Module]) -> Rule | None:
    return next((_RULES[base] for base in cls.__mro__ if base in _RULES), None)
