"""Networks that run over time inside their own forward: an attribute, a global variable or their input has the number of steps.

Such a network repeats its input T times, or loops over T, and often averages over time at the end. If that number is set to
a smaller one, or the input has fewer steps, the network runs that many. Many such networks put their neurons to rest first (``reset_net``, ``init_leaky``).
In the middle of a sequence this does nothing, and returns the state that is carried. In the first calls, the outputs of all steps
are compared with what the original network returns: whatever it computes from the average has to be linear.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import ConfigurationError, LossError, warn
from sltt_ext.forwards import Replacements
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.inputs import TimeDims
from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.online.snapshot import random_numbers
from sltt_ext.online.stand_ins import is_leaf
from sltt_ext.online.states import one_call, reset
from sltt_ext.online.structures import Rebuild, flatten

__all__ = ["StepsInside", "TimeInside"]

Run = Callable[[nn.Module, int, int], Any]
"""``(net, start, stop) -> `` what the network returns for these steps."""
Convert = Callable[[Tensor], Tensor]
_AVERAGED = -1
_FRAMEWORKS = {"torch", "spikingjelly", "snntorch", "sltt_ext"}
_COMPARISONS = 10  # at most, as long as all steps give the same


class TimeInside:
    """Where a network holds its number of steps.

    Args:
        net: The network.
        names: Attributes, ``"T"``, also of submodules, ``"*.T"`` or ``"encoder.T"``; a global variable that its code reads; or an
            argument of forward, whose axis of time has so many steps.
        time_dim: See `over_time`.

    Attributes:
        time_steps: T, as the network has it; None if its input alone has it.
        arguments: The arguments that have it.

    Raises:
        ConfigurationError: If there is nothing of a name, or if it does not hold a number of steps.
    """

    def __init__(self, net: nn.Module, names: str | Sequence[str], time_dim: TimeDims) -> None:
        self.names = _names(names)
        self._paths: set[str] = set()
        self._globals: set[str] = set()
        found: dict[str, int] = {}
        self.arguments: set[str] = set()
        forward = list(inspect.signature(net.forward).parameters)
        for name in self.names:
            places = {path: value for path, value in _numbers(net) if fnmatchcase(path, name)}
            self._paths |= places.keys()
            if not places:
                places = {f"{store.get('__name__', '')}.{name}": store[name] for store in _globals(net, name)}
                self._globals.add(name)
            if not places and name in forward:
                _check_axis(name, forward, time_dim)
                self.arguments.add(name)
            elif not places:
                own = [path for path, _ in _numbers(net, of_the_user=True)]
                numbers = f" (its attributes that are numbers: {', '.join(sorted(own)[:10])})" * bool(own)
                raise ConfigurationError(
                    f"time_inside={name!r} names no attribute of {type(net).__name__} that is a number of steps, no global variable "
                    f"that its code reads, and no argument of forward{numbers}: hold the number in an attribute, self.T, read it from "
                    "there in forward, and name it: time_inside='T'. If forward goes through all steps that x has, say "
                    "time_inside='x', time_dim=0"
                )
            found |= places
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{path} = {value}" for path, value in found.items())
            raise ConfigurationError(
                f"time_inside names attributes that differ, {listed}: name those that hold T"
            )
        self.time_steps = next(iter(found.values()), None)
        self._axes: list[int] | None = None
        self._comparisons = _COMPARISONS

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_axes": None, "_comparisons": _COMPARISONS}

    def check_unchanged(self, net: nn.Module) -> None:
        """See that the network would still run T steps.

        Raises:
            ConfigurationError: If it would run another number of them.
        """
        for store, name in self.places(net):
            if store[name] != self.time_steps:
                raise ConfigurationError(
                    f"time_inside={', '.join(self.names)} was {self.time_steps} when over_time was called, and is {store[name]} now: call "
                    "over_time again after such a change"
                )

    def places(self, net: nn.Module) -> list[tuple[dict[str, Any], str]]:
        """The dicts that hold the number of steps, and its name in each."""
        attributes = [
            (vars(module), name)
            for path, module in net.named_modules()
            for name in vars(module)
            if f"{path}.{name}".lstrip(".") in self._paths
        ]
        return attributes + [(store, name) for name in self._globals for store in _globals(net, name)]

    def tensors(self, returned: Any, steps: int) -> tuple[list[Tensor], Rebuild]:
        """All tensors that the network returns for C steps, each ``[C, N, ...]``; an average counts C times."""
        tensors, rebuild = flatten(returned)
        assert self._axes is not None
        return [
            tensor.expand(steps, *tensor.shape) if axis == _AVERAGED else tensor.movedim(axis, 0)
            for tensor, axis in zip(tensors, self._axes, strict=True)
        ], rebuild

    def returned(self, tensor: Tensor, head: int) -> Tensor:
        """An output as the network itself returns it, of ``[T, N, ...]`` or the mean ``[N, ...]``."""
        assert self._axes is not None
        axis = self._axes[head]
        if axis != _AVERAGED:
            return tensor.movedim(0, axis)
        return tensor if self.averages else tensor.mean(0)

    @property
    def averages(self) -> bool:
        """Whether the network averages all of its outputs over time itself."""
        assert self._axes is not None
        return all(axis == _AVERAGED for axis in self._axes)

    def check_each_step(self, part: int, asked_by: str) -> None:
        """See that the steps of its outputs can be told from one another.

        Args:
            part: How many steps a call has.
            asked_by: Who asks for that.

        Raises:
            ConfigurationError: If a call gives their average.
        """
        assert self._axes is not None
        if part > 1 and _AVERAGED in self._axes:
            raise ConfigurationError(
                f"{asked_by} asks for each step, but the network averages the {part} steps of a call: use chunk=1"
            )

    def compare(self, net: nn.Module, time_steps: int, shown: Callable[[Convert], Run]) -> None:
        """See once that the network, step by step, gives what it gives as it is.

        Args:
            net: The network.
            time_steps: T.
            shown: Runs it on its input, with the tensors of that converted.

        Raises:
            ConfigurationError: If its outputs have another shape, or other numbers.
        """
        if not self._comparisons:
            return
        draw_again = random_numbers(net)
        try:
            with torch.no_grad(), torch.autocast(next(net.parameters()).device.type, enabled=False):
                try:  # in float64, where a spike does not depend on rounding
                    whole, parts = self._both(_copied(net).double(), time_steps, shown(_double))
                    tolerance = 1e-6
                except RuntimeError:  # float32 is written down in the network, as it is in snnTorch
                    whole, parts = self._both(_copied(net), time_steps, shown(_copy))
                    tolerance = 1e-3
        finally:
            draw_again()
        self._axes = [_axis(a, b, time_steps) for a, b in zip(whole, parts[0], strict=True)]
        untold = False  # an average of equal steps tells nothing
        for head, axis in enumerate(self._axes):
            steps = [part[head] for part in parts]
            joined = torch.stack(steps).mean(0) if axis == _AVERAGED else torch.cat(steps, axis)
            scale = float(whole[head].abs().max()) if whole[head].numel() else 0.0
            if axis == _AVERAGED and time_steps > 1:
                untold |= all(torch.equal(step, steps[0]) for step in steps)
            if not torch.allclose(joined, whole[head], rtol=0.0, atol=tolerance * scale, equal_nan=True):
                self._axes = None
                if torch.allclose(time_steps * joined, whole[head], rtol=0.0, atol=1e-6 * scale):
                    raise ConfigurationError(
                        f"{type(net).__name__} adds its outputs up over time, but it has to return their mean or all of them: "
                        "divide by the number of steps in its forward; if you need the sum, multiply behind the network"
                    )
                raise ConfigurationError(
                    "the network gives other outputs step by step than as it is: it computes something that is not "
                    "linear in the average over time (put over_time on the part before it), mixes time steps, resets its neurons between "
                    "two steps (use convert alone and your own loop), or makes states itself (have forward take and return them, and use "
                    "sltt_ext.snntorch.Stateful)"
                )
        self._comparisons = self._comparisons - 1 if untold else 0
        if untold and not self._comparisons:
            warn(
                f"in its first {_COMPARISONS} calls the network has given the same at all time steps (do its neurons fire?), so "
                "it could not be checked whether it averages them: if it adds them up, or computes something that is not linear "
                "in the average, the gradient is wrong"
            )

    def _both(self, net: nn.Module, time_steps: int, run: Run) -> tuple[list[Tensor], list[list[Tensor]]]:
        """What the network returns for all steps at once, and for one after the other."""
        neurons = [module for module in net.modules() if isinstance(module, StatefulModule)]

        told = _Told(self, net)

        def ran(start: int, stop: int) -> list[Tensor]:
            with told.steps(stop - start, start > 0), one_call(neurons, stop - start):
                return flatten(run(net, start, stop))[0]

        with told.replaced, told.replaced:  # twice, for interrupts
            reset(neurons)
            net.train()
            with _measuring_statistics(net), suppress(ValueError):  # of one sample there are no statistics
                ran(0, time_steps)
            net.eval()
            reset(neurons)
            whole = ran(0, time_steps)
            reset(neurons)
            parts = [ran(t, t + 1) for t in range(time_steps)]
        if not whole or len(whole) != len(parts[0]):
            raise LossError(
                f"the network returned a {type(net).__name__} without a tensor: return what the loss reads"
            )
        return whole, parts


class _Told:
    """A network is told how many steps to run.

    Attributes:
        replaced: What puts everything back; what an interrupt keeps it from is left to the block around all calls.
    """

    def __init__(self, inside: TimeInside, net: nn.Module) -> None:
        self.replaced = Replacements()
        self._places = inside.places(net)
        self._neurons = [module for module in net.modules() if isinstance(module, StatefulModule)]

    @contextmanager
    def steps(self, steps: int, continues: bool) -> Iterator[None]:
        """Have it run so many; where it continues a sequence, it goes on though it puts its neurons to rest at the beginning."""
        with self.replaced:
            for store, name in self._places:
                self.replaced.entry(store, name, steps)
            for neuron in self._neurons if continues else ():
                for name, instead in neuron.instead_of_rest().items():
                    self.replaced.entry(vars(neuron), name, instead)
            yield


class StepsInside(SpeedUp):
    """Has a network run the steps of each call."""

    def __init__(self, inside: TimeInside, net: nn.Module) -> None:
        self._told = _Told(inside, net)

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Put back what an interrupt of a call has left."""
        one.replaced.at_end(self._told.replaced.undo)
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Say how many they are."""
        with self._told.steps(call.steps, call.start > 0):
            yield


def _names(names: Any) -> tuple[str, ...]:
    """``time_inside`` as names.

    Raises:
        ConfigurationError: If it is something else.
    """
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, Sequence) or not given or not all(isinstance(name, str) for name in given):
        raise ConfigurationError(
            f"time_inside must be the name of what holds the number of steps, such as 'T', or a list of names, got {names!r}; if the "
            "network runs a single step in its forward, give time_steps="
        )
    return tuple(given)


def _check_axis(name: str, forward: Sequence[str], time_dim: TimeDims) -> None:
    """See that it is known where an argument of ``forward`` has its time.

    Raises:
        ConfigurationError: If it is not.
    """
    axes = time_dim if isinstance(time_dim, Mapping) else {forward[0]: time_dim}
    if axes.get(name) is None:
        wanted = "0" if name == forward[0] else f"{{{name!r}: 0}}"
        raise ConfigurationError(
            f"time_inside={name!r} takes the number of steps from that argument of forward: say which of its axes is time, "
            f"time_dim={wanted} for [T, N, ...]"
        )


def _numbers(net: nn.Module, of_the_user: bool = False) -> Iterator[tuple[str, int]]:
    """Whole numbers that modules hold, by path; of the frameworks' own modules, too, or not."""
    for path, module in net.named_modules():
        if of_the_user and not _is_of_the_user(type(module)):
            continue
        for name, value in vars(module).items():
            if _is_number(value) and not name.startswith("_sltt_"):
                yield f"{path}.{name}".lstrip("."), value


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _globals(net: nn.Module, name: str) -> list[dict[str, Any]]:
    """The global variables among which the network's own code reads a number of this name."""
    own = {base for module in net.modules() for base in type(module).__mro__ if _is_of_the_user(base)}
    found = {id(store): store for cls in own for store in _globals_read(cls, name)}
    return [store for store in found.values() if _is_number(store.get(name))]


