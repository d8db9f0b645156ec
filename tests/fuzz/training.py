"""What a user writes around a network: the data, the loss, how it is back-propagated, the optimizer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from fuzz.description import SEQUENCE_LOSSES, Case
from fuzz.networks import CHANNELS, CLASSES, SIZE, Net
from fuzz.own_modules import FEATURES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path, tree_map

LEARNING_RATE = 0.02
KEPT_ALIVE = "unread outputs kept alive"


@dataclass(frozen=True)
class Batch:
    """The data of one iteration.

    Attributes:
        x: As the user gives it: ``[N, ...]``, ``[T, N, ...]`` or ``[N, T, ...]``.
        extra: Another input like it, for networks that take two.
        target: ``[N]``, or ``[N, classes]`` where it is soft, or one for each step.
        lengths: How many steps each sample has, ``[N]``.
    """

    x: Tensor
    extra: Tensor
    target: Tensor
    lengths: Tensor

    def given(self, case: Case) -> Any:
        """What the network, or its trainer, gets."""
        frames = case.options.frames
        if frames not in ("iterator", "list"):
            return held(case, self.x, self.extra)
        given = [held(case, *parts) for parts in zip(self.x, self.extra)]
        return iter(given) if frames == "iterator" else given

    def view(self, case: Case, call: int, around: "Around") -> "Batch":
        """What a call of several gets, behind the layer in front."""
        x = self.x if call == 0 else 1.2 * self.x.flip(-1)
        return replace(self, x=around.front(x) if case.options.front else x)


def held(case: Case, x: Tensor, extra: Tensor) -> Any:
    """One input, or one frame, as the network takes it."""
    return {"dict": {"image": x, "extra": extra}, "tuple": (x, extra)}.get(case.options.parts, x)


def batch(case: Case, iteration: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 * case.seed + iteration)
    options = case.options
    shape = (case.batch, *((CHANNELS, SIZE, SIZE) if case.image else (FEATURES,)))
    if options.frames == "time 1":
        shape = (shape[0], options.time_steps, *shape[1:])
    elif options.frames != "static":
        shape = (options.time_steps, *shape)
    targets = (case.batch,)
    if options.target_time_dim is not None:
        targets = (
            (options.time_steps, case.batch)
            if options.target_time_dim == 0
            else (case.batch, options.time_steps)
        )
    x = 2 * torch.rand(shape, generator=generator)
    target = torch.randint(CLASSES, targets, generator=generator)
    if options.soft:
        target = 0.7 * F.one_hot(target, CLASSES).to(x.dtype) + 0.3 / CLASSES
    lengths = torch.randint(1, options.time_steps + 1, (case.batch,), generator=generator)
    return Batch(x.requires_grad_(options.input_gradient), 1 - x.detach().flip(-1), target, lengths)


class Affine(nn.Module):
    """Of each number by itself, so that it fits anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.tensor(1.1)), nn.Parameter(torch.tensor(0.05))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + self.offset


class Around(nn.Module):
    """Ordinary layers around the network: in front, behind the mean of one with time inside, and in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.behind = Affine(), Affine()
        self.linear = nn.Linear(CLASSES, CLASSES)
        with torch.no_grad():
            self.linear.weight.copy_(1.5 * torch.eye(CLASSES) + 0.2)
            self.linear.bias.copy_(torch.linspace(-0.3, 0.3, CLASSES))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(output), target)


def a_weight(net: nn.Module) -> Tensor:
    """The first weight, which is the stem's where there is one."""
    return next(
        parameter for parameter in net.parameters() if parameter.dim() > 1 and parameter.requires_grad
    )


def holds_weight(net: nn.Module) -> nn.Module:
    """The first module with a weight, which may be computed."""
    return next(module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))


LossFn = Callable[[Any, Tensor], Tensor]


def loss_of_calls(loss_on: str, loss: LossFn, outputs: list[Any], target: Tensor) -> Tensor:
    """The loss of several calls, each of the mean output ``[N, ...]`` or of all steps ``[T, N, ...]``."""
    total = sum(_loss_of_call(loss_on, loss, output, target) for output in outputs)
    if len(outputs) > 1:  # as two views of an image are to be alike
        alike = [(a - b).square().mean() for a, b in zip(*map(tree_leaves, outputs))]
        total = total + 0.5 * sum(alike)
    return total


def _loss_of_call(loss_on: str, loss: LossFn, output: Any, target: Tensor) -> Tensor:
    if loss_on not in SEQUENCE_LOSSES:
        return loss(output, target)
    if loss_on == "each step":
        steps = len(tree_leaves(output)[0])
        return sum(loss(tree_map(lambda seq, t=t: seq[t], output), target) for t in range(steps)) / steps
    reduced = {"count": lambda seq: seq.sum(0), "max over time": lambda seq: seq.max(0).values}[loss_on]
    return loss(tree_map(reduced, output), target)


