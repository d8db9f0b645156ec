"""SLTT's gradient of old and nobody's neurons, by their own means: step by step, what is carried detached in between.

Nothing in here needs a SpikingJelly, of whichever line.
"""

import copy
import importlib

import torch
from torch import Tensor

import sltt_ext.clock_driven  # noqa: F401

ROOMS = ("neuron", "layer", "functional", "surrogate")


def packages():
    """What `sltt_ext.clock_driven` puts in place and, where it is installed, the old package itself."""
    ours = [importlib.import_module(f"sltt_ext.clock_driven.{name}") for name in ROOMS]
    installed = [importlib.import_module(f"spikingjelly.clock_driven.{name}") for name in ROOMS]
    found = [_Together("ours", ours)]
    return found if installed[0] is ours[0] else [*found, _Together("installed", installed)]


class _Together:
    """Several rooms as one."""

    def __init__(self, name, rooms):
        self.__name__, self._rooms = name, rooms

    def __getattr__(self, name):
        return next(getattr(room, name) for room in self._rooms if hasattr(room, name))


def takes_sequences(module):
    return any(base.__name__.startswith("MultiStep") for base in type(module).__mro__)


def detach(net):
    for module in net.modules():
        memories = vars(module).get("_memories", {})
        memories.update(
            {name: value.detach() for name, value in memories.items() if isinstance(value, Tensor)}
        )


def step(module, x):
    """One step of a module, whatever it takes."""
    return module(x.unsqueeze(0)).squeeze(0) if takes_sequences(module) else module(x)


def module_by_steps(module, x_seq, weight, v_weight):
    """Outputs, potentials and gradients of the module's own steps, its state detached after each.

    The loss weights each step's output by ``weight`` and the last potential by ``v_weight``.
    """
    module = copy.deepcopy(module)
    x_seq, outputs = x_seq.clone().requires_grad_(), []
    for t, (x, step_weight) in enumerate(zip(x_seq, weight, strict=True)):
        output = step(module, x)
        loss = (output * step_weight).sum()
        if t == len(x_seq) - 1 and hasattr(module, "v"):
            loss = loss + (module.v * v_weight).sum()
        loss.backward()
        detach(module)
        outputs.append(output.detach())
    return torch.stack(outputs), getattr(module, "v", None), gradients(module, x_seq)


def module_in_one_backward(module, x_seq, weight, v_weight):
    """The same of a converted module: one graph over all steps, one backward."""
    x_seq = x_seq.clone().requires_grad_()
    outputs = module(x_seq) if takes_sequences(module) else torch.stack([module(x) for x in x_seq])
    loss = (outputs * weight).sum()
    if hasattr(module, "v"):
        loss = loss + (module.v * v_weight).sum()
    loss.backward()
    return outputs.detach(), getattr(module, "v", None), gradients(module, x_seq)


def gradients(module, *leaves):
    leaves = [*leaves, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def relative_error(actual, expected):
    difference = torch.cat(
        [(a.double() - e.double()).flatten() for a, e in zip(actual, expected, strict=True)]
    )
    scale = torch.cat([e.double().flatten() for e in expected]).norm()
    return (difference.norm() / scale.clamp_min(1e-30)).item()
