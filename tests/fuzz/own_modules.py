"""Modules, operations and weights that users write themselves, in the networks of both frameworks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.utils._pytree import tree_map

FEATURES = 6


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


class Computed(nn.Module):
    """A neuron whose ``beta``, threshold or ``tau`` is computed from a parameter before each call."""

    def __init__(self, neuron: nn.Module, name: str):
        super().__init__()
        self.neuron, self.name = neuron, name
        self.raw = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        setattr(self.neuron, self.name, COMPUTED[self.name](self.raw))
        return self.neuron(x, *state)


COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "alpha": torch.sigmoid,
    "beta": torch.sigmoid,
    "tau": lambda raw: 1 + torch.exp(raw),
    "threshold": F.softplus,
    "v_threshold": F.softplus,
}


class Several(nn.Module):
    """Calls its inner modules several times in a step."""

    def __init__(self, inner: nn.Module, variant: str):
        super().__init__()
        self.inner, self.variant = inner, variant

    def forward(self, x: Tensor) -> Tensor:
        if self.variant == "chain":
            return self.inner(self.inner(x))
        if self.variant == "last":
            for _ in range(3):
                output = self.inner(x)
            return output
        return self.inner(x) + 0.5 * self.inner(0.8 * x)


class Kept(nn.Module):
    """Keeps tensors from step to step as plain attributes. For single steps."""

    def __init__(self, variant: str):
        super().__init__()
        self.variant = variant
        self.strength = nn.Parameter(torch.tensor(0.4))
        self.last: Any = [] if variant == "list" else None

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, f"_{self.variant.replace(' ', '_')}")(x)

    def _trace(self, x: Tensor) -> Tensor:
        last = torch.zeros_like(x) if self.last is None else self.last
        self.last = torch.tanh(x + self.strength * last)
        return self.last

    def _tuple(self, x: Tensor) -> Tensor:
        slow, fast = (torch.zeros_like(x),) * 2 if self.last is None else self.last
        self.last = (0.9 * slow + self.strength * x, 0.5 * fast + x)
        return self.last[0] + self.last[1]

    def _feedback(self, x: Tensor) -> Tensor:
        y = x + self.strength * (0.1 if self.last is None else self.last)
        self.last = y
        return torch.tanh(y)

    def _list(self, x: Tensor) -> Tensor:
        y = x + self.strength * self.last[-1] if self.last else x
        self.last.append(torch.tanh(y))
        return y

    def _detached(self, x: Tensor) -> Tensor:
        y = x if self.last is None else x + self.strength * self.last
        self.last = torch.tanh(y).detach()
        return y

    def _average(self, x: Tensor) -> Tensor:
        mean = x.detach().mean()
        self.last = mean if self.last is None else 0.9 * self.last + 0.1 * mean
        return x - self.strength * self.last

    def rest(self) -> None:
        """For the oracle: what has a gradient is state, and starts anew; what has none stays."""
        if self.variant == "list":
            self.last.clear()
        elif self.variant not in ("detached", "average"):
            self.last = None

    def detach(self) -> None:
        """For the oracle: what is kept becomes a constant."""
        if self.last is not None:
            self.last = tree_map(torch.Tensor.detach, self.last)


class SavesCopies(nn.Module):
    """Keeps for backward copies of what its inner modules save."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved: [saved.clone()], lambda packed: packed[0]
        ):
            return self.inner(x)


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
