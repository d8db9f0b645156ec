"""The outputs of a pass as one function of autograd, whose backward runs the steps again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sltt_ext.errors import LossError

__all__ = ["RunAgain"]

_BEFORE_TENSORS = 3  # arguments of the function below


class RunAgain(torch.autograd.Function):
    """The outputs of a recording; backward runs it again."""

    @staticmethod
    def forward(
        ctx: Any, recording: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *read: Tensor
    ) -> tuple[Tensor, ...]:
        """The outputs; ``read`` is all that a gradient may be wanted of, and the inputs."""
        ctx.recording = recording
        ctx.places = [next(i for i, tensor in enumerate(read) if tensor is one) for one in inputs]
        ctx.save_for_backward(*read)  # by which autograd sees that they stay as they are
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(one for one in outputs if not (one.is_floating_point() or one.is_complex()))
        )
        return tuple(
            outputs
        )  # in a list until here: they are no views, which a loss could not change in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        """The gradients of what was read."""
        if torch.is_grad_enabled():
            raise LossError(
                "create_graph=True asks for the gradient of a gradient, but backward runs the time steps again without it: use "
                "torch's own loop over time for such a loss"
            )
        read = _unchanged(ctx)
        wanted = ctx.needs_input_grad[_BEFORE_TENSORS:]
        wanting = [tensor for tensor, wants in zip(read, wanted) if wants]
        inputs = [read[place] for place in ctx.places]
        once = not torch._C._autograd._get_current_graph_task_keep_graph()
        found = iter(ctx.recording.gradients(inputs, wanting, gradients, once))
        return *([None] * _BEFORE_TENSORS), *(next(found) if wants else None for wants in wanted)


def _unchanged(ctx: Any) -> Sequence[Tensor]:
    """The tensors that the network has read.

    Raises:
        LossError: If they are no longer what they were, or backward has run before.
    """
    try:
        saved: Sequence[Tensor] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise LossError(
                "an input or a weight was changed in place between forward and backward, which runs the time steps again: call "
                "backward() before optimizer.step(), and leave the input as it is"
            ) from error
        if "second time" in str(error):
            raise LossError(
                "backward() has run through this output before: pass retain_graph=True the first time, or call the network again"
            ) from error
        raise
    return saved
