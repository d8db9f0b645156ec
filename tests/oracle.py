"""Independent oracles: SLTT's gradient by the frameworks' own means, or by plain autograd."""

import copy
from collections.abc import Callable

import torch
from spikingjelly.activation_based import base, functional
from torch import Tensor, nn


def detach_memories(net: nn.Module) -> None:
    """SpikingJelly's detach, for modules too where its in-place form fails on views."""
    for module in net.modules():
        if isinstance(module, base.MemoryModule):
            for name, value in module._memories.items():
                if isinstance(value, Tensor):
                    module._memories[name] = value.detach()


def gradients(net: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in net.parameters()]


def sltt_gradients(
    net: nn.Module,
    frames: list[Tensor],
    target: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    selected: tuple[int, ...] | None = None,
    divisor: float | None = None,
) -> list[Tensor]:
    """The original network, single-step, detached after every step, one backward per step."""
    net = copy.deepcopy(net)
    functional.set_step_mode(net, "s")
    functional.reset_net(net)
    net.zero_grad()
    selected = tuple(range(len(frames))) if selected is None else selected
    for t, frame in enumerate(frames):
        output = net(frame)
        if t in selected:
            (loss_fn(output, target) / (divisor or len(selected))).backward()
        functional.detach_net(net)
    return gradients(net)


def relative_error(actual: list[Tensor] | Tensor, expected: list[Tensor] | Tensor) -> float:
    """Norm of the difference over norm of the expected value, over all tensors together."""
    if isinstance(actual, Tensor):
        actual, expected = [actual], [expected]
    difference = torch.cat(
        [(a.double() - e.double()).flatten() for a, e in zip(actual, expected, strict=True)]
    )
    scale = torch.cat([e.double().flatten() for e in expected]).norm()
    return (difference.norm() / scale.clamp_min(1e-30)).item()


def lif_by_autograd(
    x_seq: Tensor,
    v: Tensor,
    decay: Tensor | float | None,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    heaviside: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The equations of `sltt_ext.functional`, step by step under autograd, carried state detached."""
    spikes = []
    rest = v_reset or 0.0
    for x in x_seq:
        v = v.detach()
        if decay is None:
            h = v + x
        elif decay_input:
            h = v + (x - (v - rest)) * decay
        else:
            h = v - (v - rest) * decay + x
        s = heaviside(h - v_threshold)
        reset_by = s.detach() if detach_reset else s
        v = h - v_threshold * reset_by if v_reset is None else v_reset * reset_by + (1 - reset_by) * h
        spikes.append(s)
    return torch.stack(spikes), v


def leaky_by_autograd(
    x_seq: Tensor,
    mem: Tensor,
    beta: Tensor,
    threshold: Tensor,
    reset_mechanism: str,
    reset_delay: bool,
    heaviside: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The equations of snnTorch's Leaky, step by step under autograd, carried state detached."""
    spikes, potentials = [], []
    for x in x_seq:
        mem = mem.detach()
        r = (mem > threshold).to(mem.dtype)
        if reset_mechanism == "zero":
            h = beta * (1 - r) * mem + x
        else:
            h = beta * mem + x - (r * threshold if reset_mechanism == "subtract" else 0)
        s = heaviside(h - threshold).to(h.dtype)
        mem = h
        if not reset_delay and reset_mechanism != "none":
            mem = h - (s - r) * (threshold if reset_mechanism == "subtract" else h)
        spikes.append(s)
        potentials.append(mem)
    return torch.stack(spikes), torch.stack(potentials)
