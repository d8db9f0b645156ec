"""The fused LIF neurons as operators: registered ones for compiled networks, and a leaner one for all others.

The public functions and the adapters call `run_lif`. ``sltt_ext::lif``, ``sltt_ext::lif_backward`` and
``sltt_ext::lif_backward_through_time`` run under ``torch.compile`` and with fake tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from sltt_ext.errors import ConfigurationError, InputError
from sltt_ext.functional.inputs import check_device, check_number, initial_state, plain, step_shape
from sltt_ext.functional.once import differentiable_once
from sltt_ext.functional.schema import flat, packed
from sltt_ext.functional.traced_lif import traced_lif
from sltt_ext.kernels import select_kernels, torch_lif
from sltt_ext.kernels.lif import LIF, LIFKernels, LIFSettings
from sltt_ext.neuron import TRACES_NEURONS, state_dtype
from sltt_ext.surrogate import Surrogate, derivative

__all__ = ["decay_of", "lif", "lif_backward", "lif_backward_through_time", "lif_settings", "reset", "run_lif"]


def lif_settings(
    *,
    tau: float | None = None,
    decay_input: bool = False,
    factored_leak: bool = False,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    charged: bool = False,
    through_time: bool = False,
    surrogate: Surrogate,
) -> LIFSettings:
    """The settings, checked; see `sltt_ext.kernels.lif.LIFSettings`.

    Raises:
        ConfigurationError: If ``tau`` is not positive, if a number is NaN, if ``factored_leak`` is given but the leak has
            no factor, or if both ``through_time`` and ``charged`` are given.
    """
    if tau is not None and not tau > 0:
        raise ConfigurationError(f"tau must be positive, got {tau}")
    if factored_leak and (decay_input or v_reset):
        raise ConfigurationError("factored_leak needs decay_input=False and a resting potential of 0")
    if charged and through_time:
        raise ConfigurationError(
            "charged=True has no gradient through time: use charged=False with through_time=True"
        )
    return LIFSettings(
        None if tau is None else float(tau),
        decay_input,
        factored_leak,
        check_number("v_threshold", v_threshold),
        None if v_reset is None else check_number("v_reset", v_reset),
        detach_reset,
        charged,
        through_time,
        surrogate,
    )


def decay_of(w: Tensor, x_seq: Tensor) -> Tensor:
    """The decay ``1 / tau = sigmoid(w)`` of parametric LIF neurons.

    Raises:
        InputError: If ``w`` has a dimension or is on another device than ``x_seq``.
    """
    if w.dim() != 0:
        raise InputError(
            f"w must have no dimension (one decay for the whole layer), got shape {list(w.shape)}"
        )
    check_device("w", w, x_seq)
    return w.to(state_dtype(x_seq.dtype)).sigmoid()


def run_lif(
    x_seq: Tensor,
    v: Tensor | float | None,
    decay: Tensor | None,
    settings: LIFSettings,
    *,
    backend: str,
    single_step: bool,
    overwrites: bool = True,
) -> tuple[Tensor, Tensor]:
    """Spikes and final state of a layer; see `sltt_ext.functional.multi_step_lif`.

    Args:
        x_seq: Input currents ``[T, N, ...]``, or one step ``[N, ...]``.
        v: Initial state ``[N, ...]``, one number for all, or None for the resting potential.
        decay: The learnable decay, or None.
        settings: The settings of the layer.
        backend: The backend to run on.
        single_step: Whether ``x_seq`` is one step.
        overwrites: Whether the next charged potential may overwrite a charged potential.

    Raises:
        InputError: If ``x_seq`` or ``v`` has the wrong shape, dtype or device.
        BackendError: If ``backend`` cannot be used.
    """
    overwrite = False
    if isinstance(v, Tensor):
        # a state with a graph is still needed: it must not be overwritten
        overwrite = overwrites and settings.charged and not v.requires_grad
        v = initial_state("v", v, x_seq, single_step, constant=not settings.through_time)
    else:
        step_shape(x_seq, single_step)
        v = float(settings.v_reset or 0.0) if v is None else float(v)
    save_slope = decay is not None and decay.requires_grad and torch.is_grad_enabled()
    has_gradient = x_seq.requires_grad or (isinstance(v, Tensor) and v.requires_grad)
    save = save_slope or (has_gradient and torch.is_grad_enabled())
    if not torch.compiler.is_compiling():
        x_seq, v = plain(x_seq), plain(v)
        kernels = select_kernels(backend, LIF, x_seq)
        outputs: tuple[Tensor, Tensor] = _EagerLIF.apply(
            kernels, single_step, x_seq, v, decay, settings, save, save_slope, overwrite
        )
        return outputs
    if TRACES_NEURONS and backend not in ("cupy", "nvrtc"):
        return traced_lif(x_seq, v, decay, settings, single_step)
    v, v_start = (v, 0.0) if isinstance(v, Tensor) else (None, v)
    steps = x_seq.unsqueeze(0) if single_step else x_seq
    s_seq, v_next, *_ = lif(steps, v, v_start, decay, *flat(settings), save, save_slope, backend)
    return s_seq.squeeze(0) if single_step else s_seq, v_next


def reset(h: Tensor, settings: LIFSettings) -> Tensor:
    """The potential after the reset, with the gradient of the final state; see `sltt_ext.functional.after_reset`."""
    v: Tensor = _AfterReset.apply(h, settings)
    return v


@torch.library.custom_op("sltt_ext::lif", mutates_args=())
def lif(
    x_seq: Tensor,
    v: Optional[Tensor],
    v_start: float,
    decay: Optional[Tensor],
    tau: Optional[float],
    decay_input: bool,
    factored_leak: bool,
    v_threshold: float,
    v_reset: Optional[float],
    detach_reset: bool,
    charged: bool,
    through_time: bool,
    surrogate: str,
    parameters: Sequence[float],
    save: bool,
    save_slope: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward operator; see `sltt_ext.kernels.lif.LIFKernels`. Neurons start from ``v``, or from ``v_start`` without it."""
    settings = packed(
        LIFSettings, tau, decay_input, factored_leak, v_threshold, v_reset, detach_reset, charged, through_time,
        surrogate, parameters,
    )  # fmt: skip
    kernels = select_kernels(backend, LIF, x_seq, registered=True)
    return kernels.forward(x_seq, v_start if v is None else v, decay, settings, save, save_slope)


