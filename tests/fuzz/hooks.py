"""Hooks that users hang on modules, on what they return, and on weights."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Record = list[Tensor]


def add_hook(name: str, module: nn.Module, record: Record) -> None:
    if name:
        HOOKS[name](module, record)


def _observe(module: nn.Module, record: Record) -> None:
    module.register_forward_hook(lambda m, inputs, output: record.append(output.detach().mean()))


def _scale(module: nn.Module, record: Record) -> None:
    module.register_forward_hook(lambda m, inputs, output: output * 0.5)


def _scale_input(module: nn.Module, record: Record) -> None:
    module.register_forward_pre_hook(lambda m, inputs: (inputs[0] * 1.2,))


def _in_place(module: nn.Module, record: Record) -> None:
    module.register_forward_hook(lambda m, inputs, output: output.mul_(0.7))


def _retain(module: nn.Module, record: Record) -> None:
    def retain(m: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            record.append(output)

    module.register_forward_hook(retain)


def _gradient(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Record], None]:
    def add(module: nn.Module, record: Record) -> None:
        def hook(m: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(change)

        module.register_forward_hook(hook)

    return add


def _backward(module: nn.Module, record: Record) -> None:
    def halve(m: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        return tuple(None if gradient is None else 0.5 * gradient for gradient in grad_input)

    module.register_full_backward_hook(halve)


def _weight(module: nn.Module, record: Record) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient.clamp(-0.02, 0.02))


def _shrink_gradient(parameter: nn.Parameter) -> None:
    parameter.grad.mul_(0.9)


def _after_weight(module: nn.Module, record: Record) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_shrink_gradient)


HOOKS: dict[str, Callable[[nn.Module, Record], None]] = {
    "observe": _observe,
    "scale": _scale,
    "scale input": _scale_input,
    "in place": _in_place,
    "retain gradient": _retain,
    "reverse gradient": _gradient(lambda gradient: -0.5 * gradient),
    "clamp gradient": _gradient(lambda gradient: gradient.clamp(-0.01, 0.01)),
    "backward": _backward,
    "weight": _weight,
    "after weight": _after_weight,
}