def loss_fn(case: Case, net: Net, around: Around, x: Tensor) -> LossFn:
    """The loss of what the network returns in one step, as `Options.loss` names it."""
    of_classes = _loss_of_classes(case, net, around, x)
    if case.returns not in ("heads", "pair"):
        return of_classes

    def of_heads(output: Any, target: Tensor) -> Tensor:
        classes, aside = output.values() if isinstance(output, dict) else output
        return of_classes(classes, target) + 0.3 * (aside - 0.2).square().mean()

    return of_heads


def _loss_of_classes(case: Case, net: Net, around: Around, x: Tensor) -> LossFn:
    def saliency(of: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            entropy = F.cross_entropy(output, target)
            (gradient,) = torch.autograd.grad(entropy, of, retain_graph=True, allow_unused=True)
            return entropy if gradient is None else entropy * (1 + gradient.norm().detach())

        return loss

    def squared(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(
            output, target if case.options.soft else F.one_hot(target, CLASSES).to(output.dtype)
        )

    def penalty(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + 0.05 * a_weight(net).square().sum()

    def penalty_of_all(output: Tensor, target: Tensor) -> Tensor:
        squares = [p.square().sum() for p in net.parameters() if p.requires_grad]
        return F.cross_entropy(output, target) + 0.01 * sum(squares)

    def penalty_of_computed(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + 0.05 * holds_weight(net).weight.square().sum()

    def rates(output: Tensor, target: Tensor) -> Tensor:
        fired = [spikes.mean() for spikes in net.spikes]
        net.spikes.clear()
        return F.cross_entropy(output, target) + 0.5 * sum(fired)

    losses = {
        "cross entropy": lambda: F.cross_entropy,
        "squared": lambda: squared,
        "penalty": lambda: penalty,
        "penalty of all": lambda: penalty_of_all,
        "penalty of a computed weight": lambda: penalty_of_computed,
        "head": lambda: around,
        "head in a closure": lambda: around,
        "rates": lambda: rates,
        "saliency of a weight": lambda: saliency(a_weight(net)),
        "saliency of the input": lambda: saliency(x),
    }
    return losses[case.options.loss]()


def backward(case: Case, net: nn.Module) -> Callable[[Tensor], Any] | None:
    if case.options.backward == "scaled":
        return lambda loss: (3 * loss).backward()
    if case.options.backward == "inputs":
        return lambda loss: loss.backward(inputs=[p for p in net.parameters() if p.requires_grad])
    return None


def optimizer(net: nn.Module, around: Around) -> torch.optim.Optimizer:
    parameters = [*net.parameters(), *around.parameters()]
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=LEARNING_RATE)


def output_of(case: Case) -> Any:
    """The trainer's option for what the loss reads of what the network returns, see `chosen`."""
    return {
        "dict": lambda returned: returned["classes"],
        "membrane": "membrane",
        "heads": lambda returned: returned,
        "pair": lambda returned: returned,
    }.get(case.returns)


def chosen(case: Case, returned: Any) -> Any:
    """What the loss reads of what the network returns."""
    output = output_of(case)
    if callable(output):
        return output(returned)
    if isinstance(returned, tuple):
        return returned[-1 if case.returns == "membrane" else 0]
    return returned


@dataclass(frozen=True)
class Iteration:
    """What one iteration has led to, each value under a name.

    Attributes:
        values: Tensors, or None for a gradient that there is not.
    """

    values: dict[str, Tensor | None]


def observed(
    case: Case, net: Net, around: Around, data: Batch, loss: Tensor, output: Any, loss_on: str
) -> Iteration:
    """All that a user can see after an iteration, before the optimizer's step."""
    values: dict[str, Tensor | None] = {"loss": loss, "random": torch.get_rng_state()}
    values |= {f"output{keystr(path)}": leaf for path, leaf in tree_leaves_with_path(output)}
    for name, parameter in (*net.named_parameters(), *around.named_parameters("around")):
        values[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
    values |= {f"state {name}": value.detach().clone() for name, value in _parts_of_state(net)}
    if case.options.input_gradient:
        values["gradient of x"] = data.x.grad
    if case.form != "multi":
        values["x"] = data.x.detach()
    if case.form != "multi" and loss_on == "step":
        for i, seen in enumerate(net.record):
            values[f"record {i}"] = (
                seen.grad.clone() if seen.retains_grad and seen.grad is not None else seen.detach()
            )
    net.record.clear()
    net.spikes.clear()
    values[KEPT_ALIVE] = torch.tensor(sum(reference() is not None for reference in net.unread))
    net.unread.clear()
    return Iteration(values)


def _parts_of_state(net: nn.Module) -> Any:
    """Parameters, and the buffers that are saved; snnTorch's hold settings and potentials besides."""
    yield from net.named_parameters()
    for name, buffer in net.named_buffers():
        if name.rpartition(".")[2] in (
            "running_mean",
            "running_var",
            "num_batches_tracked",
            "_u",
            "_v",
            "weight_u",
        ):
            yield name, buffer
