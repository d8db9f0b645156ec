"""A network over time as one module: `over_time`."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sltt_ext.conversion import convert, is_converted
from sltt_ext.errors import ConfigurationError
from sltt_ext.neuron import Reclassed
from sltt_ext.online import options
from sltt_ext.online.heads import Returns
from sltt_ext.online.inputs import TimeDims
from sltt_ext.online.schedule import Schedule
from sltt_ext.online.time_inside import TimeInside
from sltt_ext.online.time_loop import Forward, Settings, TimeLoop

__all__ = ["over_time"]

Module = TypeVar("Module", bound=nn.Module)


def over_time(
    net: Module,
    time_steps: int | None = None,
    *,
    k: int | None = None,
    chunk: int = 1,
    time_dim: TimeDims = None,
    time_inside: str | Sequence[str] | None = None,
    returns: Returns | None = None,
    carry: bool = False,
    schedule: Schedule | None = None,
    generator: torch.Generator | None = None,
    memory_budget: int | str | None = None,
    pack_spikes: bool = False,
    cache_invariant: bool = True,
    backend: str = "auto",
) -> Module:
    """Have a network run over time when it is called, in place, with SLTT's gradient and the memory of one step.

    >>> import sltt_ext, snntorch, torch
    """
    _check(net)
    inside = None
    if time_inside is not None:
        names = [time_inside] if isinstance(time_inside, str) else list(time_inside)
        inside = TimeInside(net, names)
        time_steps = inside.time_steps if time_steps is None else time_steps
    steps = None if time_steps is None else options.count("time_steps", time_steps)
    settings = Settings(
        time_steps=steps,
        k=k,
        schedule=options.selection(k, schedule, steps),
        chunk=options.count("chunk", chunk),
        time_dim=options.axes("time_dim", time_dim),
        time_inside=inside,
        returns=returns and options.one_of("returns", returns, ("mean", "sequence"), "'mean' or 'sequence'"),
        carry=carry,
        generator=generator,
        memory_budget=options.room(memory_budget),
        pack_spikes=pack_spikes,
        cache_invariant=cache_invariant,
    )
    if not is_converted(net):
        convert(net, backend=backend)
    if isinstance(net, OverTime):
        net._sltt_time_loop = TimeLoop(settings)
        return net
    own = vars(net)
    if "forward" in own:
        own["_sltt_own_forward"] = own.pop("forward")
    own["_sltt_time_loop"] = TimeLoop(settings)
    net.__class__ = _class_over_time(type(net))  # type: ignore[assignment]
    return net


def _check(net: Any) -> None:
    """What can run over time.

    Raises:
        ConfigurationError: If ``net`` cannot.
    """
    if not isinstance(net, nn.Module):
        raise ConfigurationError(f"over_time takes a torch.nn.Module, got a {type(net).__name__}")
    if isinstance(net, (DistributedDataParallel, nn.DataParallel)) or hasattr(net, "_orig_mod"):
        raise ConfigurationError(
            f"over_time takes the network itself, got a {type(net).__name__} around it: call over_time first, and wrap or "
            "compile what it returns"
        )
    within = [path for path, module in net.named_modules() if isinstance(module, OverTime) and path]
    if within:
        raise ConfigurationError(
            f"{within[0]!r} runs over time already, and the network around it would run it T times: sltt_ext.revert it, or "
            "leave the network around it as it is"
        )


class OverTime(Reclassed, nn.Module):
    """Mixin of a network that runs over time when it is called."""

    _sltt_time_loop: TimeLoop
    _sltt_original: ClassVar[type[nn.Module]]

    def give_back_class(self) -> None:
        self.__class__ = self._sltt_original  # type: ignore[assignment]
        own = vars(self)
        del own["_sltt_time_loop"]
        if "_sltt_own_forward" in own:
            own["forward"] = own.pop("_sltt_own_forward")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deep-copy by the class that was exchanged: this one has no importable name."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = (self._sltt_original, *arguments[1:])
        return _new_over_time, (make, arguments), *rest


_MADE: dict[type[nn.Module], type[OverTime]] = {}


def _class_over_time(original: type[nn.Module]) -> type[OverTime]:
    """The class of an ``original`` that runs over time, made once."""
    if original in _MADE:
        return _MADE[original]

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # what the loop calls is compiled, and not the loop
        return self._sltt_time_loop.run(self, forward_of, args, kwargs)

    def forward_of(net: nn.Module) -> Forward:
        """What the network does when it does not run over time."""
        return vars(net).get("_sltt_own_forward") or functools.partial(original.forward, net)

    namespace = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "_sltt_original": original,
        "forward": forward,
    }
    _MADE[original] = type(f"{original.__name__}OverTime", (OverTime, original), namespace)
    return _MADE[original]


def _new_over_time(make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    net = make(*arguments)
    net.__class__ = _class_over_time(type(net))  # type: ignore[assignment]
    return net
