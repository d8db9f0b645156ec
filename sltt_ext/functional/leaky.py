r"""snnTorch's Leaky neuron over a sequence, fused, with SLTT's gradient.

For a sequence ``x[t]`` of input currents and an initial membrane potential ``mem``, with a decay
``beta``, and with ``r[t] = H(mem[t-1] - threshold)``, which is 1 if the carried potential still has to be reset::

    subtract   h[t] = beta mem[t-1] + x[t] - r[t] threshold
    zero       h[t] = beta (1 - r[t]) mem[t-1] + x[t]
    none       h[t] = beta mem[t-1] + x[t]

    s[t]   = H(h[t] - threshold)                    strict: no spike at the threshold itself
    mem[t] = h[t]                                   reset_delay: the next step resets
    mem[t] = h[t] - (s[t] - r[t]) threshold         not reset_delay, subtract
    mem[t] = h[t] - (s[t] - r[t]) h[t]              not reset_delay, zero

Backward holds every ``mem[t-1]``, and with it ``r[t]``, constant (Meng et al. 2023, Sec. 4.1), with a
surrogate gradient ``H'``. Losses may read spikes and the membrane potentials of any step. ``beta`` and
``threshold`` may be learned: their gradient is the sum of each step's local term.

With ``through_time`` it is snnTorch's own gradient, through every ``mem[t]``, with only ``r[t]`` constant::

    dL/dmem[t-1] = dL/dh[t] dh[t]/dmem[t-1]        plus the direct gradient if the loss reads mem[t-1]
"""

from __future__ import annotations

from torch import Tensor

from sltt_ext.functional.leaky_operator import leaky_settings, run_leaky
from sltt_ext.surrogate import Surrogate

__all__ = ["multi_step_leaky"]

_DEFAULT_SURROGATE = Surrogate("atan", (2.0,))


def multi_step_leaky(
    x_seq: Tensor,
    mem: Tensor | float | None = None,
    *,
    beta: Tensor | float,
    threshold: Tensor | float = 1.0,
    reset_mechanism: str = "subtract",
    reset_delay: bool = True,
    return_mem_seq: bool = False,
    surrogate: Surrogate = _DEFAULT_SURROGATE,
    backend: str = "auto",
    single_step: bool = False,
    through_time: bool = False,
) -> tuple[Tensor, Tensor]:
    """First-order leaky integrate-and-fire neurons over a sequence, as in snnTorch's ``Leaky``.

    Args:
        x_seq: Input currents ``[T, N, ...]``: float32, float64, float16 or bfloat16.
        mem: Initial membrane potential ``[N, ...]``, one number for all, or None for 0. It is a
            constant for the gradient, except with ``through_time``.
        beta: Decay of the membrane potential per step, clamped to 0..1. A number, or a tensor that
            broadcasts to one step ``[N, ...]``, which may require a gradient.
        threshold: Firing threshold in the units of ``x_seq``. A number, or a tensor that broadcasts to
            one step, which may require a gradient.
        reset_mechanism: ``"subtract"``, ``"zero"`` or ``"none"``.
        reset_delay: Whether the reset takes effect in the next step (snnTorch's default) or at once.
        return_mem_seq: Return the membrane potential of every step, not only of the last one.
        surrogate: Surrogate gradient of the spike.
        backend: ``"auto"``, ``"torch"``, ``"cupy"`` or ``"nvrtc"``.
        single_step: ``x_seq`` is one step ``[N, ...]``, and so are spikes and membrane potential.
        through_time: Take snnTorch's own gradient, through time, and through the initial potential if that
            requires a gradient.

    Returns:
        Spikes ``[T, N, ...]`` in the dtype of ``x_seq``, and the membrane potential after the last step
        ``[N, ...]`` or after every step ``[T, N, ...]``, in float32 for half-precision inputs.

    Raises:
        InputError: If ``x_seq``, ``mem``, ``beta`` or ``threshold`` has the wrong shape, dtype or device.
        ConfigurationError: If ``reset_mechanism`` is none of the three, or a number is NaN.
        BackendError: If ``backend`` cannot be used.

    Examples:
        >>> import torch
        >>> spikes, mem = multi_step_leaky(torch.full((4, 1), 0.6), beta=0.9)
        >>> spikes.flatten().tolist(), round(mem.item(), 4)
        ([0.0, 1.0, 0.0, 1.0], 1.1634)
        >>> beta = torch.tensor(0.9, requires_grad=True)
        >>> spikes, mem_seq = multi_step_leaky(torch.full((4, 1), 0.6), beta=beta, return_mem_seq=True)
        >>> mem_seq.sum().backward()
        >>> mem_seq.shape, round(beta.grad.item(), 4)
        (torch.Size([4, 1]), 2.366)
    """
    settings = leaky_settings(
        reset_mechanism=reset_mechanism,
        reset_delay=reset_delay,
        through_time=through_time,
        surrogate=surrogate,
    )
    return run_leaky(
        x_seq, mem, beta, threshold, settings, return_mem_seq=return_mem_seq, backend=backend, single_step=single_step
    )  # fmt: skip
