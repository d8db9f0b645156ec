"""The fused neuron as operators: registered ones for networks that are compiled, and a leaner one for all others.

``sltt_ext::lif`` and ``sltt_ext::lif_backward`` run under ``torch.compile`` and with fake tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltt_ext.kernels import cuda_lif, inductor_lif, select_backend, torch_lif
from sltt_ext.kernels.settings import LIFSettings
from sltt_ext.surrogate import Surrogate, derivative

__all__ = ["eager_lif", "lif", "lif_backward", "reset"]

_KERNELS: dict[str, Any] = {"torch": torch_lif, "cupy": cuda_lif, "inductor": inductor_lif}


def eager_lif(backend: str, single_step: bool, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Spikes and final state, outside of compilation: the kernels of `lif`, at a fraction of the cost per call.

    Args:
        backend: See `sltt_ext.functional.multi_step_lif`.
        single_step: Whether ``x`` is one step ``[N, ...]``, and not ``[T, N, ...]``.
        x: Input currents.
        arguments: The other ones of `sltt_ext.kernels.torch_lif.forward`.

    Raises:
        BackendError: If ``backend`` cannot be used.
    """
    kernels = _KERNELS[select_backend(backend, x)]
    outputs: tuple[Tensor, Tensor] = _EagerLIF.apply(kernels, single_step, x, *arguments)
    return outputs


def reset(h: Tensor, *settings: Any) -> Tensor:
    """The potential after the reset, with the gradient of the final state; see `sltt_ext.functional.after_reset`."""
    v: Tensor = _AfterReset.apply(h, *settings)
    return v


def _kernels_of_operator(backend: str, x: Tensor) -> Any:
    """What runs a registered operator: nothing is compiled inside of a network that is compiled itself."""
    selected = select_backend(backend, x)
    return _KERNELS["torch" if selected == "inductor" else selected]


