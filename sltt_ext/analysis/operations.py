"""Scalar multiplications and additions of one training iteration (Meng et al. 2023, Sec. 4.2).

Matrix products (linear layers, convolutions, attention) are counted as they run, forward and backward, by the
formulas of ``torch.utils.flop_counter``: a multiplication and an addition for every term of every sum. Element-wise
products and sums and batch norm are counted as they run, too. Neurons are counted by the formulas in
`sltt_ext.analysis.neuron_operations`, whatever operator runs them. These are not counted: pooling, copies, the loss, the
sum of gradients where branches meet, and the update.

Every step costs the same. So two steps are run, not T. Those of SLTT give the cost of a step forward and of its spatial
backward. The additional cost of BPTT's backward is temporal, and arises once for each of the T - 1 transitions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sltt_ext.analysis import plots
from sltt_ext.analysis.modules import neurons_of, running_module, without_multi_step
from sltt_ext.analysis.neuron_operations import Count, NeuronOperations, neuron_operations
from sltt_ext.analysis.restoring import restoring
from sltt_ext.conversion import convert
from sltt_ext.methods import GradientTrainer, Method, check_time_steps, method_named
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.options import TimeDim
from sltt_ext.online.outputs import Output
from sltt_ext.optional import require

__all__ = ["LayerOperations", "OperationCounts", "operation_counts", "plot_methods"]


@dataclass(frozen=True)
class LayerOperations:
    """Scalar operations of one module in one training iteration.

    Attributes:
        layer: Path of the module. Operations of its children count for the children.
        kind: Its class.
        phase: ``"forward"`` or ``"backward"``.
        domain: ``"spatial"`` (from layer to layer within a step) or ``"temporal"`` (from step to step).
        multiplications: Scalar multiplications.
        additions: Scalar additions.
    """

    layer: str
    kind: str
    phase: str
    domain: str
    multiplications: int
    additions: int


@dataclass(frozen=True)
class OperationCounts:
    """What `operation_counts` counted.

    Attributes:
        method: ``"BPTT"``, ``"SLTT"`` or ``"SLTT-K"``.
        time_steps: T.
        rows: One for each module, phase and domain with any operations.
        assumed: Paths of neurons for which there is no formula. They are counted as LIF neurons with soft reset.
    """

    method: str
    time_steps: int
    rows: tuple[LayerOperations, ...]
    assumed: tuple[str, ...]

    def total(self, phase: str | None = None, domain: str | None = None) -> Count:
        """Multiplications and additions of all layers, of one phase or domain if given."""
        chosen = (row for row in self.rows if phase in (None, row.phase) and domain in (None, row.domain))
        return sum((Count(row.multiplications, row.additions) for row in chosen), Count())

    def to_dataframe(self) -> Any:
        """The rows as a ``pandas.DataFrame``."""
        return require("pandas", extra="analysis").DataFrame([asdict(row) for row in self.rows])

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: multiplications by layer, by phase and domain."""
        layers: dict[str, list[LayerOperations]] = defaultdict(list)
        for row in self.rows:
            layers[row.layer or "(network)"].append(row)
        return _stacked(layers, f"{self.method}, T = {self.time_steps}")


def plot_methods(results: Sequence[OperationCounts]) -> Any:
    """A ``matplotlib.figure.Figure``: multiplications of several methods, by phase and domain."""
    return _stacked({result.method: result.rows for result in results})


def _stacked(rows: Mapping[str, Sequence[LayerOperations]], title: str = "") -> Any:
    parts = {
        f"{phase}, {domain}": [
            float(sum(row.multiplications for row in own if (row.phase, row.domain) == (phase, domain)))
            for own in rows.values()
        ]
        for phase in ("forward", "backward")
        for domain in ("spatial", "temporal")
    }
    return plots.stacked_bars(list(rows), parts, xlabel="scalar multiplications", title=title)


