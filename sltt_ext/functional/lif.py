r"""Fused multi-step IF, LIF and parametric LIF neurons with SLTT's gradient.

For a sequence ``x[t]`` of input currents and an initial state ``v``, with ``v_rest = v_reset`` (0 for
a soft reset) and the decay ``d = 1 / tau``::

    IF                        h[t] = v[t-1] + x[t]
    LIF, decay_input          h[t] = v[t-1] + (x[t] - (v[t-1] - v_rest)) d
    LIF, not decay_input      h[t] = v[t-1] - (v[t-1] - v_rest) d + x[t]
    the same, factored_leak   h[t] = v[t-1] (1 - d) + x[t]     for v_rest = 0; rounds differently

    s[t] = H(h[t] - v_threshold)
    v[t] = h[t] - v_threshold s[t]                 soft reset (v_reset=None)
    v[t] = v_reset s[t] + h[t] (1 - s[t])          hard reset

Backward holds every ``v[t-1]`` constant (Meng et al. 2023, Sec. 4.1)::

    dL/dx[t] = dL/ds[t] H'(h[t] - v_threshold) dh[t]/dx[t]

with a surrogate gradient ``H'``. The last state ``v[T]`` carries its own local gradient, so a loss may
read the membrane potential.

With ``through_time`` it is the framework's own gradient, through every ``v[t]``. It is computed from the last step to the
first. ``g[t] = dL/dv[t]`` arrives from step ``t + 1``, or at the last step from the final state, and ``f[t] = dL/dh[t]``::

    f[t]       = (dL/ds[t] + g[t] dv[t]/ds[t]) H'(h[t] - v_threshold) + g[t] dv[t]/dh[t]
    dL/dx[t]   = f[t] dh[t]/dx[t]
    g[t-1]     = f[t] dh[t]/dv[t-1]
"""

from __future__ import annotations

from torch import Tensor

from sltt_ext.functional.lif_operator import decay_of, lif_settings, reset, run_lif
from sltt_ext.surrogate import Surrogate

__all__ = ["after_reset", "multi_step_if", "multi_step_lif", "multi_step_plif"]

_DEFAULT_SURROGATE = Surrogate()


def multi_step_if(
    x_seq: Tensor,
    v: Tensor | float | None = None,
    *,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    detach_reset: bool = False,
    surrogate: Surrogate = _DEFAULT_SURROGATE,
    backend: str = "auto",
    single_step: bool = False,
    charged: bool = False,
    through_time: bool = False,
) -> tuple[Tensor, Tensor]:
    """Integrate-and-fire neurons over a sequence.

    Args:
        x_seq: Input currents ``[T, N, ...]``: float32, float64, float16 or bfloat16.
        v: Initial membrane potential ``[N, ...]``, one number for all, or None for the resting potential. It is a constant
            for the gradient, except with ``through_time``.
        v_threshold: Firing threshold, in the units of ``x_seq``.
        v_reset: Potential after a spike; None subtracts ``v_threshold`` instead (soft reset).
        detach_reset: Leave the reset out of the gradient of the states.
        surrogate: Surrogate gradient of the spike.
        backend: ``"auto"``, ``"torch"``, ``"cupy"``, ``"nvrtc"`` or ``"inductor"``.
        single_step: ``x_seq`` is one step ``[N, ...]``, and so are the spikes.
        charged: Return the charged potential ``h[T]``, and take a tensor given as ``v`` for a charged one. The reset is then
            applied at the start of the next call, or by `after_reset`. Backward reads this same tensor, so one tensor is
            kept instead of two. If ``v`` is None or a number, it is not reset. If ``v`` is a tensor that requires no
            gradient, the returned potential may overwrite it.
        through_time: Take the framework's own gradient, through time, and through the initial potential if that requires a
            gradient. Backward keeps one charged potential per step. This does not go together with ``charged``.

    Returns:
        Spikes ``[T, N, ...]`` in the dtype of ``x_seq``, and the final membrane potential ``[N, ...]``,
        in float32 for half-precision inputs.

    Raises:
        InputError: If ``x_seq`` or ``v`` has the wrong shape, dtype or device.
        ConfigurationError: If a number is NaN, or both ``charged`` and ``through_time`` are asked for.
        BackendError: If ``backend`` cannot be used.

    Examples:
        >>> import torch
        >>> spikes, v = multi_step_if(torch.full((3, 1), 0.6))
        >>> spikes.flatten().tolist(), round(v.item(), 2)
        ([0.0, 1.0, 0.0], 0.6)
    """
    settings = lif_settings(
        v_threshold=v_threshold, v_reset=v_reset, detach_reset=detach_reset, charged=charged,
        through_time=through_time, surrogate=surrogate,
    )  # fmt: skip
    return run_lif(x_seq, v, None, settings, backend=backend, single_step=single_step)


