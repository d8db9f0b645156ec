"""A network that is compiled by blocks, so that everything else still works around it.

`torch.compile` of a whole network hides its modules from the time loop, and takes minutes. Here, parts of it are compiled,
each as one graph. These are the blocks that a network repeats (with one compilation for all of the same kind and shape), and
the parts between them that contain neurons. What does not depend on time stays outside, and is evaluated once an iteration as
always: a stem by itself, and a parametrised weight before the block that reads it, which then gets a plain tensor. A neuron's
first step starts from tensors like all others, so that one graph is enough for both.

The first pass of each kind runs without compilation. It is watched, and shows what is time-invariant.
"""

from __future__ import annotations

import itertools
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import CompilationError, warn
from sltt_ext.forwards import Layer, has_own_forward
from sltt_ext.neuron import SLTTNeuron, StatefulModule
from sltt_ext.online.capture import capturing
from sltt_ext.online.compiled import part_runs_compiled, runs_compiled
from sltt_ext.online.invariants import EvaluatedOnce
from sltt_ext.online.passes import Call, Pass, SpeedUp

__all__ = ["CompiledBlocks", "CompiledCode"]

_BACKEND = "inductor"
_KEEP_LAYOUT: dict[str, Any] = {"layout_optimization": False}
"""The compiler would turn every convolution on the CPU to channels last, and its weights with it, in each call."""
_NUMBER = itertools.count()


