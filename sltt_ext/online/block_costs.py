"""How many bytes the blocks of a network need, and the borders that need the fewest.

They are counted in one call of the network with few samples. In that call, every node tells what it returns and what autograd
saves in it. At its peak, a block between two borders then needs these: the values at the borders up to its first one, for all
steps; the gradients at one of its borders, for the steps that are back-propagated together; what its graph saves; and twice
its largest value, for gradients on their way. The borders are chosen so that the largest of these sums is least.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from sltt_ext.errors import ConfigurationError
from sltt_ext.forwards import HOOKS, Replacements, has_hooks
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.online.borders import levels
from sltt_ext.online.chain import Chain, module_of
from sltt_ext.online.passes import Pass
from sltt_ext.online.snapshot import Snapshot
from sltt_ext.online.states import begin, one_call, reset
from sltt_ext.time_invariant import is_average_pooling, is_counting_batch_norm, is_time_invariant

__all__ = ["Cost", "batch_size", "costs", "least_borders", "most_parts", "parts_of_batch", "peak_bytes"]

_SAMPLES = 2
_MOST_PARTS, _FEWEST_SAMPLES = 8, 4
_BY_SAMPLE = {operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.relu}


@dataclass(frozen=True)
class Cost:
    """What one node needs, in bytes.

    Attributes:
        value: What it returns in one call.
        kept: That value as a border.
        state: What it carries from step to step.
        saved: What autograd saves in it.
        static: Whether its value is the same at every step, as long as no border is before it.
        border: Whether a border may be there.
        by_sample: Whether what it makes of a sample depends on no other one.
    """

    value: int
    kept: int
    state: int
    saved: int
    static: bool
    border: bool
    by_sample: bool


def batch_size(frame: Any, axis: int) -> int:
    """How many samples the input of a call has; 0 where that is not known."""
    sizes = {
        leaf.shape[axis] for leaf in tree_leaves(frame) if isinstance(leaf, Tensor) and leaf.dim() > axis
    }
    return sizes.pop() if len(sizes) == 1 else 0


def most_parts(batch: int) -> int:
    """In how many parts a batch may run: operators are slow on very few samples, and weights that are computed are so for each part."""
    return max(min(batch // _FEWEST_SAMPLES, _MOST_PARTS), 1)


def costs(chain: Chain, one: Pass, frame: Any, static: bool, packs: bool) -> list[Cost]:
    """The cost of each node of a network, in order; it is seen, too, that they give what the network gives.

    The network runs twice, from rest, with few samples of the batch and without the user's hooks, and leaves no trace.

    Args:
        chain: The network.
        one: The pass that is planned.
        frame: The input of its first call.
        static: Whether the input is the same at every step.
        packs: Whether spikes are saved as bits.

    Raises:
        ConfigurationError: If the network gives something else.
    """
    axis = int(one.multi_step)
    batch = batch_size(frame, axis)
    if batch > _SAMPLES:
        few = tree_map(
            lambda leaf: leaf.detach().narrow(axis, 0, _SAMPLES) if isinstance(leaf, Tensor) else leaf, frame
        )
        try:
            return _counted(chain, one, few, static, packs, batch / _SAMPLES)
        except ConfigurationError:
            raise
        except Exception:  # whatever a network does that needs its whole batch
            pass
    return _counted(chain, one, frame, static, packs, 1)


def _counted(chain: Chain, one: Pass, frame: Any, static: bool, packs: bool, factor: float) -> list[Cost]:
    (block,) = chain.blocks([])
    steps = one.sizes.chunk
    others = [*one.net.parameters(), *(leaf for leaf in tree_leaves(frame) if isinstance(leaf, Tensor))]
    seen = _Seen(chain, int(one.multi_step), static, packs, factor, set(map(_memory, others)))
    with Replacements() as replaced:
        for module in one.net.modules():
            for name in HOOKS:
                replaced.attribute(module, name, OrderedDict())
        before = Snapshot(one.net)
        replaced.at_end(before.restore)

        def gradients(run: Callable[[Any], Any]) -> list[Tensor | None]:
            before.restore()
            begin(one.neurons, replaced, True)
            with one_call(one.neurons, steps), torch.enable_grad():
                leaves = tree_leaves(one.output(run(frame), steps))
            weights = [p for p in one.net.parameters() if p.requires_grad]
            total = sum((_weighted(leaf) for leaf in leaves if isinstance(leaf, Tensor)), torch.zeros(()))
            found = [leaf.detach() for leaf in leaves]
            if isinstance(total, Tensor) and total.requires_grad and not isinstance(total, FakeTensor):
                found += torch.autograd.grad(total, weights, allow_unused=True)
            reset(one.neurons)
            return found

        block.seen = seen.see
        with saved_tensors_hooks(seen.save, lambda tensor: tensor):
            mine = gradients(block)
        if not any(isinstance(value, FakeTensor) for value in mine) and not all(
            map(_is_close, mine, gradients(one.run))
        ):
            raise ConfigurationError(
                "blocks= runs the network as its forward was traced, but that gives another output or gradient than the network "
                "itself: leave blocks= out, or make what forward decides depend only on its modules and input"
            )
    return seen.costs()


class _Seen:
    """What was seen of each node."""

    def __init__(
        self, chain: Chain, axis: int, static: bool, packs: bool, factor: float, others: set[int]
    ) -> None:
        self._nodes = chain.nodes
        self._points = set(chain.points)
        self._axis = axis
        self._packs, self._factor = packs, factor
        self._memories = others
        self._bits: set[int] = set()
        self._static = {chain.entry} if static else set()
        self._now: fx.Node = chain.entry
        self._saved: dict[fx.Node, float] = {}
        self._values: dict[fx.Node, tuple[float, bool]] = {}

    def see(self, node: fx.Node, run: Callable[[], Any]) -> Any:
        self._now = node
        value = run()
        module = module_of(node)
        invariant = module is not None and (is_time_invariant(module) or is_counting_batch_norm(module))
        if invariant and all(given in self._static for given in node.all_input_nodes):
            self._static.add(node)
        if isinstance(value, Tensor):
            self._values[node] = (value.numel() * value.itemsize * self._factor, True)
            if levels(node) is not None:
                self._bits.add(_memory(value))
        return value

    def save(self, tensor: Tensor) -> Tensor:
        memory = _memory(tensor)
        if memory in self._memories or memory == 0:
            return tensor
        self._memories.add(memory)
        module = module_of(self._now)
        if self._packs and module is not None and is_average_pooling(module):
            return tensor
        bytes_ = tensor.untyped_storage().nbytes()
        if self._packs and memory in self._bits:
            bytes_ = tensor.numel() // 8
        shapes = set() if module is None else {parameter.shape for parameter in module.parameters()}
        grows = tensor.shape not in shapes  # with the batch, which weights that were computed do not
        self._saved[self._now] = self._saved.get(self._now, 0) + bytes_ * (self._factor if grows else 1)
        return tensor

    def costs(self) -> list[Cost]:
        found = []
        for node in self._nodes:
            value, is_tensor = self._values.get(node, (0.0, False))
            known = levels(node) if is_tensor else None
            kept = value if known is None else value / 32 * known[0].bit_length()
            fires = isinstance(module_of(node), SLTTNeuron)
            found.append(
                Cost(
                    int(value), int(kept), int(value) if fires else 0, int(self._saved.get(node, 0)),
                    node in self._static, is_tensor and node in self._points, is_tensor and _is_by_sample(node, self._axis),
                )
            )  # fmt: skip
        return found


def _is_by_sample(node: fx.Node, axis: int) -> bool:
    """Whether a node treats each sample by itself, and shows nobody that it runs with some of them."""
    module = module_of(node)
    if module is None:
        return node.target in _BY_SAMPLE and all(given.op != "get_attr" for given in node.all_input_nodes)
    if has_hooks(module):
        return False
    if isinstance(module, SLTTNeuron):
        return levels(node) is not None
    return is_time_invariant(module) and getattr(module, "start_dim", axis + 1) > axis


def _weighted(leaf: Tensor) -> Tensor:
    """A number that follows from every element."""
    if not leaf.is_floating_point():
        return torch.zeros(())
    weights = torch.arange(leaf.numel(), device=leaf.device).remainder(7).sub(3).view(leaf.shape)
    return (leaf * weights).sum()


def _is_close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    tolerance = 1e-3 * float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # a tensor of other tensors
        return 0


def least_borders(found: Sequence[Cost], calls: int, gradients: int, most: int) -> list[int]:
    """After which nodes the borders are for which a pass needs the least memory.

    Args:
        found: The cost of each node.
        calls: How many calls a pass has.
        gradients: How many gradients are kept at a border.
        most: In how many parts the batch may run.
    """
    ends = [-1, *(i for i, cost in enumerate(found) if cost.border), len(found) - 1]
    need = _Need(found, calls, gradients, most)
    low, high = 0, need.of_block(-1, ends[-1], 0)
    best: list[int] = []
    while low < high:
        bound = (low + high) // 2
        way = _way(ends, need, bound)
        if way is None:
            low = bound + 1
        else:
            best, high = way, peak_bytes(found, way, calls, gradients, most)
            if high > bound:
                break
    return best


def peak_bytes(found: Sequence[Cost], borders: Sequence[int], calls: int, gradients: int, most: int) -> int:
    """The bytes that a pass with these borders needs at its peak."""
    need, kept, peak = _Need(found, calls, gradients, most), 0, 0
    ends = [-1, *borders, len(found) - 1]
    for entry, exit in pairwise(ends):
        peak = max(peak, need.of_block(entry, exit, kept))
        kept += need.border(entry, exit)
    return peak


def parts_of_batch(
    found: Sequence[Cost], borders: Sequence[int], calls: int, gradients: int, most: int
) -> list[int]:
    """In how many parts of the batch each block runs: as few as do not raise the peak."""
    peak, kept, parts = peak_bytes(found, borders, calls, gradients, most), 0, []
    numbers = [number for number in (1, 2, 4) if number < most] + [most]
    needs = [_Need(found, calls, gradients, number) for number in numbers]
    for entry, exit in pairwise([-1, *borders, len(found) - 1]):
        parts.append(
            next(number for number, need in zip(numbers, needs) if need.of_block(entry, exit, kept) <= peak)
        )
        kept += needs[0].border(entry, exit)
    return parts


def _way(ends: Sequence[int], need: _Need, bound: int) -> list[int] | None:
    """The borders with the fewest bytes for which no block needs more than ``bound``."""
    least: dict[int, tuple[int, list[int]]] = {-1: (0, [])}
    for j in range(1, len(ends)):
        options = [
            (least[ends[i]][0] + need.border(ends[i], ends[j]), ends[i])
            for i in range(j)
            if ends[i] in least and need.of_block(ends[i], ends[j], least[ends[i]][0]) <= bound
        ]
        if options:
            kept, entry = min(options)
            least[ends[j]] = kept, [*least[entry][1], ends[j]]
    return least[ends[-1]][1][:-1] if ends[-1] in least else None


class _Need:
    """The bytes that a block needs, where it runs in so many parts of the batch if it can."""

    def __init__(self, found: Sequence[Cost], calls: int, gradients: int, parts: int) -> None:
        self._parts = parts
        self._together = [0, *accumulate(not cost.by_sample for cost in found)]
        self._found, self._calls, self._gradients = found, calls, gradients
        self._saved = [0, *accumulate(cost.saved for cost in found)]
        self._state = [0, *accumulate(cost.state for cost in found)]
        self._largest: dict[tuple[int, int], int] = {}

    def border(self, entry: int, exit: int) -> int:
        """The values at the border behind it."""
        cost = self._found[exit]
        if exit == len(self._found) - 1:
            return 0
        return cost.kept if self._is_static(entry, exit) else cost.kept * self._calls

    def of_block(self, entry: int, exit: int, kept: int) -> int:
        """All that lives while it runs, where borders in front of it keep so many bytes."""
        parts = self._parts if self._runs_in_parts(entry, exit) else 1
        between = 2 * self._largest_value(entry, exit)
        forward = (
            self.border(entry, exit) + (between + self._state[exit + 1] - self._state[entry + 1]) // parts
        )
        saved = self._saved[exit + 1] - self._saved[entry + 1]
        after, before = self._gradient(entry, exit), self._gradient(-1, entry)
        gradients = after + before if parts > 1 else max(after, before)
        return kept + max(forward, gradients + (between + saved) // parts)

    def _runs_in_parts(self, entry: int, exit: int) -> bool:
        """Whether a block treats each sample by itself. The first reads the input, and the last has the loss of the batch."""
        inner = entry > -1 and exit < len(self._found) - 1
        return inner and self._together[entry + 1] == self._together[exit + 1]

    def _gradient(self, entry: int, exit: int) -> int:
        if exit in (-1, len(self._found) - 1):
            return 0
        return self._found[exit].value * (1 if self._is_static(entry, exit) else self._gradients)

    def _is_static(self, entry: int, exit: int) -> bool:
        return entry == -1 and self._found[exit].static

    def _largest_value(self, entry: int, exit: int) -> int:
        key = entry, exit
        if key not in self._largest:
            self._largest[key] = max(cost.value for cost in self._found[entry + 1 : exit + 1])
        return self._largest[key]
