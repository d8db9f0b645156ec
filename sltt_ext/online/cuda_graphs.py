"""Whole iterations as CUDA graphs: one launch instead of thousands, with the same numbers.

A graph is a recording of what an iteration has launched. A replay launches the same kernels on the same memory. Python code
between the launches runs only once, during the recording. So an iteration is captured only if nothing forbids it, and its
graph is used again only while everything that it has frozen is the same (`frozen`). The steps of SLTT-K are drawn outside of
the graph. The first iterations run without graphs, on the stream that captures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from sltt_ext.errors import ConfigurationError, SLTTError, warn
from sltt_ext.online.capture import recording
from sltt_ext.online.frozen import Frozen, Iteration, Watch, described, generators, refuse, surroundings
from sltt_ext.online.objective import IterationLoss

__all__ = ["Captured", "CudaGraphs", "GraphBackend", "IterationGraphs"]

WARM_UP = 3
"""Iterations without a graph, at least; and one with the very steps that are captured."""
AT_MOST = 32
"""Graphs of a trainer; each keeps the memory of one gradient, and all share that of an iteration."""

_IN_A_ROW = 50
"""Iterations without a graph, one after the other, after which that is said."""


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


class IterationGraphs:
    """The graphs of one trainer.

    Args:
        backend: Who captures.

    Attributes:
        captured: How many iterations have been captured.
    """

    def __init__(self, backend: GraphBackend | None = None) -> None:
        self.backend = backend or CudaGraphs()
        self.captured = 0
        self._graphs: dict[Hashable, _Graph] = {}
        self._runs: Counter[Hashable] = Counter()
        self._frozen = Frozen()
        self._watch = Watch()
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
        every_draw = (held, described(x, target), surroundings(self.backend.device_type))
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
            warn(
                f"graph=True: {_IN_A_ROW} iterations in a row had no graph, as each was of another kind, or of one more than the "
                f"{AT_MOST} that are kept. The kind depends on the shape of the data, the mode, plain attributes of modules, and the "
                "steps that SLTT-K has drawn: k=1, or data of one shape, has fewer kinds"
            )

    def _capture(
        self, one: Iteration, x: Any, target: Any, counts: Mapping[int, float], device: torch.device
    ) -> _Graph:
        static = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (x, target))
        recorded = _Recorded(one, static, counts)
        sources = list(generators(one).values())
        torch.clear_autocast_cache()  # weights that were cast before are not cast in the graph
        try:
            with recording():
                captured = self.backend.capture(recorded.run, sources, device)
        except SLTTError:
            raise
        except RuntimeError as error:
            raise ConfigurationError(
                f"graph=True: the iteration cannot be captured ({str(error).strip().splitlines()[0]}). The network and the loss "
                "must not read values back from the device (.item(), float(loss), an if on a tensor), move data between devices or "
                "make tensors of Python numbers on the device: leave that out, or leave graph=True out"
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
