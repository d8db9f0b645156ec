"""A network over time as one module: `over_time`."""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sltt_ext.conversion import convert, is_converted
from sltt_ext.errors import ConfigurationError, ConversionError
from sltt_ext.neuron import Reclassed, Temporal
from sltt_ext.online import options
from sltt_ext.online.compiled import compiling_calls
from sltt_ext.online.draws import Draws
from sltt_ext.online.heads import Returns
from sltt_ext.online.inputs import TimeDims
from sltt_ext.online.network import goes_through_time
from sltt_ext.online.schedule import Schedule
from sltt_ext.online.time_inside import TimeInside
from sltt_ext.online.time_loop import Forward, Norms, Settings, TimeLoop

__all__ = ["over_time"]

Module = TypeVar("Module", bound=nn.Module)


def over_time(
    net: Module,
    time_steps: int | None = None,
    *,
    k: int | None = None,
    chunk: int = 1,
    norms: Norms = "step",
    time_dim: TimeDims = None,
    time_inside: str | Sequence[str] | None = None,
    returns: Returns | None = None,
    carry: bool = False,
    schedule: Schedule | Draws | None = None,
    generator: torch.Generator | None = None,
    memory_budget: int | str | None = None,
    pack_spikes: bool = False,
    cache_invariant: bool = True,
    backend: str = "auto",
    temporal: Temporal | None = None,
) -> Module:
    """Make a network run over time when it is called, in place, with SLTT's gradient and the memory of one step.

    The network keeps its class, attributes, hooks, ``state_dict`` and copies. It is converted if it was not before. A call runs
    T steps from rest, and keeps only the graph of the last one. ``loss.backward()`` runs the others again, one after the other,
    and gives the gradients to autograd. So any loss and any training script will do, and other modules may stand in front of
    the network or behind it.

        net = sltt_ext.over_time(net, time_steps=4)
        loss = criterion(net(images), target)
        loss.backward()

    The gradient is SLTT's (Meng et al. 2023, Sec. 4): the state that a step leaves in the neurons is a constant for the next.
    Random numbers, batch statistics and autocast are the same in both runs, and running statistics move once. Hooks on modules
    in the network are called in both runs. Without gradients, a call is a plain run over time. `sltt_ext.revert` undoes it.

    Args:
        net: A network, or a part of one.
        time_steps: T, how many steps an input is shown. None takes it from the input (``time_dim``).
        k: None back-propagates every step (SLTT). A number K runs K of them again (SLTT-K), with T / K times their gradient.
            With ``temporal="call"``, K counts windows of ``chunk`` steps.
        chunk: How many steps a multi-step network takes in one call. With ``temporal="call"``, this holds for any network.
        norms: For a multi-step network in training: the steps over which batch norms take their statistics. ``"step"`` are
            those of a call. ``"sequence"`` are all T, as in one call with the whole sequence. For this, one such call
            without a graph is made first, and the gradient through the statistics is that of each call's own samples (see
            "Norms over time" in the documentation). ``chunk=T`` is exact, with the memory of T steps.
        time_dim: None shows the first argument ``[N, ...]`` at every step. 0 or 1 is its time axis, ``[T, N, ...]`` or
            ``[N, T, ...]``. A dict gives the time axis of arguments by name; all others are passed as they are. An argument
            may be a tensor or any structure of tensors.
        time_inside: For a network that runs T steps in its own forward: the name of what holds T. That is an attribute, ``"T"``,
            ``"*.T"``, or a global variable that its code reads, ``"num_steps"``. If the network goes through all steps that its
            input has, name that argument of ``forward``, ``"x"``, and give ``time_dim``. The network then runs ``chunk`` steps
            at a time and returns what it returned before. The first calls check this.
        returns: ``"mean"`` gives the mean over time of each tensor that the network returns, ``"sequence"`` all steps
            ``[T, N, ...]``. None is the mean, or with ``time_inside`` what the network itself returns.
        carry: Start from the state of the last call and not from rest. That state is a constant for the gradient.
        schedule: How the K steps are drawn, or (instead of ``k``) which steps are back-propagated; see `OnlineTrainer`.
        generator: Source of the random steps; None is torch's default generator.
        memory_budget: Keep the graphs of as many steps as fit. These steps then do not run again. Give bytes, text such as
            ``"6GiB"``, or a part of the device's memory, ``"0.8"``. None keeps only the graph of the last selected step,
            unless an earlier call still has one.
        pack_spikes: Store spikes that are saved for backward as bits.
        cache_invariant: Evaluate only once what does not depend on time; see `OnlineTrainer`.
        backend: See `convert`.
        temporal: See `convert`. With ``"call"``, the gradient goes back through the ``chunk`` steps of a call (truncated BPTT;
            with T it is BPTT).

    A call also takes ``lengths=`` ``[N]``, the number of steps of each sample in a padded batch. The mean is then over the
    sample's own steps. (The padding has to be at the end, so that the steps before do not see it. With a mask with holes, the
    state would still move on.)

    Returns:
        ``net`` itself.

    Raises:
        ConfigurationError: If an option cannot work. In the first calls also if the network, run step by step, does not return
            what it returns as it is.
        ConversionError: If the network cannot be converted.

    Examples:
        >>> import snntorch, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), snntorch.Leaky(beta=0.9, init_hidden=True))
        >>> output = over_time(net, time_steps=5)(torch.rand(8, 4))
        >>> output.sum().backward()
        >>> output.shape, net[0].weight.grad.shape
        (torch.Size([8, 2]), torch.Size([2, 4]))
    """
    _check(net)
    inside = None
    if time_inside is not None:
        inside = TimeInside(net, time_inside, options.axes("time_dim", time_dim))
        time_steps = inside.time_steps if time_steps is None else time_steps
    steps = None if time_steps is None else options.count("time_steps", time_steps)
    chunk = options.count("chunk", chunk)
    through_time = temporal == "call" or (temporal is None and goes_through_time(net.modules()))
    window = options.window(chunk, steps) if through_time else None
    settings = Settings(
        time_steps=steps,
        k=k,
        schedule=options.selection(k, schedule, steps, window or 1),
        chunk=chunk,
        window=window,
        norms=options.one_of("norms", norms, ("step", "sequence"), "'step' or 'sequence'"),
        time_dim=options.axes("time_dim", time_dim),
        time_inside=inside,
        returns=returns and options.one_of("returns", returns, ("mean", "sequence"), "'mean' or 'sequence'"),
        carry=carry,
        generator=generator,
        memory_budget=options.room(memory_budget),
        pack_spikes=pack_spikes,
        cache_invariant=cache_invariant,
    )
    if temporal is not None or not is_converted(net):
        convert(net, backend=backend, temporal=temporal)
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
    """Check that ``net`` can run over time.

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

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A module that the network makes by its own class, such as a slice of a Sequential, does not run over time."""
        return cls._sltt_original(*args, **kwargs)

    def give_back_class(self) -> None:
        if type(self) is not _MADE[self._sltt_original]:
            raise ConversionError(
                f"the class of the network was exchanged again after over_time, for {type(self).__name__} (by fully_shard?): "
                "sltt_ext.revert it before that"
            )
        self.__class__ = self._sltt_original  # type: ignore[assignment]
        own = vars(self)
        del own["_sltt_time_loop"]
        if "_sltt_own_forward" in own:
            own["forward"] = own.pop("_sltt_own_forward")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deep-copy by the original class, as this one has no importable name."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = (self._sltt_original, *arguments[1:])
        return _new_over_time, (make, arguments), *rest


_MADE: dict[type[nn.Module], type[OverTime]] = {}


def _class_over_time(original: type[nn.Module]) -> type[OverTime]:
    """The class for an ``original`` that runs over time. It is made once."""
    if original in _MADE:
        return _MADE[original]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiling_calls(self, self._sltt_time_loop.run, forward_of, args, kwargs)
        return self._sltt_time_loop.run(self, forward_of, args, kwargs)

    def forward_of(net: nn.Module) -> Forward:
        """What the network does when it does not run over time."""
        return vars(net).get("_sltt_own_forward") or functools.partial(original.forward, net)

    # give the signature but not __wrapped__, which accelerate would unwrap together with its own wrappers
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    forward.__doc__ = original.forward.__doc__
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_sltt_original": original,
        "forward": forward,
    }
    _MADE[original] = type(
        original.__name__, (OverTime, original), namespace
    )  # files of the user have its name
    return _MADE[original]


def _new_over_time(make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    net = make(*arguments)
    net.__class__ = _class_over_time(type(net))  # type: ignore[assignment]
    return net
