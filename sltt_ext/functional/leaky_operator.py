"""The fused Leaky neuron as operators: registered ones for compiled networks, and a leaner one for all others.

The public function and the adapter call `run_leaky`. ``sltt_ext::leaky``, ``sltt_ext::leaky_backward`` and
``sltt_ext::leaky_backward_through_time`` run under ``torch.compile`` and with fake tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from sltt_ext.errors import ConfigurationError, InputError
from sltt_ext.functional.inputs import broadcasts, check_device, check_number, initial_state
from sltt_ext.functional.once import differentiable_once
from sltt_ext.functional.schema import flat, packed
from sltt_ext.functional.traced_leaky import traced_leaky
from sltt_ext.kernels import select_kernels
from sltt_ext.kernels.leaky import LEAKY, LeakyKernels, LeakySettings
from sltt_ext.neuron import TRACES_NEURONS
from sltt_ext.surrogate import Surrogate

__all__ = ["leaky", "leaky_backward", "leaky_backward_through_time", "leaky_settings", "run_leaky"]

_RESET_MECHANISMS = ("subtract", "zero", "none")


def leaky_settings(
    *, reset_mechanism: str, reset_delay: bool, through_time: bool = False, surrogate: Surrogate
) -> LeakySettings:
    """The settings, checked; see `sltt_ext.kernels.leaky.LeakySettings`.

    Raises:
        ConfigurationError: If ``reset_mechanism`` is none of the three.
    """
    if reset_mechanism not in _RESET_MECHANISMS:
        raise ConfigurationError(
            f"reset_mechanism must be one of {', '.join(_RESET_MECHANISMS)}, got {reset_mechanism!r}"
        )
    return LeakySettings(reset_mechanism, reset_delay, through_time, surrogate)


def run_leaky(
    x_seq: Tensor,
    mem: Tensor | float | None,
    beta: Tensor | float,
    threshold: Tensor | float,
    settings: LeakySettings,
    *,
    return_mem_seq: bool,
    backend: str,
    single_step: bool,
) -> tuple[Tensor, Tensor]:
    """Spikes and membrane potentials of a layer; see `sltt_ext.functional.multi_step_leaky`.

    Args:
        x_seq: Input currents ``[T, N, ...]``, or one step ``[N, ...]``.
        mem: Initial membrane potential ``[N, ...]``, one number for all, or None for 0.
        beta: Decay, clamped to 0..1.
        threshold: Firing threshold.
        settings: The settings of the layer.
        return_mem_seq: Whether to return the potentials of all steps. It has no effect for a single step.
        backend: The backend to run on.
        single_step: Whether ``x_seq`` is one step.

    Raises:
        InputError: If ``x_seq``, ``mem``, ``beta`` or ``threshold`` has the wrong shape, dtype or device.
        ConfigurationError: If a number is NaN.
        BackendError: If ``backend`` cannot be used.
    """
    start = 0.0 if mem is None else mem
    mem = initial_state("mem", start, x_seq, single_step, constant=not settings.through_time)
    beta = _parameter("beta", beta, mem).clamp(0, 1)
    threshold = _parameter("threshold", threshold, mem)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_seq, mem, beta, threshold))
    return_mem_seq = return_mem_seq or single_step
    if not torch.compiler.is_compiling():
        kernels = select_kernels(backend, LEAKY, x_seq)
        outputs: tuple[Tensor, Tensor] = _EagerLeaky.apply(
            kernels, single_step, x_seq, mem, beta, threshold, settings, return_mem_seq, save
        )
        return outputs
    if TRACES_NEURONS and backend not in ("cupy", "nvrtc"):
        return traced_leaky(x_seq, mem, beta, threshold, settings, return_mem_seq, single_step)
    steps = x_seq.unsqueeze(0) if single_step else x_seq
    s_seq, returned, _ = leaky(steps, mem, beta, threshold, *flat(settings), return_mem_seq, save, backend)
    return (s_seq.squeeze(0), returned.squeeze(0)) if single_step else (s_seq, returned)


def _parameter(name: str, value: Tensor | float, mem: Tensor) -> Tensor:
    """A parameter as a tensor of the state's dtype that broadcasts to one step."""
    if not isinstance(value, Tensor):
        return torch.full((), check_number(name, value), dtype=mem.dtype, device=mem.device)
    check_device(name, value, mem)
    if not broadcasts(value.shape, mem.shape):
        raise InputError(
            f"{name} of shape {list(value.shape)} does not broadcast to one step of x_seq, {list(mem.shape)}"
        )
    return value.to(mem.dtype)