def operation_counts(
    net: nn.Module,
    x: Any,
    method: str = "sltt",
    time_steps: int = 6,
    *,
    time_dim: TimeDim | None = None,
    output: Output = None,
) -> OperationCounts:
    """Scalar operations of one training iteration, by layer, phase and domain; see `sltt_ext.analysis.operations`.

    Afterwards the network is as before.

    Args:
        net: A network that `convert` knows, converted or not.
        x: One batch, as `OnlineTrainer` takes it; the counts are for the whole batch.
        method: ``"bptt"``, ``"sltt"``, or ``"sltt-2"``, ... for SLTT-K: all T steps forward, K backward.
        time_steps: T.
        time_dim: As in `OnlineTrainer`.
        output: What the loss reads of the network's return value, as in `OnlineTrainer`.

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import layer, neuron
        >>> net = nn.Sequential(layer.Linear(4, 8), neuron.IFNode(), layer.Linear(8, 2))
        >>> counts = operation_counts(net, torch.rand(1, 4), "sltt", time_steps=6)
        >>> counts.total("backward", "temporal")
        Count(multiplications=0, additions=0)
        >>> counts.total("backward").multiplications  # of each step 4 x 8, 8 neurons, and twice 8 x 2
        432
    """
    check_time_steps(time_steps)
    chosen = method_named(method)
    net = without_multi_step(net)

    def trainer(run: Method, steps: int) -> GradientTrainer:
        return run.trainer(net, lambda output, _: output.sum(), steps, time_dim=time_dim, output=output)

    with restoring(net):
        steps = _steps_to_run(net, time_steps)
        x = _first_steps(x, steps, time_dim)
        counter, neurons = _count(trainer(Method("sltt", chunk="all", cache_invariant=False), steps), x)
    table: dict[tuple[str, str, str], Count] = {}
    backward = chosen.backpropagated(time_steps)
    for (path, phase), count in counter.items():
        repeat = time_steps if phase == "forward" else backward
        table[path, phase, "spatial"] = _scaled(count["all"], repeat, steps)
    for path, (operations, elements) in neurons.items():
        _add_neuron(table, path, operations, elements, time_steps, backward, chosen.is_bptt)
    if chosen.is_bptt and steps > 1:
        with restoring(net):
            through_time, _ = _count(trainer(Method("bptt"), steps), x)
        for (path, phase), count in through_time.items():
            more = count["matrix"] + counter[path, phase]["matrix"].times(-1)
            if phase == "backward" and any(more):
                key = (path, phase, "temporal")
                table[key] = table.get(key, Count()) + _scaled(more, time_steps - 1, steps - 1)
    kinds = {path: type(module).__name__.removeprefix("SLTT") for path, module in net.named_modules()}
    order = list(kinds)
    rows = [
        LayerOperations(path, kinds[path], phase, domain, *count)
        for (path, phase, domain), count in sorted(table.items(), key=lambda item: order.index(item[0][0]))
        if any(count)
    ]
    assumed = tuple(path for path, (operations, _) in neurons.items() if operations.assumed)
    return OperationCounts(chosen.name, time_steps, tuple(rows), assumed)


def _add_neuron(
    table: dict[tuple[str, str, str], Count],
    path: str,
    operations: NeuronOperations,
    elements: int,
    time_steps: int,
    backward: int,
    through_time: bool,
) -> None:
    """Add the operations of ``elements`` neurons over an iteration."""
    parts = {
        ("forward", "spatial"): operations.forward_spatial.times(time_steps),
        ("forward", "temporal"): operations.forward_temporal.times(time_steps),
        ("backward", "spatial"): operations.backward_spatial.times(backward),
        ("backward", "temporal"): operations.backward_temporal.times(through_time * (time_steps - 1)),
    }
    for (phase, domain), count in parts.items():
        key = (path, phase, domain)
        table[key] = table.get(key, Count()) + count.times(elements)


def _steps_to_run(net: nn.Module, time_steps: int) -> int:
    """Two steps, or all steps if a module takes its whole sequence in one call."""
    whole = any(isinstance(m, StatefulModule) and m.whole_sequence for m in convert(net).modules())
    return time_steps if whole else min(2, time_steps)


def _first_steps(x: Any, steps: int, time_dim: TimeDim | None) -> Any:
    """The first ``steps`` steps of ``x``."""
    if isinstance(x, Tensor):
        return x if time_dim not in (0, 1) else x.narrow(time_dim, 0, min(steps, x.shape[time_dim]))
    return list(islice(iter(x), steps))


