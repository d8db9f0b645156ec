"""The loss over time: targets of the steps, one scalar for a call, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from sltt_ext.errors import InputError, LossError
from sltt_ext.online.explanations import explaining_losses

__all__ = [
    "Backward",
    "IterationLoss",
    "LossFn",
    "back_propagate",
    "back_propagate_all",
    "reaches_every_leaf",
    "sum_of_losses",
    "targets_of_steps",
    "total_loss",
]

LossFn = Callable[[Any, Any], Tensor]
Backward = Callable[[Tensor], Any]


def targets_of_steps(target: Any, time_steps: int, target_time_dim: int | None) -> Sequence[Any]:
    """The target of each step.

    Raises:
        InputError: If the target does not have ``time_steps`` steps along ``target_time_dim``.
    """
    if target_time_dim is None:
        return [target] * time_steps
    dim = target_time_dim
    if not isinstance(target, Tensor) or target.dim() <= dim or target.shape[dim] != time_steps:
        got = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise InputError(
            f"the target needs {time_steps} steps along target_time_dim={dim}, got {got}: give a tensor "
            "with one target for each step, or leave target_time_dim out"
        )
    return target.unbind(dim)


def total_loss(
    loss_fn: LossFn, output_seq: Any, targets: Sequence[Any], counts: Iterable[float] | None = None
) -> Tensor:
    """The sum of the losses of outputs ``[C, N, ...]``, one or several in a dict or tuple, one step after the other.

    Args:
        loss_fn: The loss of one step.
        output_seq: The outputs.
        targets: Of each step.
        counts: How many times the loss of each step counts; None is once.

    Raises:
        LossError: If a loss is no scalar tensor, or needs no gradient.
    """
    return sum_of_losses(loss_fn, zip(_steps(output_seq), targets, strict=True), counts)


def sum_of_losses(
    loss_fn: LossFn, outputs_and_targets: Iterable[tuple[Any, Any]], counts: Iterable[float] | None = None
) -> Tensor:
    """The sum of the losses of these outputs, each as many times as it counts.

    Raises:
        LossError: If a loss is no scalar tensor, or needs no gradient.
    """
    losses = []
    for output, target in outputs_and_targets:
        with _says_what_caching_hides(), explaining_losses(output, target):
            losses.append(loss_fn(output, target))
    for loss in losses:
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise LossError(f"loss_fn must return a scalar tensor, got {got}: reduce it, e.g. with .mean()")
    if counts is not None:
        losses = [loss if count == 1 else loss * count for loss, count in zip(losses, counts, strict=True)]
    total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    if not total.requires_grad:
        raise LossError(
            "the loss needs no gradient: no parameter of the network requires one, or the network or the "
            "loss detaches its output"
        )
    return total


def _steps(output_seq: Any) -> list[Any]:
    leaves, structure = tree_flatten(output_seq)
    if all(len(leaf) == 1 for leaf in leaves):
        return [tree_unflatten([leaf.squeeze(0) for leaf in leaves], structure)]
    return [
        tree_unflatten(parts, structure) for parts in zip(*(leaf.unbind() for leaf in leaves), strict=True)
    ]


class IterationLoss(Tensor):
    """The loss of an iteration: a tensor like any other, but for `backward`. What is computed of it is a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do.

        Raises:
            LossError: Always.
        """
        raise LossError(
            "the gradients are in .grad already: forward_backward has back-propagated every step, so call optimizer.step() "
            "and leave result.loss.backward() out"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved, sent and copied as a plain tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    def __format__(self, format_spec: str) -> str:
        return format(self.as_subclass(Tensor), format_spec)

    @classmethod
    def of(cls, loss: Tensor) -> Tensor:
        """``loss``, without its graph; other kinds of tensors (fake ones, say) stay what they are."""
        loss = loss.detach()
        return loss.as_subclass(cls) if type(loss) is Tensor else loss


def back_propagate(loss: Tensor, backward: Backward | None) -> None:
    """Accumulate the gradient of ``loss``, by ``backward`` if there is one.

    Raises:
        LossError: If the loss reaches back to an earlier step.
    """
    try:
        if backward is None:
            loss.backward()
        else:
            backward(loss)
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise LossError(
            "the loss reaches back to an earlier time step: a module carries a tensor from step to step that "
            "the conversion does not see. Register it as state (SpikingJelly: register_memory), or detach it "
            "before the module keeps it. (Or the frames, the target or the loss have a graph of their own that all steps "
            "share: detach() them)"
        ) from error


def back_propagate_all(loss: Tensor, backward: Backward | None) -> None:
    """Accumulate the gradient of ``loss``, and see that every tensor that it follows from gets its part.

    Raises:
        LossError: If ``backward`` names its inputs, and so gives others none.
    """
    if backward is None:
        back_propagate(loss, None)
    elif not reaches_every_leaf(loss, backward):
        raise LossError(
            "backward= does not give a gradient to everything that the loss depends on (does it name inputs=?), and "
            "blocks= has to hand gradients on: leave blocks= out"
        )


def reaches_every_leaf(loss: Tensor, backward: Backward) -> bool:
    """Accumulate the gradient of ``loss`` by ``backward``, and tell whether every tensor that it follows from got its part.

    A ``backward`` that names its inputs gives others none.
    """
    leaf = loss.new_zeros((), requires_grad=True)
    back_propagate(_WithLeaf.apply(loss, leaf), backward)
    return leaf.grad is not None


class _WithLeaf(torch.autograd.Function):
    """The loss, and one more leaf that it follows from."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, leaf: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, torch.zeros_like(gradient)


@contextmanager
def _says_what_caching_hides() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "appears to not have been used in the graph" not in str(error):
            raise
        raise LossError(
            "loss_fn asks autograd for the gradient of a tensor that is not in this step's graph: if that is a weight "
            "or the input in front of the first neuron, use cache_invariant=False"
        ) from error
