"""A trial of a network on its first input: whether its own layers keep time steps, and calls, apart.

From one step to the next, a network carries what its neurons carry and nothing else: that is what lets steps run one by
one. Convolutions over time, attention over time or statistics over all steps carry more, and no shape tells. So the
network runs a few times on a few samples with every neuron replaced by a smooth function of its input, which carries nothing.
Then nothing at one step may depend on the input of another one, to the last bit: two inputs that differ in the later
steps must give the same in the earlier ones, and the other way round. All runs have the same shapes, so rounding is
the same as well. And with the same input at all steps, all steps must come to the same, but for rounding.

The trial runs on a copy that shares the weights, without hooks of the user's, and without gradients: nobody sees it.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from sltt_ext.errors import LossError
from sltt_ext.forwards import HOOKS, Layer, Replacements
from sltt_ext.neuron import Reclassed, SLTTNeuron

__all__ = ["StepTrial", "hooks_of_torch"]

_LONGEST, _SHORTEST = 16, 4
"""Steps of a trial, at most, with a few samples and with all: what reaches further back is not seen."""

Seen = list[tuple[str, Tensor]]
"""What was seen, each ``[T, ...]`` with the path of its neuron, or "" for what the network returns."""


class _CannotTellError(Exception):
    """A neuron returns something else than a value for each sample and step."""


class StepTrial:
    """A copy of a network that takes ``[T, N, ...]``, to be tried.

    Args:
        net: The copy, for this trial alone.

    Attributes:
        net: The same; each question is put to a copy of it, as a network may keep something of its own.
        time_steps: How many steps a call of it has; at most 16.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.time_steps = 2
        self._samples = 1
        self._seen: Seen = []
        self._draws_others = False  # random numbers than the runs before
        self._tried = net
        self._paths: dict[nn.Module, str] = {}

    @classmethod
    def of(cls, net: nn.Module) -> StepTrial | None:
        """The trial of ``net``, as it is now; None where it cannot be copied, or holds no numbers (fake tensors)."""
        if any(type(weight) not in (nn.Parameter, Tensor) or weight.is_meta for weight in net.parameters()):
            return None
        with _disable_current_modes():
            try:
                return cls(_copied(net))
            except Exception:  # whatever a module holds that cannot be copied: a lock, a file, a generator
                return None

    def mixing(self, frames: Any, time_steps: int) -> str | None:
        """Where a step reads another one; None where nothing does, or where it cannot be told.

        Args:
            frames: What the network is called with: a tensor ``[C, N, ...]``, or several.
            time_steps: How many steps there are.
        """
        found = self._asked(self._mixes, frames, time_steps)
        return found if isinstance(found, str) else None

    def places(self, frames: Any, time_steps: int) -> str | None:
        """What is not the same at every step of a call, where the input is; None where all is, or it cannot be told."""
        found = self._asked(self._depends_on_place, frames, time_steps)
        return found if isinstance(found, str) else None

    def keeps(self, frames: Any, time_steps: int) -> bool:
        """Whether a second call with the same input returns something else, though all neurons are at rest."""
        return bool(self._asked(self._differs, frames, time_steps))

    def lacks_steps(self, frames: Any, time_steps: int, output: Callable[[Any, int], Any]) -> bool:
        """Whether the network returns something else than an ``output`` for each step, which is then a `LossError`."""

        def lacks(x: Any, *_: Any) -> bool | None:
            if (returned := self._returned(x)) is None:
                return None
            try:
                output(returned, self.time_steps)
            except LossError:
                return True
            return False

        return bool(self._asked(lacks, frames, time_steps))

    def _asked(
        self, question: Callable[..., str | bool | None], frames: Any, time_steps: int
    ) -> str | bool | None:
        """The answer for a few samples; for all of them, too, unless it is no: a network may know the size of its batch."""
        leaves = tree_leaves(frames)
        if (
            time_steps < 2
            or not leaves
            or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        ):
            return None
        if any(type(leaf) is not Tensor or leaf.dim() < 2 or leaf.is_meta for leaf in leaves):
            return None
        batch = min(leaf.shape[1] for leaf in leaves)
        answer: str | bool | None = None
        for samples, longest in [(min(batch, 2), _LONGEST), (batch, _SHORTEST)][: 1 + (batch > 2)]:
            self.time_steps, self._samples = min(time_steps, longest), samples
            if self.time_steps == samples:  # shapes have to tell them apart
                self.time_steps += 1
            with _disable_current_modes(), torch.no_grad(), self._random_numbers_kept():
                self._tried, self._draws_others = _copied(self.net), False
                self._paths = {module: path for path, module in self._tried.named_modules()}
                try:
                    answer = question(*self._inputs(frames))
                except Exception:  # a trial that fails tells nothing; what fails in earnest says so itself
                    answer = None
            if answer is False:
                break
        return answer

    def _inputs(self, frames: Any) -> tuple[Any, Any, Any, Any]:
        """An input, the same again, and two others: one that differs in the first half of the steps, one in the second."""
        shape, half = (self.time_steps, self._samples), self.time_steps // 2
        first = tree_map(lambda leaf: _like(leaf, shape, turned=False), frames)
        second = tree_map(lambda leaf: _like(leaf, shape, turned=True), frames)

        def joined(start: Any, end: Any) -> Any:
            return tree_map(lambda a, b: torch.cat([a[:half], b[half:]]), start, end)

        return first, first, joined(second, first), joined(first, second)

    def _mixes(self, *inputs: Any) -> str | bool | None:
        whole, again, other_first, other_last = map(self._run, inputs)
        if not (whole and other_first and other_last) or not _equal(whole, again, slice(None)):
            return None  # it keeps something from call to call, or a kernel is not deterministic
        half = self.time_steps // 2
        for kept, others in ((slice(half, None), other_first), (slice(half), other_last)):
            for one, other in zip(whole, others):
                if not _equal([one], [other], kept):
                    return _where(one[0])
        return False

    def _depends_on_place(self, x: Any, *_: Any) -> str | bool | None:
        same = tree_map(lambda leaf: leaf[:1].expand_as(leaf).clone(), x)
        whole = self._run(same)
        self._draws_others = True
        if not whole or not _equal(whole, self._run(same), slice(None)):
            return None  # random numbers tell the steps apart
        for path, value in whole:
            if not _is_close(value, value[:1].expand_as(value)):
                return _where(path)
        return False

    def _differs(self, x: Any, *_: Any) -> bool | None:
        runs = [self._run(x), self._run(x)]
        if not all(runs):
            return None
        return not all(_is_close(a, b) for (_, a), (_, b) in zip(*runs))

    def _run(self, x: Any) -> Seen:
        """All that is seen of one run; nothing where it fails."""
        self._seen = []
        returned = self._returned(x)
        for leaf in tree_leaves(returned):
            self._see("", leaf, folded=False)
        return self._seen if returned is not None else []

    def _returned(self, x: Any) -> Any:
        neurons = {module: module for module in self._paths if isinstance(module, SLTTNeuron)}
        for neuron in neurons.values():
            neuron.reset_state()
        with self._random_numbers_kept(), Replacements() as replaced, warnings.catch_warnings():
            if self._draws_others:
                random.seed(random.getrandbits(32))
                for generator in (torch.default_generator, *map(_generator_of, self._devices())):
                    generator.manual_seed(random.getrandbits(32))
            warnings.simplefilter("ignore")  # what there is to say, the run itself says
            for module in self._paths:
                if module in neurons and module is not self._tried:
                    replaced.forward(module, Layer.OWN, self._smooth)
                elif isinstance(module, _BatchNorm) and module.running_mean is None:
                    replaced.forward(module, Layer.OWN, _without_statistics)
            try:
                return self._tried(tree_map(torch.clone, x))  # which may change it in place
            except Exception:  # it takes no such batch, no such length: the loop itself will say so
                return None

    def _smooth(self, neuron: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In the place of a neuron: of the form of its output, but for each sample and step a function of its input."""
        output = forward(*args, **kwargs)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            raise _CannotTellError
        self._see(self._paths[neuron], x, folded=not neuron.multi_step)
        rows = 2 if neuron.multi_step else 1

        def smooth(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.shape[:rows] != x.shape[:rows]:
                raise _CannotTellError
            flat = x.flatten(0, rows - 1).flatten(1) if x.dim() > rows else x.flatten()[:, None]
            needed = value[(0,) * rows].numel()
            flat = flat.repeat(1, -(-needed // max(flat.shape[1], 1)))[:, :needed]
            return (flat / (1 + flat.abs())).to(value.dtype).reshape(value.shape)

        return tree_map(smooth, output)

    def _see(self, path: str, value: Any, folded: bool) -> None:
        """Remember a tensor that has its steps in front, or folded into the batch."""
        if not isinstance(value, Tensor) or not value.dim():
            return
        if folded and len(value) == self.time_steps * self._samples:
            value = value.unflatten(0, (self.time_steps, self._samples))
        elif folded or len(value) != self.time_steps:
            return
        self._seen.append((path, value.detach().clone()))

    def _devices(self) -> list[torch.device]:
        """The CUDA devices it draws from."""
        return list({weight.device for weight in self.net.parameters() if weight.is_cuda})

    @contextmanager
    def _random_numbers_kept(self) -> Iterator[None]:
        """Draw no random number that others would have drawn, and the same ones each time."""
        python, numpy = random.getstate(), sys.modules.get("numpy")
        drawn = None if numpy is None else numpy.random.get_state()
        try:
            with torch.random.fork_rng(devices=self._devices()):
                yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(drawn)


def _copied(net: nn.Module) -> nn.Module:
    """A copy with the same weights, without hooks but those of torch's own, which compute weights."""
    memo: dict[int, Any] = {id(weight): weight for weight in net.parameters()}
    for module in net.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach()
    copied = copy.deepcopy(net, memo | hooks_of_torch(net))
    if isinstance(copied, Reclassed):  # one call of it, and not a whole sequence
        copied.give_back_class()
    return copied


def hooks_of_torch(net: nn.Module) -> dict[int, Any]:
    """What `copy.deepcopy` takes for copies of hooks: torch's own, which compute weights, and none of the user's."""
    found = {}
    for module in net.modules():
        for name in HOOKS:
            hooks = getattr(module, name)
            found[id(hooks)] = type(hooks)((key, hook) for key, hook in hooks.items() if _is_of_torch(hook))
    return found


def _without_statistics(norm: nn.Module, forward: Callable[..., Any], x: Tensor) -> Tensor:
    """In the place of a batch norm whose statistics are those of a call."""
    return x


def _is_of_torch(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.")


def _like(leaf: Tensor, shape: tuple[int, int], turned: bool) -> Tensor:
    """An input of another size, and another one: random numbers, or the numbers that there are where they count things."""
    steps, samples = shape
    if leaf.is_floating_point():
        return torch.rand(*shape, *leaf.shape[2:], dtype=leaf.dtype, device=leaf.device)
    part = leaf[:1, :samples].expand(steps, *leaf[:1, :samples].shape[1:]).clone()
    return part.flip([*range(1, part.dim())]) if turned else part


def _generator_of(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index]


def _where(path: str) -> str:
    return f"the input of {path!r}" if path else "what it returns"


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by no more than rounding; nothing here is decided by a threshold."""
    if a.shape != b.shape or a.is_complex():
        return a.shape == b.shape
    a, b = a.double(), b.double()
    return torch.allclose(a, b, rtol=0, atol=1e-3 * max(float(a.abs().max()), 1e-6), equal_nan=True)


def _equal(a: Seen, b: Seen, steps: slice) -> bool:
    """Whether two runs have seen the same at these steps."""
    if len(a) != len(b):
        return False
    return all(x.shape == y.shape and torch.equal(x[steps], y[steps]) for (_, x), (_, y) in zip(a, b))
