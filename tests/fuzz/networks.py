"""Networks out of blocks: what both frameworks share. All of it is what a user could have written.

A block gets the shape of one sample and builds a module; where it does not fit (pooling of features, a residual
around blocks that change the shape) it leaves itself out, so that any list of blocks is a network.
"""

import weakref
from typing import Any, Protocol

import torch
from fuzz.description import Block, Case
from fuzz.hooks import add_hook
from fuzz.own_modules import (
    ACTIVATIONS,
    FEATURES,
    WEIGHTS,
    Function,
    FunctionalLinear,
    Kept,
    Marked,
    OfEachStep,
    ReadsStatistics,
    ReadsWeight,
    Residual,
    SavesCopies,
    Several,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_map

CHANNELS, SIZE, CLASSES = 3, 4, 3

Shape = tuple[int, ...]
BATCH_NORM: dict[str, dict[str, Any]] = {
    "not affine": {"affine": False},
    "not tracking": {"track_running_stats": False},
    "cumulative": {"momentum": None},
}


class Leaves(Protocol):
    """A framework's layers. ``time`` is `Block.time`."""

    def linear(self, shape: Shape, width: int, time: str) -> nn.Module: ...
    def conv(self, shape: Shape, time: str) -> nn.Module: ...
    def norm(self, variant: str, shape: Shape, time: str) -> nn.Module: ...
    def pool(self, variant: str, shape: Shape, time: str) -> nn.Module: ...
    def flatten(self, time: str) -> nn.Module: ...
    def dropout(self, variant: str) -> nn.Module: ...
    def neuron(self, variant: str, shape: Shape) -> nn.Module: ...
    def recurrent(self, variant: str, shape: Shape) -> nn.Module: ...
    def readout(self, returns: str) -> nn.Module: ...


class Net(nn.Module):
    """The blocks one after the other, then a linear layer, and what `Case.returns` asks for.

    Attributes:
        record: What hooks saw.
        spikes: What hooks gather for a loss that reads it.
        unread: The outputs that no loss reads, while they live.
    """

    def __init__(
        self, blocks: nn.Module, head: nn.Module, readout: nn.Module, aside: nn.Module | None, returns: str
    ):
        super().__init__()
        self.blocks, self.head, self.readout, self.aside = blocks, head, readout, aside
        self.returns = returns
        self.record: list[Tensor] = []
        self.spikes: list[Tensor] = []
        self.unread: list[Any] = []

    def forward(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            image, extra = x.values() if isinstance(x, dict) else x
            x = image + 0.5 * torch.tanh(extra)
        features = self.blocks(x)
        output = self.readout(self.head(features))
        if self.aside is None:
            return output
        aside = torch.tanh(self.aside(features))  # whose backward needs its own output
        if self.returns in ("tuple", "dict"):
            self.unread.append(weakref.ref(aside))
        return (output, aside) if self.returns in ("tuple", "pair") else {"classes": output, "aside": aside}


class WithState(nn.Module):
    """The same network as one that takes and returns the states of its neurons."""

    def __init__(self, net: Net):
        super().__init__()
        self.net = net
        self.carriers = [module for module in net.modules() if isinstance(module, Carried)]

    def forward(self, x: Tensor, states: list[Any] | None) -> tuple[Any, list[Any]]:
        for carrier, state in zip(self.carriers, states or [()] * len(self.carriers)):
            carrier.state = state
        output = self.net(x)
        left = [carrier.state for carrier in self.carriers]
        for carrier in self.carriers:
            carrier.state = ()
        return output, left


class TimeInside(nn.Module):
    """The same network as one that runs over time in its own forward.

    Args:
        case: Whose network.
        inner: What runs a step, or a sequence.
        head: What is computed of the output.
    """

    def __init__(self, case: Case, inner: nn.Module, head: nn.Module):
        super().__init__()
        self.T, self.inner = case.options.time_steps, inner
        self.takes_sequences, self.frames = case.form == "multi", case.options.frames
        self.head = head if case.options.inside == "head of the mean" else nn.Identity()
        self.axis = {"steps": 0, "steps of a sample": 1}.get(case.options.inside)

    def forward(self, x: Any) -> Any:
        if self.takes_sequences:
            steps = self.inner(tree_map(self._sequence, x))
        else:
            frames = [tree_map(lambda part, t=t: self._sequence(part)[t], x) for t in range(self.T)]
            steps = tree_map(lambda *outputs: torch.stack(outputs), *map(self.inner, frames))
        if self.axis is None:
            return tree_map(lambda output_seq: self.head(output_seq.mean(0)), steps)
        return tree_map(lambda output_seq: output_seq.movedim(0, self.axis), steps)

    def _sequence(self, x: Tensor) -> Tensor:
        if self.frames == "static":
            return x.unsqueeze(0).repeat(self.T, *[1] * x.dim())
        return x.transpose(0, 1) if self.frames == "time 1" else x


class Carried(nn.Module):
    """A neuron that is passed its state."""

    def __init__(self, neuron: nn.Module):
        super().__init__()
        self.neuron = neuron
        self.state: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        spikes, *state = self.neuron(x, *self.state)
        self.state = tuple(state)
        return spikes


class Builder:
    """Builds the network of a case."""

    def __init__(self, case: Case, leaves: Leaves):
        self.case, self.leaves = case, leaves
        self.latest: dict[str, tuple[nn.Module, Shape, Shape]] = {}
        self.record: list[Tensor] = []
        self.spikes: list[Tensor] = []
        self.frozen: list[nn.Module] = []

    def build(self) -> Net:
        torch.default_generator.manual_seed(self.case.seed)
        shape: Shape = (CHANNELS, SIZE, SIZE) if self.case.image else (FEATURES,)
        blocks, shape = self.blocks(self.case.blocks, shape)
        if len(shape) > 1:
            blocks.append(self.leaves.flatten("layer"))
        features = torch.Size(shape).numel()
        head = self.leaves.linear((features,), CLASSES, "layer")
        aside = (
            self.leaves.linear((features,), 2, "layer")
            if self.case.returns in ("tuple", "dict", "heads", "pair")
            else None
        )
        net = Net(blocks, head, self.leaves.readout(self.case.returns), aside, self.case.returns)
        net.record, net.spikes = self.record, self.spikes
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(2.5)
        net.train(self.case.training)
        for module in self.frozen:
            module.eval()
        return net

    def blocks(self, described: tuple[Block, ...], shape: Shape) -> tuple[nn.Sequential, Shape]:
        modules = nn.Sequential()
        for block in described:
            built = self.block(block, shape)
            if built is not None:
                module, shape = built
                modules.append(module)
        return modules, shape

    def block(self, block: Block, shape: Shape) -> tuple[nn.Module, Shape] | None:
        built = getattr(self, f"_{block.kind}")(block, shape)
        if built is None:
            return None
        module, after = built
        add_hook(block.hook, module, self.record)
        if block.kind == "neuron" and self.case.options.loss == "rates":
            module.register_forward_hook(lambda m, inputs, spikes: self._gather(spikes))
        if block.kind not in ("shared", "residual", "group", "several"):
            self.latest[block.kind] = module, shape, after
        return module, after

    def _gather(self, spikes: Tensor) -> None:
        if spikes.requires_grad:
            self.spikes.append(spikes)

    def _weight(self, block: Block, shape: Shape) -> Any:
        if len(shape) > 1:
            module, after = self.leaves.conv(shape, block.time), (CHANNELS, *shape[1:])
        else:
            module, after = self.leaves.linear(shape, FEATURES, block.time), (FEATURES,)
        WEIGHTS[block.weight](_holder(module))
        return module, after

    def _norm(self, block: Block, shape: Shape) -> Any:
        module = self.leaves.norm(block.variant, shape, block.time)
        self.frozen += [module] if block.variant == "frozen" else []
        return module, shape

    def _pool(self, block: Block, shape: Shape) -> Any:
        if len(shape) == 1 or shape[1] == 1:
            return None
        after = (shape[0], shape[1] // 2, shape[2] // 2)
        return self.leaves.pool(block.variant or "average", shape, block.time), after

    def _flatten(self, block: Block, shape: Shape) -> Any:
        return (self.leaves.flatten(block.time), (torch.Size(shape).numel(),)) if len(shape) > 1 else None

    def _dropout(self, block: Block, shape: Shape) -> Any:
        return self.leaves.dropout(block.variant or "none"), shape

    def _neuron(self, block: Block, shape: Shape) -> Any:
        return self.leaves.neuron(block.variant, shape), shape

    def _recurrent(self, block: Block, shape: Shape) -> Any:
        return (self.leaves.recurrent(block.variant, shape), shape) if len(shape) == 1 else None

    def _activation(self, block: Block, shape: Shape) -> Any:
        return ACTIVATIONS[block.variant or "tanh"](), shape

    def _function(self, block: Block, shape: Shape) -> Any:
        if block.variant == "linear":
            return (FunctionalLinear(*shape), (FEATURES,)) if len(shape) == 1 else None
        if block.variant == "reads weight":
            holder = _holder(self.latest["weight"][0]) if "weight" in self.latest else None
            return None if holder is None else (ReadsWeight(holder), shape)
        if block.variant == "reads statistics":
            return self._reads_statistics(shape)
        return Function(block.variant or "tanh"), shape

    def _reads_statistics(self, shape: Shape) -> Any:
        norm = self.latest.get("norm", (None,))[0]
        tracking = (
            next((m for m in norm.modules() if getattr(m, "running_mean", None) is not None), None)
            if norm
            else None
        )
        return None if tracking is None else (ReadsStatistics(tracking), shape)

    def _step(self, block: Block, shape: Shape) -> Any:
        return (OfEachStep(block.variant or "function", shape[0]), (FEATURES,)) if len(shape) == 1 else None

    def _residual(self, block: Block, shape: Shape) -> Any:
        inner, after = self.blocks(block.inner, shape)
        return (
            (Residual(inner, block.variant == "in place"), shape) if after == shape and len(inner) else None
        )

    def _group(self, block: Block, shape: Shape) -> Any:
        inner, after = self.blocks(block.inner, shape)
        if not len(inner):
            return None
        around: Any = {"marked": Marked, "saves copies": SavesCopies}.get(block.variant, lambda inner: inner)
        return around(inner), after

    def _several(self, block: Block, shape: Shape) -> Any:
        inner, after = self.blocks(block.inner, shape)
        if not len(inner) or (block.variant == "chain" and after != shape):
            return None
        return Several(inner, block.variant), after

    def _kept(self, block: Block, shape: Shape) -> Any:
        return Kept(block.variant or "trace"), shape

    def _shared(self, block: Block, shape: Shape) -> Any:
        module, before, after = self.latest.get(block.variant or "weight", (None, None, None))
        return (module, after) if before == shape else None


def _holder(module: nn.Module) -> nn.Module:
    """The module that holds the weight."""
    return next(m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
