"""Networks that run over time inside their own forward: an attribute, a global variable or their input has the number of steps.

Such a network repeats its input T times, or loops over T, and often averages over time at the end. If that number is set to
a smaller one, or the input has fewer steps, the network runs that many. Many such networks put their neurons to rest first
(``reset_net``, ``init_leaky``). In the middle of a sequence this does nothing, and returns the state that is carried. In the first
call, a copy runs all steps at once and one after the other, with its weights and with others. Both have to give the same:
whatever the network computes from the average has to be linear, and no step may be treated in a way of its own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import ConfigurationError, LossError, one_line, warn
from sltt_ext.forwards import Replacements
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.inputs import TimeDims
from sltt_ext.online.output_axes import AVERAGED, OutputAxes, axis_of_time
from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.online.snapshot import random_numbers
from sltt_ext.online.stand_ins import is_leaf
from sltt_ext.online.states import one_call, reset
from sltt_ext.online.step_numbers import check_axis, given_names, globals_with, is_number, matches, numbers_of
from sltt_ext.online.structures import flatten
from sltt_ext.step_trial import hooks_of_torch

__all__ = ["StepsInside", "TimeInside"]

Run = Callable[[nn.Module, int, int], Any]
"""``(net, start, stop) -> `` what the network returns for these steps."""
Convert = Callable[[Tensor], Tensor]
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
        self.names = given_names(names)
        self._paths: set[str] = set()
        self._globals: set[str] = set()
        found: dict[str, int] = {}
        self.arguments: set[str] = set()
        parameters = inspect.signature(net.forward).parameters
        forward = [name for name, one in parameters.items() if not is_number(one.default)]
        for name in self.names:
            places = {path: value for path, value in numbers_of(net) if matches(path, name)}
            self._paths |= places.keys()
            if not places:
                places = {
                    f"{store.get('__name__', '')}.{name}": store[name] for store in globals_with(net, name)
                }
                self._globals.add(name)
            if not places and name in forward:
                check_axis(name, forward, time_dim)
                self.arguments.add(name)
            elif not places:
                own = [path for path, _ in numbers_of(net, of_the_user=True)]
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
        self._outputs: dict[bool, OutputAxes] = {}  # in training, and not
        self._comparisons = _COMPARISONS

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_outputs": {}, "_comparisons": _COMPARISONS}

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
        return attributes + [(store, name) for name in self._globals for store in globals_with(net, name)]

    def outputs(self, net: nn.Module) -> OutputAxes:
        """Where the outputs have their time, in the mode that the network is in."""
        return self._outputs[net.training]

    def compare(self, net: nn.Module, time_steps: int, shown: Callable[[Convert], Run]) -> None:
        """See once that the network, step by step, gives what it gives as it is, and with other weights as well.

        In training, it may return something else than in evaluation. So where its outputs have their time is found out for each.

        Args:
            net: The network.
            time_steps: T.
            shown: Runs it on its input, with the tensors of that converted.

        Raises:
            ConfigurationError: If its outputs have another shape, or other numbers.
        """
        if not self._comparisons and net.training in self._outputs:
            return
        draw_again = _all_random_numbers(net)
        device = next((parameter.device.type for parameter in net.parameters()), "cpu")
        try:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                seen, tolerance = self._seen(net, time_steps, shown, _as_they_are)
                untold = self._judge(net, seen, time_steps, tolerance)
                elsewhere: _Seen | None = None
                with suppress(
                    RuntimeError, ValueError, ArithmeticError
                ):  # not every network takes any weights
                    elsewhere, tolerance = self._seen(net, time_steps, shown, _changed)
                if elsewhere is not None and elsewhere.numbers() == seen.numbers():
                    untold &= self._judge(net, elsewhere, time_steps, tolerance)
        finally:
            draw_again()
        whole, part = seen.training if net.training and seen.training else (seen.whole, seen.parts[0])
        self._outputs[net.training] = self._axes(net, whole, part, time_steps)
        if not self._comparisons:
            return
        self._comparisons = self._comparisons - 1 if untold else 0
        if untold and not self._comparisons:
            warn(
                f"in its first {_COMPARISONS} calls the network has given the same at all time steps (do its neurons fire?), so "
                "it could not be checked that it may run step by step: if it adds its outputs up over time, computes something that "
                "is not linear in their average, or makes states itself, the gradient is wrong"
            )

    def _axes(
        self, net: nn.Module, whole: Sequence[Tensor], part: Sequence[Tensor], steps: int
    ) -> OutputAxes:
        """Where outputs have their time, by what they are for all steps and for one.

        Raises:
            ConfigurationError: If they have it nowhere, and are no average either.
        """
        if len(whole) != len(part):
            raise ConfigurationError(
                f"the network returns {len(whole)} tensors for {steps} steps, and {len(part)} for one: return one tensor for all steps, "
                "torch.stack(outputs)"
            )
        axes = [axis_of_time(*pair, steps) for pair in zip(whole, part)]
        wrong = next((pair for axis, pair in zip(axes, zip(whole, part)) if axis is None), None)
        if wrong is not None:
            raise ConfigurationError(
                f"with time_inside set to 1, an output is {list(wrong[1].shape)} instead of {list(wrong[0].shape)}: time_inside has to "
                f"name what holds the number of steps, and nothing else{self._also(net)}"
            )
        return OutputAxes([axis for axis in axes if axis is not None])

    def _also(self, net: nn.Module) -> str:
        """What else may hold the number of steps, for a message."""
        names = {path.rpartition(".")[2] for path in self._paths}
        left = [
            path
            for path, _ in numbers_of(net)
            if path not in self._paths and path.rpartition(".")[2] in names
        ]
        return f"; {', '.join(left)} may have to be named, too (with '*.T', T of all modules)" if left else ""

    def _judge(self, net: nn.Module, seen: _Seen, time_steps: int, tolerance: float) -> bool:
        """Whether the outputs of all steps are the same, which tells nothing.

        Raises:
            ConfigurationError: If the network, step by step, gives other outputs than as it is.
            LossError: If it returns no tensor, or numbers that have no mean.
        """
        if not seen.whole:
            raise LossError(f"{type(net).__name__} returned no tensor: return what the loss reads")
        untold = time_steps > 1
        for head, axis in enumerate(self._axes(net, seen.whole, seen.parts[0], time_steps).axes):
            whole, steps = seen.whole[head], [part[head] for part in seen.parts]
            if axis == AVERAGED and not whole.is_floating_point() and not all(map(whole.equal, steps)):
                raise LossError(
                    f"an output has no mean over time: it has {whole.dtype} and is computed from the average. Return that, and "
                    "compute it behind the network"
                )
            untold &= all(torch.equal(step, steps[0]) for step in steps)
            whole, steps = whole.double(), [step.double() for step in steps]
            joined = torch.stack(steps).mean(0) if axis == AVERAGED else torch.cat(steps, axis)
            scale = float(whole.abs().max()) if whole.numel() else 0.0
            if torch.allclose(joined, whole, rtol=0.0, atol=tolerance * scale, equal_nan=True):
                continue
            if torch.allclose(time_steps * joined, whole, rtol=0.0, atol=1e-6 * scale):
                raise ConfigurationError(
                    f"{type(net).__name__} adds its outputs up over time, but it has to return their mean or all of them: "
                    "divide by the number of steps in its forward; if you need the sum, multiply behind the network"
                )
            raise ConfigurationError(
                "the network gives other outputs step by step than as it is. Perhaps it computes something that is not linear in the "
                "average over time (put over_time on the part before it); returns the last step or the maximum alone (return all "
                "steps, and take that behind the network); resets its neurons at its end (move that to the beginning of forward) or "
                "between two steps (use convert alone and your own loop); treats single steps in another way or mixes them; or makes "
                "states itself (have forward take and return them, and use sltt_ext.snntorch.Stateful)"
            )
        return untold

    def _seen(
        self,
        net: nn.Module,
        time_steps: int,
        shown: Callable[[Convert], Run],
        weights: Callable[[nn.Module], Any],
    ) -> tuple[_Seen, float]:
        """What a copy of the network returns with these weights, and how far rounding may take it."""
        try:  # in float64, where a spike does not depend on rounding
            return self._both(_copied(net).double(), time_steps, shown(_double), weights), 1e-6
        except RuntimeError:  # float32 is written down in the network, as it is in snnTorch
            pass
        try:
            return self._both(_copied(net), time_steps, shown(_copy), weights), 1e-3
        except _NotOneStepError as error:
            raise ConfigurationError(
                f"{type(net).__name__} runs {time_steps} steps, but not one alone ({error}): over_time runs it step by step, and each "
                f"step has to return an output{self._also(net)}"
            ) from error.__cause__

    def _both(self, net: nn.Module, time_steps: int, run: Run, weights: Callable[[nn.Module], Any]) -> _Seen:
        """What the network returns for all steps at once, and for one after the other."""
        neurons = [module for module in net.modules() if isinstance(module, StatefulModule)]
        told, draw_again = _Told(self, net), _all_random_numbers(net)
        training: list[list[Tensor]] = []
        weights(net)

        def ran(start: int, stop: int) -> list[Tensor]:
            with told.steps(stop - start, start > 0), one_call(neurons, stop - start):
                return flatten(run(net, start, stop))[0]

        def one_step(t: int) -> list[Tensor]:
            try:
                return ran(t, t + 1)
            except ValueError:  # of this package, or of a norm that has one sample
                raise
            except Exception as error:
                raise _NotOneStepError(one_line(error)) from error

        with told.replaced, told.replaced:  # twice, for interrupts
            net.train()
            with suppress(ValueError):  # of one sample there are no statistics
                reset(neurons)
                with _measuring_statistics(net):
                    whole = ran(0, time_steps)
                reset(neurons)
                training += [whole, one_step(0)]
            net.eval()
            reset(neurons)
            draw_again()
            whole = ran(0, time_steps)
            reset(neurons)
            draw_again()
            parts = [one_step(t) for t in range(time_steps)]
        return _Seen(whole, parts, training)


class _Seen(NamedTuple):
    """What a network returns: for all steps, for each step, and in training for all steps and for one, if it runs there."""

    whole: list[Tensor]
    parts: list[list[Tensor]]
    training: list[list[Tensor]]

    def numbers(self) -> list[int]:
        """How many outputs there are, each time."""
        return [len(self.whole), *map(len, self.parts)]


class _NotOneStepError(RuntimeError):
    """A network runs all of its steps, but not one alone."""


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
        self._from_rest = True

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Put back what an interrupt of a call has left."""
        self._from_rest = one.from_rest
        one.replaced.at_end(self._told.replaced.undo)
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Say how many they are."""
        with self._told.steps(call.steps, call.start > 0 or not self._from_rest):
            yield


def _all_random_numbers(net: nn.Module) -> Callable[[], None]:
    """A function that has all generators draw the same again, also those that modules hold."""
    draw_again = random_numbers(net)
    held = [leaf for module in net.modules() for leaf in tree_leaves(vars(module))]
    states = [(leaf, leaf.get_state()) for leaf in held if isinstance(leaf, torch.Generator)]

    def all_again() -> None:
        draw_again()
        for generator, state in states:
            generator.set_state(state)

    return all_again


def _as_they_are(net: nn.Module) -> None:
    """The weights that the network has."""


def _changed(net: nn.Module) -> None:
    """Weights a tenth of their size away: what is the same for all steps at the beginning need not stay so."""
    generator = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        if weight.is_floating_point() and weight.numel():
            size = weight.square().mean().sqrt()
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(0.1 * noise * torch.where(size > 0, size, torch.ones_like(size)))


def _copied(net: nn.Module) -> nn.Module:
    """The network once more, without hooks of the user's, and with what it has computed from its parameters as constants.

    Raises:
        ConfigurationError: If it cannot be copied.
    """
    held = [leaf for module in net.modules() for leaf in tree_leaves(vars(module))]
    computed = [leaf for leaf in held if isinstance(leaf, Tensor) and not is_leaf(leaf)]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in computed}
    memo |= {id(leaf): leaf for leaf in held if isinstance(leaf, torch.Generator)}  # which are put back
    try:
        alone = copy.deepcopy(net, memo | hooks_of_torch(net))
    except Exception as error:  # whatever a module holds: a lock, a file, a generator
        raise ConfigurationError(
            f"{type(net).__name__} cannot be copied ({one_line(error)}), and time_inside= compares a copy, step by step, with the "
            "network as it is: keep what cannot be copied out of the network"
        ) from error
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
