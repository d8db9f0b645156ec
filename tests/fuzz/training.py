"""What a user writes around a network: the data, the loss, how it is back-propagated, the optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fuzz.description import Case
from fuzz.networks import CHANNELS, CLASSES, SIZE
from fuzz.own_modules import FEATURES
from torch import Tensor, nn
from torch.nn import functional as F

LEARNING_RATE = 0.02
KEPT_ALIVE = "unread outputs kept alive"


@dataclass(frozen=True)
class Batch:
    """The data of one iteration.

    Attributes:
        x: As the user gives it: ``[N, ...]``, ``[T, N, ...]`` or ``[N, T, ...]``.
        target: ``[N]``, or one for each step.
    """

    x: Tensor
    target: Tensor

    def given(self, case: Case) -> Any:
        """What the trainer gets."""
        frames = case.options.frames
        if frames == "iterator":
            return iter(list(self.x))
        return list(self.x) if frames == "list" else self.x


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
    return Batch(
        x.requires_grad_(options.input_gradient), torch.randint(CLASSES, targets, generator=generator)
    )


def a_weight(net: nn.Module) -> Tensor:
    """The first weight, which is the stem's where there is one."""
    return next(
        parameter for parameter in net.parameters() if parameter.dim() > 1 and parameter.requires_grad
    )


def loss_fn(case: Case, net: nn.Module, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of one step's output, as `Options.loss` names it."""

    def saliency(of: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            entropy = F.cross_entropy(output, target)
            (gradient,) = torch.autograd.grad(entropy, of, retain_graph=True, allow_unused=True)
            return entropy if gradient is None else entropy * (1 + gradient.norm().detach())

        return loss

    def squared(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, F.one_hot(target, CLASSES).to(output.dtype))

    def penalty(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + 0.05 * a_weight(net).square().sum()

    losses = {
        "cross entropy": lambda: F.cross_entropy,
        "squared": lambda: squared,
        "penalty": lambda: penalty,
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


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=LEARNING_RATE)


def output_of(returned: Any) -> Tensor:
    """What the loss reads where the network returns a dict."""
    return returned["classes"]


@dataclass(frozen=True)
class Iteration:
    """What one iteration has led to, each value under a name.

    Attributes:
        values: Tensors, or None for a gradient that there is not.
    """

    values: dict[str, Tensor | None]


def observed(case: Case, net: nn.Module, data: Batch, loss: Tensor, output: Tensor) -> Iteration:
    """All that a user can see after an iteration, before the optimizer's step."""
    values: dict[str, Tensor | None] = {"loss": loss, "output": output, "random": torch.get_rng_state()}
    for name, parameter in net.named_parameters():
        values[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
    values |= {f"state {name}": value.detach().clone() for name, value in _parts_of_state(net)}
    if case.options.input_gradient:
        values["gradient of x"] = data.x.grad
    if case.form != "multi":
        values["x"] = data.x.detach()
    if case.form != "multi" and case.options.loss_on == "step":
        for i, seen in enumerate(net.record):
            values[f"record {i}"] = (
                seen.grad.clone() if seen.retains_grad and seen.grad is not None else seen.detach()
            )
    net.record.clear()
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
