"""Whole iterations as CUDA graphs: one launch instead of thousands, for the same numbers.

A graph is a recording of what an iteration has launched: the same kernels, on the same memory, whenever it is replayed. What
Python does in between is done once, while it is recorded. So an iteration is captured only if nothing forbids it (`refuse`), and
its graph is used again only where all that it has frozen is what it was: shapes, weights in the same place, plain attributes of
modules, autocast, and the steps that SLTT-K has drawn, which are drawn outside of it (`_Frozen`, `IterationGraphs.run`). The first
iterations run as they would without graphs, on the stream that captures, and are watched for what a graph would freeze.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from sltt_ext.errors import ConfigurationError, SLTTError, SLTTWarning, listed
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.capture import recording
from sltt_ext.online.distributed import is_distributed
from sltt_ext.online.gradient_hooks import gradient_hooks
from sltt_ext.online.objective import IterationLoss

__all__ = ["Captured", "CudaGraphs", "GraphBackend", "Iteration", "IterationGraphs"]

WARM_UP = 3
"""Iterations without a graph, at least; and one with the very steps that are captured."""
AT_MOST = 32
"""Graphs of a trainer; each keeps the memory of one gradient, and all share that of an iteration."""

_IN_A_ROW = 50
"""Iterations without a graph, one after the other, after which that is said."""

_PLAIN = (bool, int, float, str, type(None))
_CANNOT = "graph=True cannot capture this iteration:"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Place = tuple[str, str]


class Captured(NamedTuple):
    """A captured run.

    Attributes:
        outputs: What it returned: the memory that each replay writes to.
        replay: Runs it again.
    """

    outputs: list[Tensor]
    replay: Callable[[], Any]


class GraphBackend(Protocol):
    """Who captures.

    Attributes:
        device_type: On which kind of device.
    """

    device_type: str

    def aside(self, device: torch.device) -> AbstractContextManager[Any]:
        """Where what will be captured runs before: on the stream that captures."""
        ...

    def capture(
        self, run: Callable[[], list[Tensor]], generators: Sequence[torch.Generator], device: torch.device
    ) -> Captured:
        """Record ``run()``, which draws from these generators besides the device's own; nothing it launches is executed."""
        ...


class CudaGraphs:
    """`torch.cuda.CUDAGraph`: all graphs of a trainer share one pool of memory, as no two of them run at a time."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pool: Any = None

    @contextmanager
    def aside(self, device: torch.device) -> Iterator[None]:
        """The stream that captures, after all that was launched so far, and before all that will be."""
        stream, current = self._stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)

    def capture(
        self, run: Callable[[], list[Tensor]], generators: Sequence[torch.Generator], device: torch.device
    ) -> Captured:
        """Record ``run()``; other threads, such as those that load data, may go on meanwhile."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with (
            torch.cuda.device(device),
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream(device), capture_error_mode="thread_local"
            ),
        ):
            outputs = run()
        self._pool = graph.pool()
        return Captured(outputs, graph.replay)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


