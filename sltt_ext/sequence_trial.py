"""A trial of a network of single steps on its first input: whether it is the same on sequences.

The network runs a few steps one by one, and once more all of them in one call, its layers told that they take sequences. As in
`StepTrial`, every neuron is replaced by a smooth function of its input; so what is compared is what the user's own code
makes of the other shape. All is computed in float64, on a copy with weights of its own: the outputs of each step, and the
gradients of every parameter, have to be the same.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map

from sltt_ext.step_modes import sequence_form
from sltt_ext.step_trial import StepTrial

__all__ = ["SequenceTrial", "is_the_same_in_sequences"]

_TOLERANCE = 1e-9


def is_the_same_in_sequences(net: nn.Module, frames: Any, time_steps: int) -> bool:
    """Whether one call of several steps of ``net`` is those steps one by one, as it is now; see `SequenceTrial`."""
    trial = SequenceTrial.of(net.module if isinstance(net, DistributedDataParallel) else net)
    return isinstance(trial, SequenceTrial) and trial.is_the_same(frames, time_steps)


class SequenceTrial(StepTrial):
    """A copy of a network that takes ``[N, ...]``, to be tried; see `StepTrial`."""

    def is_the_same(self, frames: Any, time_steps: int) -> bool:
        """Whether one call of several steps is those steps one by one, for all that the network computes.

        Args:
            frames: What the network would be called with: a tensor ``[C, N, ...]``, or several.
            time_steps: How many steps there are.
        """
        return self._asked(self._compares, frames, time_steps) is True

    def _compares(self, x: Any, *_: Any) -> bool | None:
        device = next((weight.device.type for weight in self.net.parameters()), "cpu")
        x = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, x)
        found = []
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            for in_one_call in (False, True):
                net = copy.deepcopy(self._tried).double()
                if in_one_call:
                    for setting in sequence_form(net) or ():
                        vars(setting.module)[setting.name] = setting.value
                found.append(self._outcome(net, x, in_one_call))
        steps, sequence = found
        if steps is None or sequence is None or len(steps) != len(sequence):
            return None
        return all(map(_is_close, steps, sequence))

    def _outcome(self, net: nn.Module, x: Any, in_one_call: bool) -> list[Tensor] | None:
        """Outputs ``[T, N, ...]`` and gradients; None where a run fails."""
        for norm in net.modules():
            if isinstance(norm, _BatchNorm):  # its statistics are those of a step, see `norms`
                norm.eval()
        tried, paths = self._tried, self._paths
        self._tried, self._paths = net, {module: path for path, module in net.named_modules()}
        try:
            frames = [x] if in_one_call else [tree_map(partial(_step, t), x) for t in range(self.time_steps)]
            each = [leaves for frame in frames if (leaves := _leaves(self._returned(frame))) is not None]
        finally:
            self._tried, self._paths = tried, paths
        if len(each) < len(frames):
            return None
        outputs = each[0] if in_one_call else [torch.stack(parts) for parts in zip(*each)]
        if any(len(output) != self.time_steps for output in outputs):
            return None
        generator = torch.Generator().manual_seed(0)
        weighted = [
            (
                output * torch.rand(output.shape, dtype=torch.float64, generator=generator).to(output.device)
            ).sum()
            for output in outputs
            if output.requires_grad
        ]
        if weighted:
            sum(weighted[1:], weighted[0]).backward()
        gradients = [weight.grad for weight in net.parameters() if weight.grad is not None]
        return [*(output.detach() for output in outputs), *gradients]


def _step(t: int, leaf: Tensor) -> Tensor:
    return leaf[t]


def _leaves(returned: Any) -> list[Tensor] | None:
    leaves, _ = tree_flatten(returned)
    return leaves if leaves and all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves) else None


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not bool(a.isfinite().all()):
        return False
    scale = float(b.abs().max()) if b.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=0, atol=_TOLERANCE * max(scale, 1e-30))
