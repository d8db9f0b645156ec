"""What a user writes around a network: the data, the loss, how it is back-propagated, the optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fuzz.description import Case
from fuzz.networks import CHANNELS, CLASSES, SIZE, Net
from fuzz.own_modules import FEATURES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import keystr, tree_leaves_with_path

LEARNING_RATE = 0.02
KEPT_ALIVE = "unread outputs kept alive"


@dataclass(frozen=True)
class Batch:
    """The data of one iteration.

    Attributes:
        x: As the user gives it: ``[N, ...]``, ``[T, N, ...]`` or ``[N, T, ...]``.
        extra: Another input like it, for networks that take two.
        target: ``[N]``, or ``[N, classes]`` where it is soft, or one for each step.
    """

    x: Tensor
    extra: Tensor
    target: Tensor

    def given(self, case: Case) -> Any:
        """What the trainer gets."""
        frames = case.options.frames
        if frames not in ("iterator", "list"):
            return held(case, self.x, self.extra)
        given = [held(case, *parts) for parts in zip(self.x, self.extra)]
        return iter(given) if frames == "iterator" else given


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
    return Batch(x.requires_grad_(options.input_gradient), 1 - x.detach().flip(-1), target)


class Head(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
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


def loss_fn(case: Case, net: Net, head: Head, x: Tensor) -> LossFn:
    """The loss of what the network returns in one step, as `Options.loss` names it."""
    of_classes = _loss_of_classes(case, net, head, x)
    if case.returns not in ("heads", "pair"):
        return of_classes

    def of_heads(output: Any, target: Tensor) -> Tensor:
        classes, aside = output.values() if isinstance(output, dict) else output
        return of_classes(classes, target) + 0.3 * (aside - 0.2).square().mean()

    return of_heads


def _loss_of_classes(case: Case, net: Net, head: Head, x: Tensor) -> LossFn:
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
        "head": lambda: head,
        "head in a closure": lambda: head,
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


def optimizer(net: nn.Module, head: Head) -> torch.optim.Optimizer:
    parameters = [*net.parameters(), *head.parameters()]
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=LEARNING_RATE)


def output_of(case: Case) -> Any:
    """The trainer's option for what the loss reads of what the network returns."""
    return {
        "dict": lambda returned: returned["classes"],
        "membrane": "membrane",
        "heads": lambda returned: returned,
        "pair": lambda returned: returned,
    }.get(case.returns)


@dataclass(frozen=True)
class Iteration:
    """What one iteration has led to, each value under a name.

    Attributes:
        values: Tensors, or None for a gradient that there is not.
    """

    values: dict[str, Tensor | None]


def observed(
    case: Case, net: Net, head: Head, data: Batch, loss: Tensor, output: Any, loss_on: str
) -> Iteration:
    """All that a user can see after an iteration, before the optimizer's step."""
    values: dict[str, Tensor | None] = {"loss": loss, "random": torch.get_rng_state()}
    values |= {f"output{keystr(path)}": leaf for path, leaf in tree_leaves_with_path(output)}
    for name, parameter in (*net.named_parameters(), *head.named_parameters("loss")):
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
