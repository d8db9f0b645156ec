"""Networks out of blocks: what both frameworks share. All of it is what a user could have written.

A block gets the shape of one sample and builds a module; where it does not fit (pooling of features, a residual
around blocks that change the shape) it leaves itself out, so that any list of blocks is a network.
"""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from fuzz.description import Block, Case
from fuzz.hooks import add_hook
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

CHANNELS, SIZE, FEATURES, CLASSES = 3, 4, 6, 3

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
        unread: The outputs that no loss reads, while they live.
    """

    def __init__(
        self, blocks: nn.Module, head: nn.Module, readout: nn.Module, aside: nn.Module | None, returns: str
    ):
        super().__init__()
        self.blocks, self.head, self.readout, self.aside = blocks, head, readout, aside
        self.returns = returns
        self.record: list[Tensor] = []
        self.unread: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        features = self.blocks(x)
        output = self.readout(self.head(features))
        if self.aside is None:
            return output
        aside = self.aside(features)
        self.unread.append(weakref.ref(aside))
        return (output, aside) if self.returns == "tuple" else {"classes": output, "aside": aside}


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
            self.leaves.linear((features,), 2, "layer") if self.case.returns in ("tuple", "dict") else None
        )
        net = Net(blocks, head, self.leaves.readout(self.case.returns), aside, self.case.returns)
        net.record = self.record
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
        if block.kind not in ("shared", "residual", "group"):
            self.latest[block.kind] = module, shape, after
        return module, after

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
        return (Marked(inner) if block.variant == "marked" else inner), after

    def _shared(self, block: Block, shape: Shape) -> Any:
        module, before, after = self.latest.get(block.variant or "weight", (None, None, None))
        return (module, after) if before == shape else None


def _holder(module: nn.Module) -> nn.Module:
    """The module that holds the weight."""
    return next(m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, in_place: bool):
        super().__init__()
        self.inner, self.in_place = inner, in_place

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if self.in_place:
            out += x
            return out
        return out + x


class Marked(nn.Module):
    """A user's own module that says that it does not depend on time."""

    sltt_time_invariant = True

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 1.1 * self.inner(x)


class Function(nn.Module):
    """An operation between modules."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.scale = nn.Parameter(torch.tensor(0.8))

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x, self.scale)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda x, scale: torch.relu(x),
    "tanh": lambda x, scale: torch.tanh(x),
    "scale": lambda x, scale: x * scale,
    "shift": lambda x, scale: x + scale,
    "relu in place": lambda x, scale: torch.relu_(x),
    "multiply in place": lambda x, scale: x.mul_(0.7),
    "subtract in place": lambda x, scale: x.sub_(0.2),
    "scale in place": lambda x, scale: x.mul_(scale),
    "view in place": lambda x, scale: (x[..., :1].add_(0.3), x)[1],
    "detach": lambda x, scale: x.detach() * scale,
    "clone": lambda x, scale: x.clone(),
}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "prelu": nn.PReLU,
    "softplus": nn.Softplus,
}


class FunctionalLinear(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(FEATURES, width) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


class ReadsWeight(nn.Module):
    """Reads another module's weight."""

    def __init__(self, holder: nn.Module):
        super().__init__()
        self.others = [holder]

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.tanh(self.others[0].weight.sum())


class ReadsStatistics(nn.Module):
    """Reads a batch norm's running statistics."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norms = [norm]

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.norms[0].running_mean.mean()


class OfEachStep(nn.Module):
    """A linear layer that is another at each step. It counts its calls, so that it is for single steps."""

    def __init__(self, variant: str, width: int):
        super().__init__()
        self.variant = variant
        self.linear = nn.Linear(width, FEATURES)
        self.weights = (
            nn.Parameter(torch.randn(4, FEATURES, width) * 0.4) if variant in ("call", "attribute") else None
        )
        self.factor = torch.ones(1)
        self.t = 0
        if variant == "attribute":
            del self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        self.t += 1
        return getattr(self, f"_{self.variant}")(x)

    def _function(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1 + 0.1 * (self.t % 3))

    def _call(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.linear, {"weight": self.weights[self.t % 4]}, (x,))

    def _attribute(self, x: Tensor) -> Tensor:
        self.linear.weight = self.weights[self.t % 4]
        return self.linear(x)

    def _tensor(self, x: Tensor) -> Tensor:
        self.factor = torch.full((1,), 1 + 0.1 * (self.t % 3))
        return self.linear(x) * self.factor

    def _data(self, x: Tensor) -> Tensor:
        self.linear.weight.data.mul_(1.05)
        return self.linear(x)

    def _assigned(self, x: Tensor) -> Tensor:
        self.linear.weight.data = self.linear.weight.data * 1.05
        return self.linear(x)

    def _noise(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.add_(0.02 * torch.randn_like(self.linear.weight))
        return self.linear(x)


class Standardise(nn.Module):
    """A user's own parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight - weight.mean()) / (weight.std() + 0.1)


class MarkedStandardise(Standardise):
    sltt_time_invariant = True


WEIGHTS: dict[str, Callable[[nn.Module], Any]] = {
    "": lambda module: None,
    "weight norm": parametrizations.weight_norm,
    "old weight norm": weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old spectral norm": spectral_norm,
    "standardised": lambda module: parametrize.register_parametrization(module, "weight", Standardise()),
    "standardised, marked": lambda module: parametrize.register_parametrization(
        module, "weight", MarkedStandardise()
    ),
    "pruned": lambda module: prune.random_unstructured(module, "weight", 0.3),
    "frozen": lambda module: module.requires_grad_(False),
}
