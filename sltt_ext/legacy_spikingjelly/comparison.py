"""Whether a neuron of whatever copy computes what the fused operator does: the two are run side by side, once.

A copy that a code base has changed, in its dynamics or in what it keeps besides, is found out here, and runs by the generic
rule.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.functional.lif_operator import decay_of, run_lif
from sltt_ext.kernels.lif import LIFSettings
from sltt_ext.legacy_spikingjelly.names import takes_sequences
from sltt_ext.twin import aside, twin_of

__all__ = ["computes_as_fused"]

_STATES = {"v", "v_seq", "_memories"}
_STEPS = 6
_COMPARED: dict[tuple[Any, ...], bool] = {}


def computes_as_fused(
    module: nn.Module, original: type[nn.Module], settings: LIFSettings, *facts: Any
) -> bool:
    """Whether ``module``, a neuron of class ``original``, computes what the operator does with ``settings``.

    Args:
        module: The neuron. It is not run: a copy of it is.
        original: Its class, as it was before it was converted.
        settings: The operator's.
        facts: What else of the neuron may matter; for each combination the two are compared once.
    """
    key = (original, settings, takes_sequences(module), *facts)
    if key not in _COMPARED:
        if torch.compiler.is_compiling():
            return False
        _COMPARED[key] = aside(partial(_trial, module, original, settings))
    return _COMPARED[key]


def _trial(module: nn.Module, original: type[nn.Module], settings: LIFSettings) -> bool:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            return all(_agrees(module, original, settings, training) for training in (True, False))
        except Exception:
            return False  # it needs an input of another shape, say: the generic rule is right for it


def _agrees(module: nn.Module, original: type[nn.Module], settings: LIFSettings, training: bool) -> bool:
    twin = _at_rest(module, original)
    twin.training = training
    kept = dict(vars(twin))
    sequences = takes_sequences(twin)
    scale = settings.v_threshold if 0 < abs(settings.v_threshold) < 1e6 else 1.0
    x_seq = scale * (
        torch.randn(_STEPS, 3, 8) * torch.tensor([0.1, 0.5, 1.0, 1.0, 2.0, 3.0, 10.0, 100.0]) + 0.3
    )
    parameters = list(twin.parameters(recurse=False))
    v: Tensor | float = twin.v
    start, spikes = v, []
    for x in x_seq:
        inputs, weight = x.clone().requires_grad_(), torch.randn(2, *x.shape)
        s = twin.forward(inputs.unsqueeze(0)).squeeze(0) if sequences else twin.forward(inputs)
        theirs = (s, twin.v, *_gradients(s, twin.v, weight, [inputs, *parameters]))
        decay = decay_of(parameters[0], inputs) if parameters else None
        s, v = run_lif(inputs, v, decay, settings, backend="torch", single_step=True)
        ours = (s, v, *_gradients(s, v, weight, [inputs, *parameters]))
        exact = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(theirs[:2], ours[:2]))
        if not exact or not all(map(_close, theirs[2:], ours[2:])):
            return False
        v = twin.v = v.detach()
        spikes.append(s.detach())
    if sequences and not _runs_sequences(twin, start, x_seq, torch.stack(spikes)):
        return False
    now = vars(twin)
    return now.keys() == kept.keys() and all(now[name] is kept[name] for name in now.keys() - _STATES)


def _runs_sequences(twin: Any, start: Tensor | float, x_seq: Tensor, spikes: Tensor) -> bool:
    """Whether a whole sequence in one call is those steps one by one."""
    twin.v = start
    return torch.equal(twin.forward(x_seq), spikes) and twin.v_seq.shape == x_seq.shape


def _at_rest(module: nn.Module, original: type[nn.Module]) -> Any:
    """A copy on the CPU, in float32 and at rest."""
    twin = twin_of(module, original)
    twin._parameters = {
        name: None if value is None else nn.Parameter(value.detach().float().cpu())
        for name, value in twin._parameters.items()
    }
    twin._memories = copy.deepcopy(twin._memories_rv)
    if getattr(twin, "backend", None) == "cupy":
        twin.backend = "torch"
    return twin


def _gradients(s: Tensor, v: Tensor, weight: Tensor, inputs: list[Any]) -> tuple[Tensor, ...]:
    total = (s * weight[0]).sum() + (v * weight[1]).sum()
    return torch.autograd.grad(total, inputs, materialize_grads=True)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(
        a.nan_to_num(), b.nan_to_num(), rtol=1e-5, atol=1e-6 * float(b.nan_to_num().abs().max())
    )