class CompiledCode:
    """What was compiled of a network, from one iteration to the next.

    Args:
        compile: Whether to compile; ``"try"`` runs the network as it is where it cannot be compiled.
    """

    def __init__(self, compile: bool | Literal["try"]) -> None:
        self.on = bool(compile)
        self._may_fail = compile == "try"
        self._seen: set[tuple[Any, ...]] = set()
        self._kinds: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()
        self._functions: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._states: dict[int, tuple[int, dict[SLTTNeuron, _Layout]]] = {}

    def __reduce__(self) -> Any:
        """Copies and files say whether to compile; what was compiled stays in this process."""
        return CompiledCode, ("try" if self._may_fail else self.on,)

    def is_new(self, one: Pass) -> bool:
        """Whether a pass is the first of its kind, which runs as it is."""
        return self._kind_of_pass(one) not in self._seen

    def saw(self, one: Pass, batch: int) -> None:
        """A pass is over: note its kind, and how the states that it has left lie in memory, if the batch is known."""
        self._seen.add(self._kind_of_pass(one))
        if not batch:
            return
        states = {neuron: neuron.state() for neuron in one.neurons if isinstance(neuron, SLTTNeuron)}
        layouts = {neuron: _Layout.of(state) for neuron, state in states.items() if state is not None}
        self._states[one.source.elements // batch] = batch, layouts

    def begin(self, one: Pass, batch: int) -> None:
        """Start from tensors, if it is known how they lie in memory; of another batch, too."""
        known, layouts = self._states.get(one.source.elements // batch, (batch, {}))
        for neuron, layout in layouts.items():
            if known == batch or layout.size[:1] == (known,):
                neuron.rest_as(layout.empty(layout.size if known == batch else (batch, *layout.size[1:])))

    def function(self, modules: Sequence[nn.Module]) -> Callable[..., Any]:
        """The compiled function that runs ``modules`` one after the other; one for all of the same kind."""
        kind = tuple(map(self._kind, modules))
        if kind not in self._functions:
            self._functions[kind] = _compiled(keeps_layout=_is_on_cpu(modules))
        return self._functions[kind]

    def failed(self, path: str, module: nn.Module, error: Exception) -> None:
        """Say why nothing is compiled.

        Raises:
            CompilationError: If the network may not run as it is.
        """
        what = f"{path or type(module).__name__}: {_reason(error)}"
        if not self._may_fail:
            raise CompilationError(
                f"the network cannot be compiled: {what}. Say compile='try' to run it as it is instead, or leave compile out"
            ) from error
        self.on = False
        warn(f"the network cannot be compiled: {what}. It runs as it is")

    def _kind_of_pass(self, one: Pass) -> tuple[Any, ...]:
        return one.learns, one.differentiable, one.again, one.net.training

    def _kind(self, module: nn.Module) -> tuple[Any, ...]:
        """The same for modules that may share a compilation: what they print, and the shapes and devices of what they hold."""
        if module not in self._kinds:
            held = [*module.named_parameters(), *module.named_buffers()]
            classes = tuple(map(type, module.modules()))
            self._kinds[module] = (
                classes,
                repr(module),
                *((name, tensor.shape, tensor.device) for name, tensor in held),
            )
        return self._kinds[module]


class _Layout(NamedTuple):
    """How a tensor lies in memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        return cls(tensor.size(), tensor.stride(), tensor.dtype, tensor.device)

    def empty(self, size: tuple[int, ...]) -> Tensor:
        """Another tensor that lies so, with another batch perhaps, which is outermost."""
        return torch.empty_strided(size, self.stride, dtype=self.dtype, device=self.device)


class Part(NamedTuple):
    """What runs as one graph: a module, or some of the children of a sequential one.

    Attributes:
        path: Where it is.
        owner: The module whose forward is replaced.
        segments: For a sequential one, its children in order, each run of them compiled or not.
    """

    path: str
    owner: nn.Module
    segments: tuple[tuple[tuple[nn.Module, ...], bool], ...] = ()

    def compiled(self) -> list[nn.Module]:
        """The modules that run compiled."""
        if not self.segments:
            return [self.owner]
        return [module for modules, is_compiled in self.segments if is_compiled for module in modules]


class CompiledBlocks(SpeedUp):
    """Runs the parts of a network compiled, for one pass.

    Args:
        code: What is compiled.
        once: What evaluates time-invariant modules.
        waits: Whether the pass is measured, and so runs as it is.
    """

    def __init__(self, code: CompiledCode, once: EvaluatedOnce, waits: bool) -> None:
        self._code = code
        self._once = once
        self._waits = waits
        self._weights: dict[nn.Module, list[tuple[dict[str, Any], str, nn.Module]]] = {}
        self._one: Pass | None = None
        self._batch = 0
        self._compiles = False

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Stand in for the forwards of the parts."""
        looked_at = (
            torch._C._len_torch_dispatch_stack() > 0
        )  # by a mode, which sees no operator of what is compiled
        if not self._code.on or self._waits or looked_at or capturing():
            yield
            return
        self._one, self._compiles = one, not self._code.is_new(one)
        if self._compiles:
            alone = max(one.sizes.chunk, one.sizes.group) > one.sizes.part
            for part in _Parts(one.net, self._once.holds, alone).found:
                for module in part.compiled():
                    one.replaced.at_end(part_runs_compiled(module))
                    self._hand_weights_in(one, module)
                around = partial(self._run_segments, part) if part.segments else partial(self._run, part)
                one.replaced.forward(part.owner, Layer.COMPILED, around)
        yield
        self._code.saw(one, self._batch)

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Have the first one start from tensors."""
        one = self._one
        if one is not None and not self._batch:
            self._batch = _batch(call.frame, one.multi_step) if one.source.elements else 0
            if self._batch and self._compiles and one.from_rest and call.start == 0:
                self._code.begin(one, self._batch)
        yield

    def _run(self, part: Part, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call(part, (module,), forward, args, kwargs)

    def _run_segments(self, part: Part, module: nn.Module, forward: Any, x: Any) -> Any:
        for modules, is_compiled in part.segments:
            eager = partial(_in_turn, modules)
            x = self._call(part, modules, eager, (x,), {}) if is_compiled else eager(x)
        return x

    def _call(
        self, part: Part, modules: tuple[nn.Module, ...], eager: Any, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        weights = [entry for module in modules for entry in self._weights.get(module, ())]
        for store, name, weight in weights:
            store[name] = weight()
        if self._code.on:
            alone = not part.segments
            try:
                return self._code.function(modules)(modules, alone, args, kwargs)
            except Exception as error:
                if not _is_of_the_compiler(error):
                    raise
                self._code.failed(part.path, part.owner, error)
        return eager(*args, **kwargs)

    def _hand_weights_in(self, one: Pass, part: nn.Module) -> None:
        """Have the modules of a part read plain tensors in the place of parametrised ones that are evaluated once."""
        for module in part.modules():
            if not parametrize.is_parametrized(module):
                continue
            lists: Any = module.parametrizations
            if not all(map(self._once.holds, lists.values())):
                continue
            one.replaced.at_end(partial(setattr, module, "__class__", type(module)))
            for name, weight in lists.items():
                one.replaced.attribute(module, name, None)
                self._once.stand_in(one, weight)
                self._weights.setdefault(part, []).append((vars(module), name, weight))
            module.__class__ = parametrize.type_before_parametrizations(module)


class _Parts:
    """Finds the parts of a network that are compiled.

    Args:
        net: The network.
        holds: Whether a module is evaluated once an iteration.
        alone: Whether neurons are compiled by themselves: others stand around the modules next to them.
    """

    def __init__(self, net: nn.Module, holds: Callable[[nn.Module], bool], alone: bool) -> None:
        self._holds = holds
        self._classes = Counter(map(type, net.modules()))
        self._seen: set[nn.Module] = set()
        self.found: list[Part] = []
        self._visit("", net, alone)

    def _visit(self, path: str, module: nn.Module, alone: bool) -> None:
        if module in self._seen or not _has_neurons(module) or runs_compiled(module):
            return
        self._seen.add(module)
        if isinstance(module, SLTTNeuron):
            if not has_own_forward(module):
                self.found.append(Part(path, module))
            return
        alone = alone or (isinstance(module, StatefulModule) and module.keeps_steps_apart)
        whole = not (alone or has_own_forward(module) or isinstance(module, StatefulModule))
        own = type(module).__module__.split(".")[0] != "torch"
        if whole and own and self._is_plain(module):
            self.found.append(Part(path, module))
            return
        if whole and type(module) is nn.Sequential:
            segments = self._segments(module)
            if any(is_compiled for _, is_compiled in segments):
                self.found.append(Part(path, module, segments))
        for name, child in module.named_children():
            if not self._is_in_segment(child):
                self._visit(f"{path}.{name}" if path else name, child, alone)

    def _is_plain(self, module: nn.Module) -> bool:
        """Whether nothing in a module is to stay outside, or a part by itself."""
        return not any(
            self._holds(inner) or runs_compiled(inner) or (inner is not module and self._is_block(inner))
            for inner in module.modules()
            if not isinstance(inner, parametrize.ParametrizationList)
        )

    def _is_block(self, module: nn.Module) -> bool:
        """Whether a module is one of several of its class, of the user's own, that have neurons."""
        own = type(module).__module__.split(".")[0] != "torch"
        repeated = self._classes[type(module)] > 1 and own and not isinstance(module, SLTTNeuron)
        return repeated and _has_neurons(module)

    def _segments(self, module: nn.Sequential) -> tuple[tuple[tuple[nn.Module, ...], bool], ...]:
        runs: list[tuple[list[nn.Module], bool]] = []
        for child in module:
            joins = self._is_plain(child) and not self._is_block(child) and not has_own_forward(child)
            if runs and runs[-1][1] == joins:
                runs[-1][0].append(child)
            else:
                runs.append(([child], joins))
        return tuple(
            (tuple(children), joins and any(map(_has_neurons, children))) for children, joins in runs
        )

    def _is_in_segment(self, module: nn.Module) -> bool:
        return any(part.segments and module in part.compiled() for part in self.found)


def _has_neurons(module: nn.Module) -> bool:
    return any(isinstance(inner, SLTTNeuron) for inner in module.modules())


def _batch(frame: Any, multi_step: bool) -> int:
    """The batch of a frame; 0 where its parts do not tell."""
    sizes = {
        leaf.shape[multi_step] for leaf in tree_leaves(frame) if isinstance(leaf, Tensor) and leaf.dim() > 1
    }
    return sizes.pop() if len(sizes) == 1 else 0


def _in_turn(modules: Sequence[nn.Module], x: Any) -> Any:
    for module in modules:
        x = module(x)
    return x


def _run_part(
    modules: tuple[nn.Module, ...], alone: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What is compiled: ``modules`` in turn, or the forward of a single one, around which its hooks run."""
    if alone:
        return type(modules[0]).forward(modules[0], *args, **kwargs)
    (x,) = args
    for module in modules:
        x = module(x)
    return x


def _is_on_cpu(modules: Sequence[nn.Module]) -> bool:
    return all(weight.device.type == "cpu" for module in modules for weight in module.parameters())


def _compiled(keeps_layout: bool) -> Callable[..., Any]:
    """`_run_part`, compiled; a function of its own: the compiler counts, and takes for one, what has the same name.

    Args:
        keeps_layout: Whether tensors lie in memory as they do in the network that is not compiled.
    """
    code = _run_part.__code__.replace(co_name=f"{_run_part.__name__}_{next(_NUMBER)}")
    function = types.FunctionType(code, _run_part.__globals__, code.co_name)
    options = _KEEP_LAYOUT if keeps_layout and _BACKEND == "inductor" else None
    return torch.compile(function, fullgraph=True, backend=_BACKEND, options=options)


def _is_of_the_compiler(error: Exception) -> bool:
    return any(cls.__module__.startswith(("torch._dynamo", "torch._inductor")) for cls in type(error).__mro__)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])