@torch.library.custom_op("sltt_ext::lif", mutates_args=())
def lif(
    x_seq: Tensor,
    v: Tensor,
    decay: Optional[Tensor],
    tau: Optional[float],
    decay_input: bool,
    v_threshold: float,
    v_reset: Optional[float],
    detach_reset: bool,
    surrogate: str,
    parameters: Sequence[float],
    save: bool,
    save_slope: bool,
    factored_leak: bool = False,
    charged_in: bool = False,
    charged_out: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward operator; see `sltt_ext.kernels.torch_lif.forward`."""
    settings = LIFSettings(
        tau, decay_input, v_threshold, v_reset, detach_reset, surrogate, tuple(parameters), factored_leak,
        charged_in, charged_out,
    )  # fmt: skip
    kernels = _kernels_of_operator(backend, x_seq)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = kernels.forward(
        x_seq, v, decay, settings, save, save_slope
    )
    return outputs


@lif.register_fake
def _(
    x_seq: Tensor, v: Tensor, decay: Any, tau: Any, decay_input: Any, v_threshold: Any, v_reset: Any,
    detach_reset: Any, surrogate: Any, parameters: Any, save: bool, save_slope: bool,
    factored_leak: bool = False, charged_in: bool = False, charged_out: bool = False, backend: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        torch.empty_like(x_seq),
        torch.empty_like(v),
        torch.empty_like(x_seq[1:]) if save else x_seq.new_empty(0),
        torch.empty_like(v) if save and not charged_out else v.new_empty(0),
        torch.empty_like(x_seq) if save_slope else x_seq.new_empty(0),
    )


@torch.library.custom_op("sltt_ext::lif_backward", mutates_args=())
def lif_backward(
    grad_s_seq: Optional[Tensor],
    grad_v: Optional[Tensor],
    derivatives: Tensor,
    h: Tensor,
    slopes: Tensor,
    decay: Optional[Tensor],
    tau: Optional[float],
    decay_input: bool,
    v_threshold: float,
    v_reset: Optional[float],
    detach_reset: bool,
    surrogate: str,
    parameters: Sequence[float],
    charged_out: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The backward operator; see `sltt_ext.kernels.torch_lif.backward`."""
    settings = LIFSettings(
        tau, decay_input, v_threshold, v_reset, detach_reset, surrogate, tuple(parameters),
        charged_out=charged_out,
    )  # fmt: skip
    gradients: tuple[Tensor, Tensor] = _kernels_of_operator(backend, h).backward(
        grad_s_seq, grad_v, derivatives, h, slopes, decay, settings
    )
    return gradients


@lif_backward.register_fake
def _(
    grad_s_seq: Tensor | None, grad_v: Any, derivatives: Tensor, h: Tensor, slopes: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    if grad_s_seq is None:
        grad_x = derivatives.new_empty((derivatives.shape[0] + 1, *h.shape))
    else:
        grad_x = torch.empty_like(grad_s_seq, dtype=derivatives.dtype)
    return grad_x, h.new_empty(() if slopes.numel() else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, decay, *neuron, _, _, _, _, charged_out, backend = inputs
    _save(ctx, decay, charged_out, output)
    ctx.settings = (*neuron, charged_out, backend)


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    grad_x, grad_decay = _gradients(ctx, lif_backward, *grads[:2], *ctx.settings)
    return (grad_x, None, grad_decay, *[None] * 13)


lif.register_autograd(_backward, setup_context=_setup_context)


def _save(ctx: Any, decay: Tensor | None, charged_out: bool, output: tuple[Tensor, ...]) -> None:
    _, final, derivatives, h, slopes = output
    ctx.save_for_backward(derivatives, final if charged_out else h, slopes, decay)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, run: Any, grad_s_seq: Any, grad_v: Any, *settings: Any) -> tuple[Any, Any]:
    """Gradients of the input and of the decay, None where there is none."""
    if grad_s_seq is None and grad_v is None:
        return None, None
    derivatives, h, slopes, decay = ctx.saved_tensors
    grad_x, grad_decay = run(grad_s_seq, grad_v, derivatives, h, slopes, decay, *settings)
    return grad_x, grad_decay if slopes.numel() else None


class _EagerLIF(torch.autograd.Function):
    """A single step is reshaped in here, where no view costs an autograd node."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        single_step: bool,
        x: Tensor,
        v: Tensor | float,
        decay: Tensor | None,
        settings: LIFSettings,
        save: bool,
        save_slope: bool,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels, ctx.single_step, ctx.settings = kernels, single_step, settings
        output = kernels.forward(
            x.unsqueeze(0) if single_step else x, v, decay, settings, save, save_slope, overwrite
        )
        s_seq, v_next, *_ = output
        if v_next is v:
            ctx.mark_dirty(v)
        _save(ctx, decay, settings.charged_out, output)
        return s_seq.squeeze_(0) if single_step else s_seq, v_next

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_s: Tensor | None, grad_v: Tensor | None) -> Any:
        if ctx.single_step and grad_s is not None:
            grad_s = grad_s.unsqueeze(0)
        grad_x, grad_decay = _gradients(ctx, ctx.kernels.backward, grad_s, grad_v, ctx.settings)
        if ctx.single_step and grad_x is not None:
            grad_x.squeeze_(0)
        return None, None, grad_x, None, grad_decay, None, None, None, None


class _AfterReset(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        v_threshold: float,
        v_reset: float | None,
        detach_reset: bool,
        surrogate: Surrogate,
    ) -> Tensor:
        ctx.save_for_backward(h)
        ctx.settings = v_threshold, v_reset, detach_reset, surrogate
        return torch_lif.after_reset(h, v_threshold, v_reset, torch.empty_like(h))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_v: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        v_threshold, v_reset, detach_reset, surrogate = ctx.settings
        local = derivative(h - v_threshold, surrogate.name, surrogate.parameters)
        by_h = torch_lif.state_derivative(h, local, 1.0, v_threshold, v_reset, detach_reset)
        return by_h.mul_(grad_v), None, None, None, None