@lif.register_fake
def _(
    x_seq: Tensor, v: Any, v_start: Any, decay: Any, tau: Any, decay_input: Any, factored_leak: Any, v_threshold: Any,
    v_reset: Any, detach_reset: Any, charged: bool, through_time: bool, surrogate: Any, parameters: Any, save: bool,
    save_slope: bool, backend: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    state = torch.empty_like(x_seq[0] if v is None else v, dtype=state_dtype(x_seq.dtype))
    if save and through_time:
        derivatives, h = x_seq.new_empty(0), torch.empty_like(x_seq, dtype=state.dtype)
    else:
        derivatives = torch.empty_like(x_seq[1:]) if save else x_seq.new_empty(0)
        h = torch.empty_like(state) if save and not charged else state.new_empty(0)
    return (
        torch.empty_like(x_seq),
        state,
        derivatives,
        h,
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
    factored_leak: bool,
    v_threshold: float,
    v_reset: Optional[float],
    detach_reset: bool,
    charged: bool,
    through_time: bool,
    surrogate: str,
    parameters: Sequence[float],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The backward operator; see `sltt_ext.kernels.lif.LIFKernels`."""
    settings = packed(
        LIFSettings, tau, decay_input, factored_leak, v_threshold, v_reset, detach_reset, charged, through_time,
        surrogate, parameters,
    )  # fmt: skip
    kernels = select_kernels(backend, LIF, h, registered=True)
    return kernels.backward(grad_s_seq, grad_v, derivatives, h, slopes, decay, settings)


@lif_backward.register_fake
def _(
    grad_s_seq: Tensor | None, grad_v: Any, derivatives: Tensor, h: Tensor, slopes: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    if grad_s_seq is None:
        grad_x = derivatives.new_empty((derivatives.shape[0] + 1, *h.shape))
    else:
        grad_x = torch.empty_like(grad_s_seq, dtype=derivatives.dtype)
    return grad_x, h.new_empty(() if slopes.numel() else 0)


@torch.library.custom_op("sltt_ext::lif_backward_through_time", mutates_args=())
def lif_backward_through_time(
    grad_s_seq: Optional[Tensor],
    grad_v: Optional[Tensor],
    h_seq: Tensor,
    slopes: Tensor,
    decay: Optional[Tensor],
    tau: Optional[float],
    decay_input: bool,
    factored_leak: bool,
    v_threshold: float,
    v_reset: Optional[float],
    detach_reset: bool,
    charged: bool,
    through_time: bool,
    surrogate: str,
    parameters: Sequence[float],
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward operator of a gradient through time; see `sltt_ext.kernels.lif.LIFKernels`."""
    settings = packed(
        LIFSettings, tau, decay_input, factored_leak, v_threshold, v_reset, detach_reset, charged, through_time,
        surrogate, parameters,
    )  # fmt: skip
    kernels = select_kernels(backend, LIF, h_seq, registered=True)
    return kernels.backward_through_time(grad_s_seq, grad_v, h_seq, slopes, decay, settings)


@lif_backward_through_time.register_fake
def _(
    grad_s_seq: Tensor | None, grad_v: Any, h_seq: Tensor, slopes: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(h_seq if grad_s_seq is None else grad_s_seq, dtype=slopes.dtype)
    return grad_x, h_seq.new_empty(() if slopes.numel() else 0), torch.empty_like(h_seq[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, v, _, decay, *fields, _, _, ctx.backend = inputs
    ctx.has_state = v is not None
    _save(ctx, decay, packed(LIFSettings, *fields), output)


class _RegisteredBackward:
    """The backward operators, called like a backend's kernels."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def backward(self, *given: Any) -> Any:
        *tensors, settings = given
        return lif_backward(*tensors, *flat(settings), self.backend)

    def backward_through_time(self, *given: Any) -> Any:
        *tensors, settings = given
        return lif_backward_through_time(*tensors, *flat(settings), self.backend)


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    grad_x, grad_decay, grad_v = _gradients(ctx, _RegisteredBackward(ctx.backend), *grads[:2])
    return (grad_x, grad_v if ctx.has_state else None, None, grad_decay, *[None] * 13)


lif.register_autograd(_backward, setup_context=_setup_context)


def _save(ctx: Any, decay: Tensor | None, settings: LIFSettings, output: tuple[Tensor, ...]) -> None:
    _, final, derivatives, h, slopes = output
    ctx.settings = settings
    ctx.save_for_backward(derivatives, final if settings.charged else h, slopes, decay)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, kernels: Any, grad_s_seq: Any, grad_v: Any) -> tuple[Any, Any, Any]:
    """Gradients of the input, of the decay and of the initial state; None if there is none."""
    if grad_s_seq is None and grad_v is None:
        return None, None, None
    derivatives, h, slopes, decay = ctx.saved_tensors
    if ctx.settings.through_time:
        given = grad_s_seq, grad_v, h, slopes, decay, ctx.settings
        grad_x, grad_decay, grad_start = kernels.backward_through_time(*given)
    else:
        grad_x, grad_decay = kernels.backward(grad_s_seq, grad_v, derivatives, h, slopes, decay, ctx.settings)
        grad_start = None
    return grad_x, grad_decay if slopes.numel() else None, grad_start


class _EagerLIF(torch.autograd.Function):
    """The operator outside of compilation, with the same kernels and a fraction of the cost per call.

    It reshapes a single step itself, because a view costs no autograd node here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: LIFKernels,
        single_step: bool,
        x: Tensor,
        v: Tensor | float,
        decay: Tensor | None,
        settings: LIFSettings,
        save: bool,
        save_slope: bool,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels, ctx.single_step = kernels, single_step
        output = kernels.forward(
            x.unsqueeze(0) if single_step else x, v, decay, settings, save, save_slope, overwrite
        )
        s_seq, v_next, *_ = output
        if v_next is v:
            ctx.mark_dirty(v)
        _save(ctx, decay, settings, output)
        return s_seq.squeeze_(0) if single_step else s_seq, v_next

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_s: Tensor | None, grad_v: Tensor | None) -> Any:
        if ctx.single_step and grad_s is not None:
            grad_s = grad_s.unsqueeze(0)
        grad_x, grad_decay, grad_start = _gradients(ctx, ctx.kernels, grad_s, grad_v)
        if ctx.single_step and grad_x is not None:
            grad_x.squeeze_(0)
        if not ctx.needs_input_grad[3]:
            grad_start = None
        return None, None, grad_x, grad_start, grad_decay, None, None, None, None


class _AfterReset(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, settings: LIFSettings) -> Tensor:
        ctx.save_for_backward(h)
        ctx.settings = settings
        return torch_lif.after_reset(h, settings, torch.empty_like(h))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_v: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        settings = ctx.settings
        local = derivative(h - settings.v_threshold, settings.surrogate.name, settings.surrogate.parameters)
        return torch_lif.state_derivative(h, local, 1.0, settings).mul_(grad_v), None
