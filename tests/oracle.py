"""Independent oracles: SLTT's gradient by the frameworks' own means, or by plain autograd."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import base, functional
from torch import Tensor, nn


def detach_memories(net: nn.Module) -> None:
    """SpikingJelly's detach, for modules too where its in-place form fails: views, and lists of tensors."""
    for module in net.modules():
        if isinstance(module, base.MemoryModule):
            for name, value in module._memories.items():
                if isinstance(value, Tensor):
                    module._memories[name] = value.detach()
                elif isinstance(value, list):
                    module._memories[name] = [element.detach() for element in value]


def detach_on_entry(net: nn.Module) -> nn.Module:
    """SLTT inside a network's own time loop: every stateful module steps by itself, and detaches before each step."""
    for module in net.modules():
        if isinstance(module, base.MemoryModule):
            module.forward = functools.partial(_step_and_detach, module, module.step_mode)
            module.step_mode = "s"
    return net


def _step_and_detach(module: nn.Module, step_mode: str, x: Tensor) -> Tensor:
    steps = []
    for x_t in x if step_mode == "m" else [x]:
        detach_memories(module)
        steps.append(module.single_step_forward(x_t))
    return torch.stack(steps) if step_mode == "m" else steps[0]


class StepByStep(nn.Module):
    """The mean over time of an original network, all T steps in one graph, each from a constant state: SLTT by autograd."""

    def __init__(self, net: nn.Module, time_steps: int) -> None:
        super().__init__()
        self.net, self.time_steps = net, time_steps

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.steps(x)).mean(0)

    def steps(self, *args: Any, **kwargs: Any) -> list[Any]:
        functional.reset_net(self.net)
        outputs = []
        for _ in range(self.time_steps):
            outputs.append(self.net(*args, **kwargs))
            detach_memories(self.net)
        return outputs


def gradients(net: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in net.parameters()]


def first(output: Any) -> Tensor:
    """The output itself, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def run(module: nn.Module, x_seq: Tensor, step_mode: str) -> Tensor:
    """A module's output over a sequence, in one call or step by step."""
    module.step_mode = step_mode
    if step_mode == "m":
        return first(module(x_seq))
    return torch.stack([first(module(x)) for x in x_seq])


def module_gradients(
    module: nn.Module, x_seq: Tensor, weight: Tensor, step_mode: str, detach: bool = False
) -> list[Tensor]:
    """Gradients of input and parameters for a loss that weights each step's output; one backward per step in 's'.

    They are zero where the loss does not reach.
    """
    x_seq = x_seq.clone().requires_grad_()
    module.zero_grad()
    module.reset()
    module.step_mode = step_mode
    if step_mode == "m":
        _backward((first(module(x_seq)) * weight).sum())
    else:
        for x, step_weight in zip(x_seq, weight, strict=True):
            _backward((first(module(x)) * step_weight).sum())
            if detach:
                detach_memories(module)
    leaves = [x_seq, *module.parameters()]
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:  # a module may pass on nothing of its own step
        loss.backward()


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


def sltt_gradients_of_mean(
    net: nn.Module,
    frames: list[Tensor],
    target: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    selected: tuple[int, ...] | None = None,
    divisor: float | None = None,
) -> list[Tensor]:
    """The loss of the time-mean output: one graph over all steps, state detached between them, one backward.

    Steps that are not selected are constants in the mean, and the others are weighted by T / divisor.
    """
    net = copy.deepcopy(net)
    functional.set_step_mode(net, "s")
    functional.reset_net(net)
    net.zero_grad()
    steps = len(frames)
    outputs = []
    for t, frame in enumerate(frames):
        output = net(frame)
        outputs.append(output if selected is None or t in selected else output.detach())
        detach_memories(net)
    mean = torch.stack(outputs).mean(0)
    weight = steps / (divisor or len(selected or frames))
    (gradient,) = torch.autograd.grad(loss_fn(leaf := mean.detach().requires_grad_(), target), leaf)
    mean.backward(weight * gradient)
    return gradients(net)


def relative_error(actual: list[Tensor | None] | Tensor, expected: list[Tensor | None] | Tensor) -> float:
    """Norm of the difference over norm of the expected value, over all tensors together.

    A gradient may be None in both, where the network does not use a parameter, but not in one.
    """
    if isinstance(actual, Tensor):
        actual, expected = [actual], [expected]
    used = [(a, e) for a, e in zip(actual, expected, strict=True) if a is not None or e is not None]
    difference = torch.cat([(a.double() - e.double()).flatten() for a, e in used])
    scale = torch.cat([e.double().flatten() for _, e in used]).norm()
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
    through_time: bool = False,
) -> tuple[Tensor, Tensor]:
    """The equations of `sltt_ext.functional`, step by step under autograd, carried state detached or not."""
    spikes = []
    rest = v_reset or 0.0
    for x in x_seq:
        v = v if through_time else v.detach()
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
    through_time: bool = False,
) -> tuple[Tensor, Tensor]:
    """The equations of snnTorch's Leaky, step by step under autograd, carried state detached or not."""
    spikes, potentials = [], []
    for x in x_seq:
        mem = mem if through_time else mem.detach()
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
