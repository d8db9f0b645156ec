"""Turn a network's neurons into SLTT neurons, in place, and back.

What sltt_ext knows about a framework's modules is in a package for that framework, which registers rules here. It is
imported only after the user has imported the framework, so importing sltt_ext needs only torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.utils import parametrize

from sltt_ext.errors import (
    BackendError,
    ConfigurationError,
    ConversionError,
    UnsupportedModuleError,
    listed,
    warn,
)
from sltt_ext.forwards import Replacements
from sltt_ext.kernels import check_backend
from sltt_ext.neuron import Reclassed, SLTTNeuron, Temporal

__all__ = ["convert", "is_converted", "register_adapter", "revert"]

Module = TypeVar("Module", bound=nn.Module)
Rule = Callable[[nn.Module], type[SLTTNeuron] | None]
RuleT = TypeVar("RuleT", bound=Rule)

_RULES: dict[type[nn.Module] | str, Rule] = {}

_OWN = ("sltt_backend", "sltt_temporal", "_sltt_")
"""A conversion gives a module attributes whose names begin like this."""

_LEFT = "SLTT cannot train these modules, so they are left as they are and keep their own gradient:"
_CONVERTED_BUT = "these modules are converted, but SLTT's gradient does not pass them:"

_FRAMEWORKS = {
    "spikingjelly.activation_based": "sltt_ext.spikingjelly",
    "snntorch": "sltt_ext.snntorch",
}
"""A framework -> the package that knows it."""

_COPIED = {"BaseNode", "MemoryModule"}
"""Classes of `spikingjelly.clock_driven`. Code bases copy them, so they are recognised by their names."""

BRING_YOUR_CODE = "the page 'Published code' of the documentation has the lines for each case"


def register_adapter(*classes: type[nn.Module] | str) -> Callable[[RuleT], RuleT]:
    """Register a rule for modules of the given classes and their subclasses.

    If a class may not be imported yet, give its name, ``"package.module.Class"``. If code bases have copies of a class, give
    ``"Class"``.

    The decorated function gets a module. It returns its adapter class (a subclass of the module's own class and of
    `SLTTNeuron`), or None to leave the module as it is, or it raises `UnsupportedModuleError`. The rule of the closest
    base class wins.
    """

    def register(rule: RuleT) -> RuleT:
        _RULES.update(dict.fromkeys(classes, rule))
        return rule

    return register


def convert(
    net: Module, *, backend: str = "auto", strict: bool = True, temporal: Temporal | None = None
) -> Module:
    """Give every neuron of ``net`` SLTT's gradient, in place.

    The forward pass does not change. Parameters, buffers, hooks, ``state_dict`` and the identity of every module stay, too.
    Only the neurons' classes change, to subclasses of what they were. Converting a network twice is harmless.

    Args:
        net: A network with neurons of SpikingJelly or snnTorch or with declared ones (`declare_neuron`), or a single neuron.
        backend: What the fused neurons run on. ``"auto"`` uses CUDA kernels where it can; ``"torch"`` uses PyTorch's operators.
            ``"cupy"`` and ``"nvrtc"`` use the kernels, launched by CuPy or by PyTorch's own NVRTC, or raise an error.
            ``"inductor"`` compiles neurons with `torch.compile`, also the steps of declared neurons.
        strict: False leaves modules that SLTT cannot train as they are, converts the rest, and gives one warning. The
            gradient through the modules left is then their own.
        temporal: When the carried state becomes a constant. ``"step"``: at the start of each time step; this is SLTT.
            ``"call"``: at the start of each call of the network, so that the framework's own gradient goes back through
            the C steps of a call (truncated BPTT). C is the ``chunk`` of `OnlineTrainer` and `over_time`; with `convert`
            alone, each call of a neuron counts. None keeps what converted neurons have, and is ``"step"`` for others. So
            you can convert a part of a network before the whole: ``convert(net.stage4, temporal="call")``,
            ``convert(net)``.

    Returns:
        ``net`` itself.

    Raises:
        ConfigurationError: If ``temporal`` has another value.
        ConversionError: If ``net`` has no spiking neuron, or (``strict``) has modules that SLTT cannot
            train; the error lists each with the reason. ``net`` is then as it was.
        BackendError: If ``backend`` cannot be used here, or does not run a neuron of ``net``; the error lists each.
            ``net`` is then as it was.

    Warns:
        SLTTWarning: Once, with every module that was left as it is or that SLTT's gradient does not pass.
    """
    _check_is_module(net, "convert")
    if temporal not in (None, "step", "call"):
        raise ConfigurationError(f"temporal must be None, 'step' or 'call', got {temporal!r}")
    check_backend(backend)
    _load_adapters(net)
    adapters: list[tuple[nn.Module, type[SLTTNeuron]]] = []
    refused: dict[str, str] = {}
    caveats: dict[str, str] = {}
    for path, module in net.named_modules():
        if issubclass(type(module), SLTTNeuron):
            adapters.append((module, cast(type[SLTTNeuron], type(module))))
        elif (rule := _rule(parametrize.type_before_parametrizations(module))) is not None:
            try:
                adapter = rule(module)
            except UnsupportedModuleError as refusal:
                refused[path] = f"{type(module).__name__}: {refusal}"
                continue
            if adapter is not None:
                adapters.append((module, adapter))
                if adapter.caveat and temporal != "call":
                    caveats[path] = f"{type(module).__name__}: {adapter.caveat}"
    if refused and (strict or not adapters):
        raise ConversionError(
            f"these modules cannot be trained with SLTT, so nothing was converted ({BRING_YOUR_CODE}):",
            refused,
        )
    if not adapters:
        raise ConversionError(
            f"{type(net).__name__} has no spiking neuron that sltt_ext knows. It knows the neurons of SpikingJelly "
            "(activation_based, clock_driven and copies of it) and of snnTorch. A few lines declare a neuron of your own, "
            f"with sltt_ext.declare_neuron: {BRING_YOUR_CODE}"
        )
    _check_backend(net, adapters, backend)
    whole = _all_or_none([module for module, _ in adapters])
    with whole, whole:  # entered twice, in case of an interrupt
        for module, adapter in adapters:
            _give_class(module, adapter)
            neuron = cast(SLTTNeuron, module)
            neuron.sltt_backend = backend
            if temporal is not None:
                neuron.sltt_temporal = temporal
    messages = [listed(_LEFT, refused)] * bool(refused) + [listed(_CONVERTED_BUT, caveats)] * bool(caveats)
    if messages:
        warn("\n".join(messages))
    return net


def _check_is_module(net: Any, function: str) -> None:
    if not isinstance(net, nn.Module):
        got = (
            f"the class {net.__name__}: make one first"
            if isinstance(net, type)
            else f"a {type(net).__name__}"
        )
        cure = ": give it as nn.Sequential(*layers)" if isinstance(net, (list, tuple)) else ""
        if isinstance(getattr(net, "net", None), nn.Module):
            cure = ": give its network, .net"
        raise ConversionError(f"{function} takes a torch.nn.Module, got {got}{cure}")


def revert(net: Module) -> Module:
    """Undo `convert` and `over_time`, in place: every module gets the class it had before.

    Returns:
        ``net`` itself. A network that is not converted is returned as it is.

    Raises:
        ConversionError: If ``net`` is no module, or its class was exchanged by something else since then.
    """
    _check_is_module(net, "revert")
    for module in net.modules():
        if isinstance(module, Reclassed):
            module.give_back_class()
    neurons = [module for module in net.modules() if isinstance(module, SLTTNeuron)]
    whole = _all_or_none(neurons)
    with whole, whole:  # entered twice, in case of an interrupt
        for neuron in neurons:
            neuron.carry_charged(False)
            neuron.settle_state()
            for name in [name for name in vars(neuron) if name.startswith(_OWN)]:
                del vars(neuron)[name]
            _give_class(neuron, neuron.original)
    return net


def _give_class(module: Any, cls: type[Any]) -> None:
    """Give ``module`` another class, and put on it what torch.nn.utils.parametrize added to the old one."""
    given = type(module)
    if given is cls:
        return
    if parametrize.is_parametrized(module):
        injected = {
            name: value for name, value in vars(given).items() if name not in ("__dict__", "__weakref__")
        }
        cls = type(f"Parametrized{cls.__name__}", (cls,), injected)
    module.__class__ = cls


def _all_or_none(modules: Sequence[Any]) -> Replacements:
    """A block that gives ``modules`` their classes back if it is cut short."""
    block = Replacements()
    for module in modules:
        own = {name: value for name, value in vars(module).items() if name.startswith(_OWN)}
        block.if_cut_short(partial(_put_back, module, type(module), own))
    return block


def _put_back(module: Any, cls: type[nn.Module], own: dict[str, Any]) -> None:
    module.__class__ = cls
    for name in [name for name in vars(module) if name.startswith(_OWN) and name not in own]:
        del vars(module)[name]
    vars(module).update(own)


def is_converted(net: nn.Module) -> bool:
    """Whether ``net`` has SLTT neurons."""
    return any(isinstance(module, SLTTNeuron) for module in net.modules())


def _check_backend(net: nn.Module, adapters: list[tuple[nn.Module, type[SLTTNeuron]]], backend: str) -> None:
    """Raise a BackendError that lists the neurons that ``backend`` does not run."""
    paths = {module: path for path, module in net.named_modules()}
    refused: dict[str, str] = {}
    for module, adapter in adapters:
        try:
            adapter.check_backend(module, backend)
        except BackendError as refusal:
            refused[paths[module]] = f"{type(module).__name__}: {refusal}"
    if refused:
        raise BackendError(listed("a neuron does not run on the backend, so nothing was converted:", refused))


def _load_adapters(net: nn.Module) -> None:
    for framework, room in _FRAMEWORKS.items():
        if framework in sys.modules:
            importlib.import_module(room)
    classes = {type(module) for module in net.modules()}
    if any(
        _rule(cls) is None and not _COPIED.isdisjoint(base.__name__ for base in cls.__mro__)
        for cls in classes
    ):
        importlib.import_module("sltt_ext.legacy_spikingjelly")


def _rule(cls: type[nn.Module]) -> Rule | None:
    exact = (key for base in cls.__mro__ for key in (base, f"{base.__module__}.{base.__qualname__}"))
    copied = (base.__name__ for base in cls.__mro__)
    return next((_RULES[key] for keys in (exact, copied) for key in keys if key in _RULES), None)