@lru_cache(maxsize=256)
def _globals_read(cls: type, name: str) -> list[dict[str, Any]]:
    """The global variables of the functions of a class that read something of this name."""
    methods = [inspect.unwrap(value) for value in vars(cls).values() if callable(value)]
    functions = [method for method in methods if isinstance(method, FunctionType)]
    return [function.__globals__ for function in functions if _reads(function.__code__, name)]


def _reads(code: CodeType, name: str) -> bool:
    """Whether a function, or one inside of it, reads something of this name."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return name in code.co_names or any(_reads(one, name) for one in inner)


def _is_of_the_user(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in _FRAMEWORKS


def _axis(whole: Tensor, part: Tensor, time_steps: int) -> int:
    """The axis of time of an output, by what it is for all steps and for one."""
    if whole.shape == part.shape:
        return _AVERAGED
    axes = (
        [axis for axis, (a, b) in enumerate(zip(whole.shape, part.shape)) if a != b]
        if whole.dim() == part.dim()
        else []
    )
    if len(axes) != 1 or part.shape[axes[0]] != 1 or whole.shape[axes[0]] != time_steps:
        raise ConfigurationError(
            f"with time_inside set to 1, an output is {list(part.shape)} instead of {list(whole.shape)}: time_inside has to name "
            "what holds the number of steps, and nothing else"
        )
    return axes[0]


def _copied(net: nn.Module) -> nn.Module:
    """The network once more, with what it has computed from its parameters as constants."""
    computed = [
        leaf
        for module in net.modules()
        for leaf in tree_leaves(vars(module))
        if isinstance(leaf, Tensor) and not is_leaf(leaf)
    ]
    alone = copy.deepcopy(net, {id(tensor): tensor.detach().clone() for tensor in computed})
    for parameter in alone.parameters():
        parameter.grad = None
    return alone


def _double(tensor: Tensor) -> Tensor:
    return _copy(tensor).double() if tensor.is_floating_point() else _copy(tensor)


def _copy(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, which a network may change in place."""
    return tensor.detach().clone()


@contextmanager
def _measuring_statistics(net: nn.Module) -> Iterator[None]:
    """Have batch norms take over the statistics of what they see: a network as it is made may be silent without.

    From then on they use these, so that it does not matter how many steps they see.
    """
    with Replacements() as replaced:
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                if module.running_mean is None:
                    weight = next(net.parameters())
                    module.running_mean = weight.new_zeros(module.num_features)
                    module.running_var = weight.new_ones(module.num_features)
                    module.track_running_stats = True
                replaced.entry(vars(module), "momentum", 1.0)
        yield