def _scaled(count: Count, repeat: int, steps: int) -> Count:
    """The operations of ``repeat`` steps, from those of ``steps`` steps."""
    return Count(count.multiplications * repeat // steps, count.additions * repeat // steps)


_Counts = dict[tuple[str, str], dict[str, Count]]


def _count(trainer: GradientTrainer, x: Any) -> tuple[_Counts, dict[str, tuple[NeuronOperations, int]]]:
    """Operations outside of neurons by module and phase; and each neuron's formula and elements per step."""
    net, neurons = trainer.net, neurons_of(trainer.net)
    elements: dict[str, int] = defaultdict(int)
    with running_module(net) as running:
        counter = _Counter(running, set(neurons))
        handles = [m.register_forward_hook(_output_counter(elements, path)) for path, m in neurons.items()]
        handles += [m.register_forward_hook(counter.tagging(path)) for path, m in net.named_modules()]
        with counter, _Tagger(counter):
            trainer.forward_backward(x, None)
        for handle in handles:
            handle.remove()
    return counter.counts, {
        path: (neuron_operations(module), elements[path] // trainer.time_steps)
        for path, module in neurons.items()
        if elements[path]
    }


def _output_counter(elements: dict[str, int], path: str) -> Any:
    def hook(module: nn.Module, args: Any, returned: Any) -> None:
        out = next((leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)), None)
        elements[path] += 0 if out is None else out.numel()

    return hook


class _Counter(TorchDispatchMode):
    """Counts the operators that run, for the module whose forward or whose part of the graph runs them."""

    def __init__(self, running: Any, neurons: set[str]) -> None:
        super().__init__()
        self.counts: _Counts = defaultdict(lambda: {"all": Count(), "matrix": Count()})
        self._running = running
        self._neurons = neurons
        self._nodes: dict[Any, str | None] = {}
        self._in_backward: str | None = None
        self._backward = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        owner = self._in_backward if self._backward else self._running()
        if owner is None:
            return out  # the loss, or a sum of gradients between two nodes
        packet = func._overloadpacket
        if packet in flop_registry:
            products = flop_registry[packet](*args, **(kwargs or {}), out_val=out) // 2
            self._add(owner, Count(products, products), "matrix")
        elif owner not in self._neurons:
            self._add(owner, _element_wise(packet.__name__, args, out), None)
        return out

    def _add(self, owner: str, count: Count, kind: str | None) -> None:
        if any(count):
            counts = self.counts[owner, "backward" if self._backward else "forward"]
            for name in ("all", kind) if kind else ("all",):
                counts[name] += count

    def tagging(self, path: str) -> Any:
        """A forward hook. It sees the nodes of custom functions when their module is done."""
        return lambda module, args, returned: self.tag(returned, path)

    def tag(self, returned: Any, path: str | None) -> None:
        """Remember which module made the newest nodes of the graph."""
        todo = [leaf.grad_fn for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
        while todo:
            node = todo.pop()
            if node is None or node in self._nodes or hasattr(node, "variable"):  # AccumulateGrad has that
                continue
            self._nodes[node] = path
            node.register_prehook(self._entered(path))
            node.register_hook(self._left)
            todo += [before for before, _ in node.next_functions]

    def tag_newest(self, returned: Any) -> None:
        """Remember that the module that is running made the newest nodes."""
        self.tag(returned, self._running())

    def _entered(self, path: str | None) -> Any:
        def hook(grad_outputs: Any) -> None:
            self._in_backward = path

        return hook

    def _left(self, grad_inputs: Any, grad_outputs: Any) -> None:
        self._in_backward = None

    @contextmanager
    def backward(self) -> Iterator[None]:
        """A block in which operators count as backward."""
        self._backward, self._in_backward = True, None
        try:
            yield
        finally:
            self._backward = False


class _Tagger(TorchFunctionMode):
    """Tells a counter of every node as it is made, and of every back-propagation."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.backward:
            with self._counter.backward():
                return func(*args, **(kwargs or {}))
        returned = func(*args, **(kwargs or {}))
        self._counter.tag_newest(returned)
        return returned


_ADDITIONS = {"add", "add_", "sub", "sub_", "rsub"}
_MULTIPLICATIONS = {"mul", "mul_", "div", "div_"}
_BATCH_NORM = {"native_batch_norm", "_native_batch_norm_legit", "batch_norm_with_update", "cudnn_batch_norm"}
_BATCH_NORM_BACKWARD = {"native_batch_norm_backward", "batch_norm_backward", "cudnn_batch_norm_backward"}


def _element_wise(name: str, args: tuple[Any, ...], out: Any) -> Count:
    """Operations of an element-wise operator, or of batch norm per element of its input.

    Batch norm, ``y = gamma (x - mean) r + beta``: 2 multiplications and 2 additions; batch statistics 1 and 2 more.
    Backward, ``dx = gamma r (g - mean(g) - x^ mean(g x^))``: the sums of ``g`` and ``g x^`` 2 and 3 with ``x^`` made
    again, ``dx`` 2 and 2; with running statistics ``dx = gamma r g``, 1 and 0.
    """
    if name in _ADDITIONS or name in _MULTIPLICATIONS:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return Count()
        return Count(0, out.numel()) if name in _ADDITIONS else Count(out.numel(), 0)
    if name in _BATCH_NORM:
        batch_statistics = name == "batch_norm_with_update" or bool(args[5])
        return Count(3, 4).times(args[0].numel()) if batch_statistics else Count(2, 2).times(args[0].numel())
    if name in _BATCH_NORM_BACKWARD:
        batch_statistics = name == "cudnn_batch_norm_backward" or bool(args[7])
        return Count(4, 5).times(args[0].numel()) if batch_statistics else Count(3, 3).times(args[0].numel())
    return Count()