def multi_step_lif(
    x_seq: Tensor,
    v: Tensor | float | None = None,
    *,
    tau: float = 2.0,
    decay_input: bool = True,
    factored_leak: bool = False,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    detach_reset: bool = False,
    surrogate: Surrogate = _DEFAULT_SURROGATE,
    backend: str = "auto",
    single_step: bool = False,
    charged: bool = False,
    through_time: bool = False,
) -> tuple[Tensor, Tensor]:
    """Leaky integrate-and-fire neurons over a sequence; see `multi_step_if` for the common arguments.

    Args:
        x_seq: Input currents ``[T, N, ...]``.
        v: Initial membrane potential.
        tau: Membrane time constant, in time steps; positive.
        decay_input: Whether the input current is divided by ``tau`` as well.
        factored_leak: Compute the leak as ``v (1 - d)``, as SpikingJelly 0.0.0.0.14 does. The result is the same except for
            rounding. This needs ``decay_input=False`` and a resting potential of 0.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike, or None for a soft reset.
        detach_reset: Leave the reset out of the gradient of the states.
        surrogate: Surrogate gradient of the spike.
        backend: ``"auto"``, ``"torch"``, ``"cupy"``, ``"nvrtc"`` or ``"inductor"``.
        single_step: ``x_seq`` is one step ``[N, ...]``, and so are the spikes.
        charged: Carry the charged potential.
        through_time: Take the gradient through time.

    Returns:
        Spikes ``[T, N, ...]`` and the final membrane potential ``[N, ...]``.

    Raises:
        ConfigurationError: If ``tau`` is not positive, or a number is NaN.
        InputError: If ``x_seq`` or ``v`` has the wrong shape, dtype or device.
        BackendError: If ``backend`` cannot be used.

    Examples:
        >>> import torch
        >>> x_seq = torch.full((4, 1), 1.5, requires_grad=True)
        >>> spikes, v = multi_step_lif(x_seq, tau=2.0)
        >>> spikes.flatten().tolist()
        [0.0, 1.0, 0.0, 1.0]
        >>> spikes.sum().backward()
        >>> x_seq.grad.shape
        torch.Size([4, 1])
    """
    settings = lif_settings(
        tau=tau, decay_input=decay_input, factored_leak=factored_leak, v_threshold=v_threshold, v_reset=v_reset,
        detach_reset=detach_reset, charged=charged, through_time=through_time, surrogate=surrogate,
    )  # fmt: skip
    return run_lif(x_seq, v, None, settings, backend=backend, single_step=single_step)


def multi_step_plif(
    x_seq: Tensor,
    w: Tensor,
    v: Tensor | float | None = None,
    *,
    decay_input: bool = True,
    factored_leak: bool = False,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    detach_reset: bool = False,
    surrogate: Surrogate = _DEFAULT_SURROGATE,
    backend: str = "auto",
    single_step: bool = False,
    charged: bool = False,
    through_time: bool = False,
) -> tuple[Tensor, Tensor]:
    """Parametric LIF neurons over a sequence: ``1 / tau = sigmoid(w)`` with a learnable ``w``.

    The gradient of ``w`` is the sum of each step's local term. The carried state is a constant, except with ``through_time``.
    The equations are those of Fang et al. 2021 (Parametric LIF); see `multi_step_if` for the common arguments.

    Args:
        x_seq: Input currents ``[T, N, ...]``.
        w: The parameter, a tensor with one element and no dimension.
        v: Initial membrane potential.
        decay_input: Whether the input current is divided by ``tau`` as well.
        factored_leak: Compute the leak as ``v (1 - d)``, as SpikingJelly 0.0.0.0.14 does. The result is the same except for
            rounding. This needs ``decay_input=False`` and a resting potential of 0.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike, or None for a soft reset.
        detach_reset: Leave the reset out of the gradient of the states.
        surrogate: Surrogate gradient of the spike.
        backend: ``"auto"``, ``"torch"``, ``"cupy"``, ``"nvrtc"`` or ``"inductor"``.
        single_step: ``x_seq`` is one step ``[N, ...]``, and so are the spikes.
        charged: Carry the charged potential.
        through_time: Take the gradient through time.

    Returns:
        Spikes ``[T, N, ...]`` and the final membrane potential ``[N, ...]``.

    Raises:
        InputError: If ``x_seq``, ``v`` or ``w`` has the wrong shape, dtype or device.
        BackendError: If ``backend`` cannot be used.

    Examples:
        >>> import torch
        >>> w = torch.tensor(0.0, requires_grad=True)
        >>> spikes, v = multi_step_plif(torch.full((4, 1), 1.5), w)
        >>> spikes.sum().backward()
        >>> bool(w.grad > 0)
        True
    """
    settings = lif_settings(
        decay_input=decay_input, factored_leak=factored_leak, v_threshold=v_threshold, v_reset=v_reset,
        detach_reset=detach_reset, charged=charged, through_time=through_time, surrogate=surrogate,
    )  # fmt: skip
    return run_lif(x_seq, v, decay_of(w, x_seq), settings, backend=backend, single_step=single_step)


def after_reset(
    h: Tensor,
    *,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    detach_reset: bool = False,
    surrogate: Surrogate = _DEFAULT_SURROGATE,
) -> Tensor:
    """The membrane potential after the reset, for neurons that carry their charged potential.

    Args:
        h: Charged potential ``[N, ...]``, as returned with ``charged=True``. May require a gradient.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike, or None for a soft reset.
        detach_reset: Leave the reset out of the gradient.
        surrogate: Surrogate gradient of the spike.

    Returns:
        The potential ``[N, ...]`` that the same neurons return without ``charged``.

    Examples:
        >>> import torch
        >>> _, h = multi_step_if(torch.tensor([[0.4, 1.3]]), charged=True)
        >>> h.tolist(), after_reset(h).tolist()
        ([0.4000000059604645, 1.2999999523162842], [0.4000000059604645, 0.0])
    """
    settings = lif_settings(
        v_threshold=v_threshold, v_reset=v_reset, detach_reset=detach_reset, surrogate=surrogate
    )
    return reset(h, settings)