@dataclass(frozen=True)
class Iteration:
    """One iteration of a trainer, as graphs need to know it.

    Attributes:
        net: The network, with its wrappers.
        loss_fn: The loss.
        leaves: Everything that it gives a gradient to.
        run: ``(x, target, counts) -> result`` without a graph: an `OnlineResult`.
        reset: Puts the neurons' states back to rest.
        is_settled: Whether the last run would be run the same way again, with nothing left to be measured.
        forbidden: What the trainer's options forbid, by name.
    """

    net: nn.Module
    loss_fn: Any
    leaves: Sequence[Tensor]
    run: Callable[[Any, Any, Mapping[int, float]], Any]
    reset: Callable[[], Any]
    is_settled: Callable[[], bool]
    forbidden: Mapping[str, str] = field(default_factory=dict)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Everything that is called, by its path."""
        yield from self.net.named_modules()
        if isinstance(self.loss_fn, nn.Module):
            yield from self.loss_fn.named_modules(prefix="loss_fn")


class IterationGraphs:
    """The graphs of one trainer.

    Args:
        backend: Who captures.
    """

    def __init__(self, backend: GraphBackend | None = None) -> None:
        self.backend = backend or CudaGraphs()
        self.captured = 0
        self._graphs: dict[Hashable, _Graph] = {}
        self._runs: Counter[Hashable] = Counter()
        self._frozen = _Frozen()
        self._watch = _Watch()
        self._in_a_row = 0
        self._has_said = False

    def run(self, one: Iteration, x: Any, target: Any, counts: Mapping[int, float]) -> Any:
        """The result of an iteration, from a graph as soon as there is one. The states are at rest afterwards.

        Raises:
            ConfigurationError: If it cannot be captured.
        """
        device = refuse(one, x, target, self.backend.device_type)
        if torch._C._len_torch_dispatch_stack():  # who looks at operators sees none in a graph
            return self._eager(one, x, target, counts)
        held, moved = self._frozen.version(one)
        if moved:  # weights are elsewhere: no graph will find its own again
            self._graphs.clear()
        every_draw = (held, _described(x, target), _surroundings(self.backend.device_type))
        key = (every_draw, tuple(counts.items()))
        graph = self._graphs.get(key)
        if graph is not None:
            self._in_a_row = 0
            return graph.replay(x, target)
        self._say_if_many()
        if self._runs[every_draw] < WARM_UP or not self._runs[key]:
            result, settled = self._warm_up(one, x, target, counts, device)
            self._runs.update([every_draw, key] if settled else [])
            return result
        if len(self._graphs) >= AT_MOST:
            return self._eager(one, x, target, counts)
        graph = self._graphs[key] = self._capture(one, x, target, counts, device)
        return graph.replay(x, target)

    def _eager(self, one: Iteration, x: Any, target: Any, counts: Mapping[int, float]) -> Any:
        result = one.run(x, target, counts)
        one.reset()
        return result

    def _warm_up(
        self, one: Iteration, x: Any, target: Any, counts: Mapping[int, float], device: torch.device
    ) -> tuple[Any, bool]:
        """The result of an iteration without a graph, and whether others like it can be captured, as far as it shows."""
        with self._watch.watching(one, (x, target), self._frozen, self.backend.device_type):
            with self.backend.aside(device):
                result = one.run(x, target, counts)
            one.reset()
        return result, one.is_settled()

    def _say_if_many(self) -> None:
        """Warn, once, if graphs are asked for and not used."""
        self._in_a_row += 1
        if self._in_a_row == _IN_A_ROW and not self._has_said:
            self._has_said = True
            warnings.warn(
                f"graph=True: {_IN_A_ROW} iterations in a row had no graph, as each was of another kind, or of one more than the "
                f"{AT_MOST} that are kept. A kind is a shape of the data, a mode, plain attributes of modules, and the steps that "
                "SLTT-K has drawn: k=1, or data of one shape, has fewer",
                SLTTWarning,
                stacklevel=4,
            )

    def _capture(
        self, one: Iteration, x: Any, target: Any, counts: Mapping[int, float], device: torch.device
    ) -> _Graph:
        static = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (x, target))
        recorded = _Recorded(one, static, counts)
        generators = list(_generators(one).values())
        torch.clear_autocast_cache()  # weights that were cast before are not cast in the graph
        try:
            with recording():
                captured = self.backend.capture(recorded.run, generators, device)
        except SLTTError:
            raise
        except RuntimeError as error:
            raise ConfigurationError(
                f"graph=True: the iteration cannot be captured ({str(error).strip().splitlines()[0]}). A network or a loss that "
                "reads values back from the device (.item(), float(loss), an if on a tensor), moves data between devices or "
                "makes tensors of Python numbers on the device has to leave that out, or the trainer graph=True"
            ) from error
        finally:
            torch.clear_autocast_cache()  # what is in it now is the graph's own memory
            one.reset()
        self.captured += 1
        return _Graph(static, recorded, captured)


class _Recorded:
    """An iteration that leaves nothing behind but what it returns: it is executed by its replays.

    Attributes:
        result: What it returned, with the tensors of the recording.
        with_gradient: The leaves that got a gradient.
    """

    def __init__(self, one: Iteration, static: tuple[Any, Any], counts: Mapping[int, float]) -> None:
        self._one = one
        self._static = static
        self._counts = counts
        self.result: Any = None
        self.with_gradient: list[Tensor] = []

    def run(self) -> list[Tensor]:
        """The loss, the outputs and the gradients."""
        one = self._one
        wanting = [leaf for leaf in dict.fromkeys(one.leaves) if leaf.requires_grad and leaf.is_leaf]
        before = [leaf.grad for leaf in wanting]
        try:
            for leaf in wanting:
                leaf.grad = None
            self.result = one.run(*self._static, self._counts)
            one.reset()
            self.with_gradient = [leaf for leaf in wanting if leaf.grad is not None]
            gradients = [leaf.grad for leaf in self.with_gradient]
            return [self.result.loss.as_subclass(Tensor), *tree_leaves(self.result.output), *gradients]
        finally:
            for leaf, gradient in zip(wanting, before):
                leaf.grad = gradient


class _Graph:
    """A captured iteration.

    Args:
        static: The input and the target that it reads.
        recorded: What was captured.
        captured: The recording.
    """

    def __init__(self, static: tuple[Any, Any], recorded: _Recorded, captured: Captured) -> None:
        self._reads = [leaf for leaf in tree_leaves(static) if isinstance(leaf, Tensor)]
        self._replay = captured.replay
        self._leaves = recorded.with_gradient
        _, self._structure = tree_flatten(recorded.result.output)
        outputs = len(captured.outputs) - len(self._leaves)
        self._outputs, self._gradients = captured.outputs[:outputs], captured.outputs[outputs:]
        self._result = replace(recorded.result, loss=None, output=None)

    @torch.no_grad()
    def replay(self, x: Any, target: Any) -> Any:
        """The result of an iteration on other data; its gradient is accumulated as backward accumulates it.

        What it gives out is the user's own: the next replay writes over none of it.
        """
        given = [leaf for leaf in tree_leaves((x, target)) if isinstance(leaf, Tensor)]
        for static, tensor in zip(self._reads, given, strict=True):
            static.copy_(tensor, non_blocking=True)
        self._replay()
        loss, *output = (tensor.clone() for tensor in self._outputs)
        self._accumulate()
        return replace(
            self._result, loss=IterationLoss.of(loss), output=tree_unflatten(output, self._structure)
        )

    def _accumulate(self) -> None:
        old: tuple[list[Tensor], list[Tensor]] = ([], [])
        new: tuple[list[Tensor], list[Tensor]] = ([], [])
        for leaf, gradient in zip(self._leaves, self._gradients):
            if leaf.grad is None:
                leaf.grad = torch.empty_like(gradient)
                new[0].append(leaf.grad)
                new[1].append(gradient)
            else:
                old[0].append(leaf.grad)
                old[1].append(gradient)
        if new[0]:
            torch._foreach_copy_(*new)
        if old[0]:
            torch._foreach_add_(*old)


class _Frozen:
    """What a graph freezes of modules: where their tensors are, which of them are trained, and their plain attributes."""

    def __init__(self) -> None:
        self.states: set[Place] = set()
        self._known: dict[int, dict[Place, Any]] = {}
        self._latest = -1

    def version(self, one: Iteration) -> tuple[int, bool]:
        """A number for all that is frozen, the same for the same, and whether weights have moved since earlier versions."""
        now = self.held(one)
        for number, known in self._known.items():
            if known == now:
                return number, False
        moved = bool(self._known) and _weights(now) != _weights(self._known[self._latest])
        self._latest += 1
        self._known[self._latest] = now
        self._known.pop(self._latest - AT_MOST, None)
        return self._latest, moved

    def held(self, one: Iteration) -> dict[Place, Any]:
        """All of it, but for what is known as state."""
        found: dict[Place, Any] = {}
        for path, module in one.modules():
            found[path, ""] = type(module)
            for store in (vars(module), module._parameters, module._buffers):
                for name, value in store.items():
                    if isinstance(value, Tensor):
                        found[path, name] = _Where(
                            value.data_ptr(), value.requires_grad, value.dtype, value.shape
                        )
                    elif isinstance(value, _PLAIN) and not name.startswith("_sltt"):
                        found[path, name] = value
        for place in self.states & found.keys():
            del found[place]
        return found


class _Where(NamedTuple):
    pointer: int
    requires_grad: bool
    dtype: torch.dtype
    shape: torch.Size


def _weights(held: Mapping[Place, Any]) -> dict[Place, int]:
    return {place: value.pointer for place, value in held.items() if isinstance(value, _Where)}


class _Watch:
    """Sees, in the iterations that run without a graph, what a graph would not do: what changes in two of them, one after the other."""

    def __init__(self) -> None:
        self._changed: set[Place] = set()

    @contextmanager
    def watching(self, one: Iteration, given: Any, frozen: _Frozen, device_type: str) -> Iterator[None]:
        """Surround an iteration.

        Raises:
            ConfigurationError: If it changes what a graph freezes.
        """
        one.reset()
        before, draws, versions = frozen.held(one), _host_draws(device_type), _versions(given)
        yield
        if _versions(given) != versions:
            raise ConfigurationError(
                listed(_CANNOT, {"x": "the network or the loss changes it in place, and a graph has a copy"})
            )
        after = frozen.held(one)
        changed = {place for place in after if after[place] != before.get(place)}
        states = {place for place in changed if _is_state(one, place, after[place])}
        frozen.states |= states
        changed -= states
        changed |= {
            ("", name)
            for name, state in _host_draws(device_type).items()
            if not _same(state, draws.get(name))
        }
        again, self._changed = changed & self._changed, changed
        if again:
            raise ConfigurationError(listed(_CANNOT, {_named(place): _why(place) for place in again}))


def _is_state(one: Iteration, place: Place, value: Any) -> bool:
    """Whether a tensor belongs to a module whose state the time loop knows, and resets."""
    path, _ = place
    return isinstance(value, _Where) and isinstance(dict(one.modules()).get(path), StatefulModule)


def _named(place: Place) -> str:
    return ".".join(filter(None, place))


def _why(place: Place) -> str:
    path, name = place
    if path == "" and name in _HOST_DRAWS:
        return f"every iteration draws from {name}, and a graph would freeze the draw: draw on the device, by torch"
    return (
        "every iteration gives it another value, and a graph would freeze the first one: count in a tensor, changed in place "
        "(self.count.add_(1)), or register the state of a neuron (SpikingJelly: register_memory)"
    )


_HOST_DRAWS = ("torch's generator on the CPU", "Python's random", "NumPy's random")


def _host_draws(device_type: str) -> dict[str, Any]:
    """States of the generators that are not the device's."""
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    states = (
        torch.get_rng_state() if device_type != "cpu" else None,
        random.getstate(),
        None if numpy is None else numpy.get_state(legacy=False)["state"],
    )
    return dict(zip(_HOST_DRAWS, states))


