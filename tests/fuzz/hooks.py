"""Hooks that users hang on modules, on what they return, and on weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

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


def _named(module: nn.Module, record: Record) -> None:
    module.register_forward_pre_hook(lambda m, inputs, named: ((inputs[0] + 0.1,), named), with_kwargs=True)
    module.register_forward_hook(lambda m, inputs, named, output: output * 0.8, with_kwargs=True)


def _prepended(module: nn.Module, record: Record) -> None:
    module.register_forward_hook(lambda m, inputs, output: output + 0.2)
    module.register_forward_hook(lambda m, inputs, output: output * 0.9, prepend=True, always_call=True)


def _once(module: nn.Module, record: Record) -> None:
    """Looks at the first call only."""

    def look(m: nn.Module, inputs: Any, output: Tensor) -> None:
        record.append(output.detach().mean())
        handle.remove()

    handle = module.register_forward_hook(look)


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


def _before_backward(module: nn.Module, record: Record) -> None:
    module.register_full_backward_pre_hook(
        lambda m, grad_output: tuple(None if gradient is None else 0.5 * gradient for gradient in grad_output)
    )


def _observe_backward(module: nn.Module, record: Record) -> None:
    def look(m: nn.Module, grad_input: Any, grad_output: Any) -> None:
        record.extend(gradient.detach().mean() for gradient in grad_output if gradient is not None)

    module.register_full_backward_hook(look)


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
    "with names": _named,
    "prepended": _prepended,
    "once": _once,
    "retain gradient": _retain,
    "reverse gradient": _gradient(lambda gradient: -0.5 * gradient),
    "clamp gradient": _gradient(lambda gradient: gradient.clamp(-0.01, 0.01)),
    "backward": _backward,
    "before backward": _before_backward,
    "observe backward": _observe_backward,
    "weight": _weight,
    "after weight": _after_weight,
}


@contextmanager
def everywhere(name: str, net: nn.Module, record: Record) -> Iterator[None]:
    """A hook that torch calls for every module, of which those of ``net`` are meant, but for neurons' surrogate functions."""
    meant = {module for path, module in net.named_modules() if path and "surrogate" not in path}

    def observe(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in meant and isinstance(output, Tensor):
            record.append(output.detach().mean())

    def scale(module: nn.Module, inputs: Any, output: Any) -> Any:
        return 0.9 * output if module in meant and isinstance(output, Tensor) else None

    if not name:
        yield
        return
    handle = of_all_modules.register_module_forward_hook({"observe": observe, "scale": scale}[name])
    try:
        yield
    finally:
        handle.remove()
