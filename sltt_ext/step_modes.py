"""Networks of single steps whose layers take sequences as well, once they are told: what to tell them.

A framework's room registers its layers that have both forms, with the attribute that tells them. A network is known to
have both where every module in it is such a layer, a container of torch's, a layer that treats all numbers alike, or a
module of the user's own around others, whose ``forward`` then has to be tried (`sequence_trial`). What would see another
shape than before is not known: other layers, hooks, and forwards that someone has put in the place of a module's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from sltt_ext.forwards import has_global_hooks, has_hooks, has_own_forward
from sltt_ext.neuron import SLTTNeuron, StatefulModule

__all__ = ["Setting", "register_step_modes", "sequence_form"]


class Setting(NamedTuple):
    """What tells a module that it takes sequences.

    Attributes:
        module: The module.
        name: The attribute, of its own ``__dict__``.
        value: Its value.
    """

    module: nn.Module
    name: str
    value: Any


Usable = Callable[[Any], bool]

_MODES: dict[type[nn.Module], tuple[str, Any, Usable]] = {}
_SHAPELESS: set[type[nn.Module]] = {
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Identity, nn.Linear,
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU,
    nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh, DistributedDataParallel,
}  # fmt: skip


def register_step_modes(name: str, value: Any, usable: Usable, *classes: type[nn.Module]) -> None:
    """Add layers or neurons that take sequences where the attribute ``name`` has the ``value``.

    Args:
        name: The attribute, of a module's own ``__dict__``.
        value: Its value where sequences are taken.
        usable: Whether a module of such a class can be told so.
        classes: These, and no subclasses; converted neurons are known by the class that they had.
    """
    _MODES.update(dict.fromkeys(classes, (name, value, usable)))


def sequence_form(net: nn.Module) -> list[Setting] | None:
    """What tells the modules of ``net`` that they take sequences ``[C, N, ...]``; None where it is not known to be enough."""
    if has_global_hooks():
        return None
    settings = []
    waiting, seen = [net], set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if has_hooks(module) or has_own_forward(module):
            return None
        cls = (
            module.original
            if isinstance(module, SLTTNeuron)
            else parametrize.type_before_parametrizations(module)
        )
        if cls in _MODES:
            name, value, usable = _MODES[cls]
            if not usable(module):
                return None
            settings.append(Setting(module, name, value))
            continue
        if isinstance(module, StatefulModule) or hasattr(module, "step_mode"):
            return None
        inner = list(module.children())
        if cls not in _SHAPELESS and (cls.__module__.startswith("torch.") or not inner):
            return None
        if not parametrize.is_parametrized(module):
            waiting += inner
    return settings if any(isinstance(setting.module, SLTTNeuron) for setting in settings) else None