@torch.library.custom_op("sltt_ext::leaky", mutates_args=())
def leaky(
    x_seq: Tensor,
    mem: Tensor,
    beta: Tensor,
    threshold: Tensor,
    reset_mechanism: str,
    reset_delay: bool,
    through_time: bool,
    surrogate: str,
    parameters: Sequence[float],
    return_mem_seq: bool,
    save: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward operator; see `sltt_ext.kernels.leaky.LeakyKernels`."""
    settings = packed(LeakySettings, reset_mechanism, reset_delay, through_time, surrogate, parameters)
    kernels = select_kernels(backend, LEAKY, x_seq, registered=True)
    return kernels.forward(x_seq, mem, beta, threshold, settings, return_mem_seq, save)


@leaky.register_fake
def _(
    x_seq: Tensor, mem: Tensor, beta: Any, threshold: Any, reset_mechanism: str, reset_delay: bool, through_time: bool,
    surrogate: Any, parameters: Any, return_mem_seq: bool, save: bool, backend: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    settings = packed(LeakySettings, reset_mechanism, reset_delay, through_time, surrogate, parameters)
    mem_seq = torch.empty_like(x_seq, dtype=mem.dtype)
    return (
        torch.empty_like(x_seq),
        mem_seq if return_mem_seq else torch.empty_like(x_seq[0], dtype=mem.dtype),
        mem.new_empty(0)
        if not save or _h_is_returned(settings, return_mem_seq)
        else torch.empty_like(mem_seq),
    )


@torch.library.custom_op("sltt_ext::leaky_backward", mutates_args=())
def leaky_backward(
    grad_s_seq: Optional[Tensor],
    grad_mem: Optional[Tensor],
    h_seq: Tensor,
    mem: Optional[Tensor],
    threshold: Tensor,
    reset_mechanism: str,
    reset_delay: bool,
    through_time: bool,
    surrogate: str,
    parameters: Sequence[float],
    beta_shape: Optional[Sequence[int]],
    learn_threshold: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward operator; see `sltt_ext.kernels.leaky.LeakyKernels`."""
    settings = packed(LeakySettings, reset_mechanism, reset_delay, through_time, surrogate, parameters)
    kernels = select_kernels(backend, LEAKY, h_seq, registered=True)
    return kernels.backward(
        grad_s_seq, grad_mem, h_seq, mem, threshold, settings, beta_shape, learn_threshold
    )


@leaky_backward.register_fake
def _(
    grad_s_seq: Any, grad_mem: Any, h_seq: Tensor, mem: Any, threshold: Tensor, reset_mechanism: Any,
    reset_delay: Any, through_time: Any, surrogate: Any, parameters: Any, beta_shape: Any, learn_threshold: bool,
    backend: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        torch.empty_like(h_seq),
        h_seq.new_empty(0 if beta_shape is None else beta_shape),
        h_seq.new_empty(threshold.shape if learn_threshold else 0),
    )


@torch.library.custom_op("sltt_ext::leaky_backward_through_time", mutates_args=())
def leaky_backward_through_time(
    grad_s_seq: Optional[Tensor],
    grad_mem: Optional[Tensor],
    h_seq: Tensor,
    mem: Optional[Tensor],
    beta: Tensor,
    threshold: Tensor,
    reset_mechanism: str,
    reset_delay: bool,
    through_time: bool,
    surrogate: str,
    parameters: Sequence[float],
    learn_beta: bool,
    learn_threshold: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward operator of a gradient through time; see `sltt_ext.kernels.leaky.LeakyKernels`."""
    settings = packed(LeakySettings, reset_mechanism, reset_delay, through_time, surrogate, parameters)
    kernels = select_kernels(backend, LEAKY, h_seq, registered=True)
    return kernels.backward_through_time(
        grad_s_seq, grad_mem, h_seq, mem, beta, threshold, settings, learn_beta, learn_threshold
    )


@leaky_backward_through_time.register_fake
def _(
    grad_s_seq: Any, grad_mem: Any, h_seq: Tensor, mem: Any, beta: Tensor, threshold: Tensor, reset_mechanism: Any,
    reset_delay: Any, through_time: Any, surrogate: Any, parameters: Any, learn_beta: bool, learn_threshold: bool,
    backend: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        torch.empty_like(h_seq),
        h_seq.new_empty(beta.shape if learn_beta else 0),
        h_seq.new_empty(threshold.shape if learn_threshold else 0),
        torch.empty_like(h_seq[0]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, mem, beta, threshold, *fields, return_mem_seq, _, ctx.backend = inputs
    _save(ctx, mem, beta, threshold, packed(LeakySettings, *fields), return_mem_seq, output)
    ctx.single_step = False


class _RegisteredBackward:
    """The backward operators, called like a backend's kernels."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def backward(self, *given: Any) -> Any:
        *tensors, settings, beta_shape, learn_threshold = given
        return leaky_backward(*tensors, *flat(settings), beta_shape, learn_threshold, self.backend)

    def backward_through_time(self, *given: Any) -> Any:
        *tensors, settings, learn_beta, learn_threshold = given
        return leaky_backward_through_time(
            *tensors, *flat(settings), learn_beta, learn_threshold, self.backend
        )


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    return (*_gradients(ctx, _RegisteredBackward(ctx.backend), *grads[:2]), *[None] * 8)


leaky.register_autograd(_backward, setup_context=_setup_context)


def _h_is_returned(settings: LeakySettings, return_mem_seq: bool) -> bool:
    """Whether the charged potentials that backward reads are the returned ones."""
    return return_mem_seq and not settings.resets_in_step


def _save(
    ctx: Any,
    mem: Tensor,
    beta: Tensor,
    threshold: Tensor,
    settings: LeakySettings,
    return_mem_seq: bool,
    output: tuple[Tensor, ...],
) -> None:
    _, returned, h_seq = output
    ctx.settings, ctx.return_mem_seq = settings, return_mem_seq
    ctx.learn_beta, ctx.learn_threshold = beta.requires_grad, threshold.requires_grad
    through_time = settings.through_time
    needs_mem = (
        settings.resets_in_step
        or ctx.learn_beta
        or ctx.learn_threshold
        or (through_time and settings.reset_mechanism == "zero")
    )
    h = returned if _h_is_returned(settings, return_mem_seq) else h_seq
    ctx.beta_shape = beta.shape
    ctx.save_for_backward(h, mem if needs_mem else None, beta if through_time else None, threshold)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, kernels: Any, grad_s: Any, grad_mem: Any) -> tuple[Any, Any, Any, Any]:
    """Gradients of the input, of the initial potential, of beta and of the threshold; None if there is none."""
    if grad_s is None and grad_mem is None:
        return None, None, None, None
    h, mem, beta, threshold = ctx.saved_tensors
    if ctx.single_step:
        h, grad_s = h.unsqueeze(0), None if grad_s is None else grad_s.unsqueeze(0)
    if grad_mem is not None and (ctx.single_step or not ctx.return_mem_seq):
        grad_mem = grad_mem.unsqueeze(0)
    grad_start = None
    if ctx.settings.through_time:
        grad_x, grad_beta, grad_threshold, grad_start = kernels.backward_through_time(
            grad_s, grad_mem, h, mem, beta, threshold, ctx.settings, ctx.learn_beta, ctx.learn_threshold
        )
    else:
        beta_shape = ctx.beta_shape if ctx.learn_beta else None
        grad_x, grad_beta, grad_threshold = kernels.backward(
            grad_s, grad_mem, h, mem, threshold, ctx.settings, beta_shape, ctx.learn_threshold
        )
    return (
        grad_x.squeeze_(0) if ctx.single_step else grad_x,
        grad_start,
        grad_beta if ctx.learn_beta else None,
        grad_threshold if ctx.learn_threshold else None,
    )


class _EagerLeaky(torch.autograd.Function):
    """The operator outside of compilation, with the same kernels and a fraction of the cost per call.

    It reshapes a single step itself, because a view costs no autograd node here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: LeakyKernels,
        single_step: bool,
        x: Tensor,
        mem: Tensor,
        beta: Tensor,
        threshold: Tensor,
        settings: LeakySettings,
        return_mem_seq: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels, ctx.single_step = kernels, single_step
        output = kernels.forward(
            x.unsqueeze(0) if single_step else x, mem, beta, threshold, settings, return_mem_seq, save
        )
        if single_step:
            for tensor in output:
                tensor.squeeze_(0)
        _save(ctx, mem, beta, threshold, settings, return_mem_seq, output)
        s, returned, _ = output
        return s, returned

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_s: Tensor | None, grad_mem: Tensor | None) -> Any:
        grad_x, grad_start, grad_beta, grad_threshold = _gradients(ctx, ctx.kernels, grad_s, grad_mem)
        if not ctx.needs_input_grad[3]:
            grad_start = None
        return None, None, grad_x, grad_start, grad_beta, grad_threshold, None, None, None