def _same(state: Any, before: Any) -> bool:
    if isinstance(state, Tensor):
        return torch.equal(state, before)
    if isinstance(state, dict):
        return all(bool((state[name] == before[name]).all() if hasattr(state[name], "all") else state[name] == before[name]) for name in state)  # fmt: skip
    return bool(state == before)


def _versions(given: Any) -> list[int]:
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _described(x: Any, target: Any) -> Hashable:
    """What a graph freezes of its input and its target."""
    leaves, structure = tree_flatten((x, target))
    return str(structure), tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    )


def _surroundings(device_type: str) -> Hashable:
    """What a graph freezes of torch's own settings."""
    return (
        torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type), torch.is_autocast_cache_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), torch.get_default_dtype(),
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
    )  # fmt: skip


def _generators(one: Iteration) -> dict[Place, torch.Generator]:
    """The generators that modules have for themselves."""
    return {
        (path, name): value
        for path, module in one.modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Generator)
    }


def refuse(one: Iteration, x: Any, target: Any, device_type: str) -> torch.device:
    """The device of an iteration, if nothing is known to forbid a graph of it.

    Raises:
        ConfigurationError: If something does; all of it is named.
    """
    found = dict(one.forbidden)
    if is_distributed(one.net):
        found["several processes"] = "their exchange of gradients is not captured: leave graph=True out there"
    devices = {leaf.device for leaf in one.leaves}
    if len(devices) != 1 or next(iter(devices)).type != device_type:
        where = ", ".join(sorted(map(str, devices)))
        found["the device"] = (
            f"network, loss and input have to be on one {device_type.upper()} device, and are on {where}"
        )
    for path, module in one.modules():
        if any(getattr(module, name) for name in _HOOKS):
            found[path or "the network"] = (
                "its hooks are Python, and a replay calls none: remove them, or graph=True"
            )
        for name, parameter in module._parameters.items():
            if parameter is not None and gradient_hooks(parameter):
                found[_named((path, name))] = "a hook waits for its gradient, and a replay calls none"
    for place, generator in _generators(one).items():
        if generator.device.type != device_type:
            found[_named(place)] = (
                f"it is a generator on the {generator.device.type.upper()}, and a graph would freeze what it draws"
            )
    found |= _refused_data("x", x, (dict,)) | _refused_data("target", target, (dict, tuple, list))
    if found:
        raise ConfigurationError(listed(_CANNOT, found))
    return devices.pop()


def _refused_data(name: str, value: Any, containers: tuple[type, ...]) -> dict[str, str]:
    if not isinstance(value, (Tensor, *containers, *_PLAIN)):
        return {
            name: f"it is a {type(value).__name__}, and has to be a tensor or {containers[0].__name__} of tensors"
        }
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                return {name: "it wants a gradient, which a graph gives to its copy: detach() it"}
        elif not isinstance(leaf, _PLAIN):
            return {name: f"there is a {type(leaf).__name__} in it, and a graph reads tensors"}
    return {}
