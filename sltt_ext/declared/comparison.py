"""Whether a neuron is what it was declared to be: the declared step and the class's own forward, side by side.

Both run on what the neuron got at its first call, and on random numbers of that shape. Their outputs have to agree, and so do
the gradients of the last step's output: in that step's input, where the carried state is a constant, and in the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.declared.record import Declaration
from sltt_ext.errors import DeclarationError, one_line
from sltt_ext.neuron import constant, tensors_in
from sltt_ext.twin import aside, copied, seed, twin_of

__all__ = ["ABSENT", "compare", "compare_states", "put_to_rest"]

ABSENT: Any = object()
"""Of an attribute that is not there when the neuron is at rest."""

_CURE = "write the step as its forward computes it"
_SCALES = (0.5, 1.0, 3.0)
_ELEMENTS = 4096  # of one step


def compare(module: nn.Module, cls: type[nn.Module], declaration: Declaration, x: Tensor) -> None:
    """Compare the declared step with the forward of ``cls``, on copies of ``module``.

    Raises:
        DeclarationError: If they differ.
    """
    aside(partial(_compare, module, cls, declaration, x))


def compare_states(
    module: nn.Module,
    cls: type[nn.Module],
    declaration: Declaration,
    rest: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """See that the named states are all that goes from one step to the next, on a copy of ``module``.

    Raises:
        DeclarationError: If the neuron carries something else, as numbers or in its graph.
    """
    aside(partial(_compare_states, module, cls, declaration, rest, args, kwargs))


def put_to_rest(module: nn.Module, rest: Mapping[str, Any]) -> None:
    """Give a neuron the states it had before its first step."""
    for name, value in rest.items():
        if value is not ABSENT:
            setattr(module, name, copied(value))
        elif hasattr(module, name):
            delattr(module, name)


def _compare_states(
    module: nn.Module,
    cls: type[nn.Module],
    declaration: Declaration,
    rest: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    name, names = cls.__name__, ", ".join(declaration.state)
    for state in declaration.state:
        if state in vars(module)["_parameters"]:
            raise DeclarationError(f"state= of {name} names {state}, which is a parameter: leave it out")
    more = (
        f"{name} carries more from step to step than {names}: name all attributes that a step leaves for the next one in state=, "
        "and give a step function where an object holds them"
    )
    x = args[0] if args and isinstance(args[0], Tensor) else None
    runs: list[list[Any]] = []
    with torch.random.fork_rng(devices=[x.device] if x is not None and x.is_cuda else []):
        twin = twin_of(module, cls)
        buffers = {
            path: buffer.clone() for path, buffer in twin.named_buffers() if path not in declaration.state
        }
        inputs = [None] * 3 if x is None else _inputs(x, None)
        for _ in range(2):
            put_to_rest(twin, rest)
            for path, buffer in buffers.items():
                twin.get_buffer(path).detach_().copy_(buffer)
            seed(0, torch.device("cpu") if x is None else x.device)
            runs.append(_cut_run(twin, declaration.state, inputs, args, kwargs, more))
        missing = [state for state in declaration.state if not hasattr(twin, state)]
    if missing:
        raise DeclarationError(
            f"{name} has no attribute {missing[0]} after a step, and state= names it: name the attributes that a step leaves"
        )
    for output in runs[0]:
        _check_spikes(name, declaration, output)
    for first, again in zip(*(list(tensors_in(run)) for run in runs)):
        if first.shape != again.shape or not torch.allclose(
            first, again, rtol=1e-5, atol=1e-6, equal_nan=True
        ):
            raise DeclarationError(more)


def _cut_run(
    twin: Any,
    names: tuple[str, ...],
    inputs: Sequence[Tensor | None],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    more: str,
) -> list[Any]:
    """Outputs of some steps; what is named enters each as a constant, so that none has a gradient in an earlier input.

    Raises:
        DeclarationError: If one has: it says ``more``.
    """
    outputs: list[Any] = []
    earlier: list[Tensor] = []
    for one in inputs:
        x = None if one is None else one.clone().requires_grad_(one.is_floating_point())
        for name in names:
            if hasattr(twin, name):
                setattr(twin, name, constant(getattr(twin, name)))
        output = twin.forward(*(args if x is None else (x, *args[1:])), **kwargs)
        states = [getattr(twin, name, None) for name in names]
        left = [tensor for tensor in tensors_in([output, states]) if tensor.grad_fn is not None]
        if earlier and left:
            ones = [torch.ones_like(tensor) for tensor in left]
            gradients = torch.autograd.grad(left, earlier, ones, retain_graph=True, allow_unused=True)
            if any(gradient is not None for gradient in gradients):
                raise DeclarationError(more)
        outputs.append(constant(output))
        earlier += [x] if x is not None and x.requires_grad else []
    return outputs


def _compare(module: nn.Module, cls: type[nn.Module], declaration: Declaration, x: Tensor) -> None:
    name = cls.__name__
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        inputs = _inputs(x, declaration.time_dim)
        theirs = _Run(twin_of(module, cls), inputs)
        theirs.as_the_class(declaration.time_dim)
        ours = _Run(twin_of(module, cls), inputs)
        try:
            ours.as_declared(declaration, cut=False)
        except DeclarationError:
            raise
        except Exception as error:
            raise DeclarationError(f"the step of {name} failed ({one_line(error)}): {_CURE}") from error
        kept = ours.kept_graph(declaration)
        if kept:
            raise DeclarationError(
                f"the step of {name} keeps {kept} with its graph on the module: return it as a state, or detach it"
            )
        _compare_outputs(name, theirs.output, ours.output)
        for output in ours.steps:
            _check_spikes(name, declaration, output)
        cut = _Run(twin_of(module, cls), inputs)
        cut.as_declared(declaration, cut=True)
        theirs_local, ours_local = theirs.gradients(local=True), cut.gradients(local=True)
        if not _close(theirs_local[:1], ours_local[:1]):
            raise DeclarationError(
                f"the gradient of the declared step of {name} is not that of its forward: {_CURE}"
            )
        agree = _close(theirs_local[1:], ours_local[1:]) or _close(
            theirs.gradients()[1:], ours.gradients()[1:]
        )
        if not agree and declaration.as_lif is None:
            raise DeclarationError(
                f"the gradient of the parameters of {name} is not the same by the declared step and by its forward: {_CURE}"
            )


class _Run:
    """One run of a copy over a few steps."""

    def __init__(self, twin: Any, inputs: list[Tensor]) -> None:
        self.twin = twin
        self.inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        self.steps: list[Any] = []
        self.output: Any = None
        seed(0, inputs[0].device)

    def as_the_class(self, time_dim: int | None) -> None:
        if time_dim is None:
            self.steps = [self.twin.forward(x) for x in self.inputs]
        else:
            output = self.twin.forward(torch.stack(self.inputs, dim=time_dim))
            self.steps = _unbound(output, time_dim)
        self.output = self.steps

    def as_declared(self, declaration: Declaration, cut: bool) -> None:
        state = tuple(getattr(self.twin, name, None) for name in declaration.state)
        if declaration.time_dim is not None:
            state = (None,) * max(1, declaration.states)
        for x in self.inputs:
            state = constant(state) if cut or declaration.as_lif is not None else state
            if declaration.as_lif is not None:
                output, *left = declaration.run_as_lif(self.twin, x, state[0], "torch", single_step=True)
                state = tuple(left)
            else:
                output, state = declaration.run(self.twin, x, state)
            self.steps.append(output)
        self.output = self.steps

    def kept_graph(self, declaration: Declaration) -> str | None:
        """The name of an attribute in which a step has left something with a graph."""
        for name, value in vars(self.twin).items():
            if name in declaration.state or name in ("_parameters", "_modules", "_buffers"):
                continue
            leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            if any(leaf.grad_fn is not None for leaf in leaves):
                return name
        return None

    def gradients(self, local: bool = False) -> list[Tensor]:
        """Of the last step's output in its input (``local``), or of all outputs in all inputs; then in the parameters."""
        seed(1, self.inputs[0].device)
        outputs = [tensor for one in (self.steps[-1:] if local else self.steps) for tensor in tensors_in(one)]
        total = sum(
            (tensor * torch.rand_like(tensor)).sum() for tensor in outputs if tensor.is_floating_point()
        )
        leaves = [x for x in (self.inputs[-1:] if local else self.inputs) if x.requires_grad]
        leaves += [parameter for parameter in self.twin.parameters() if parameter.requires_grad]
        if not isinstance(total, Tensor) or not total.requires_grad or not leaves:
            return []
        return list(torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True))


def _inputs(x: Tensor, time_dim: int | None) -> list[Tensor]:
    """Steps to try: the first samples of what came in, and random numbers beside them: enough for rare spikes to differ."""
    seed(0, x.device)
    x = x.detach()
    if time_dim is None:
        return (
            [x] if not x.is_floating_point() else [x, *(scale * torch.randn_like(x) for scale in _SCALES), x]
        )
    few = x.movedim(time_dim, 0)[:, :2]
    if x.is_floating_point() and few.numel():
        copies = max(1, _ELEMENTS * len(few) // (few.numel() * len(_SCALES)))
        wide = few.repeat_interleave(copies, dim=1)
        few = torch.cat([few, *(scale * torch.randn_like(wide) for scale in _SCALES)], dim=1)
    return list(few.unbind(0))


def _unbound(output: Any, time_dim: int) -> list[Any]:
    if isinstance(output, Tensor):
        return list(output.unbind(time_dim))
    return [type(output)(each) for each in zip(*(_unbound(one, time_dim) for one in output))]


def _compare_outputs(name: str, theirs: list[Any], ours: list[Any]) -> None:
    for t, (their, our) in enumerate(zip(theirs, ours)):
        expected, got = list(tensors_in(their)), list(tensors_in(our))
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (expected, got)]
        if shapes[0] != shapes[1]:
            raise DeclarationError(
                f"one step of {name} returns shapes {shapes[1]} by the declared step, and {shapes[0]} by its forward: {_CURE}"
            )
        if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in zip(expected, got)):
            raise DeclarationError(
                f"the declared step of {name} differs from its forward at time step {t}: {_CURE}"
            )


def _check_spikes(name: str, declaration: Declaration, output: Any) -> None:
    """See that what was said to be spikes is.

    Raises:
        DeclarationError: If there are other numbers than 0 and 1.
    """
    spikes = declaration.spikes_in(output)
    if spikes is not None and not bool(((spikes == 0) | (spikes == 1)).all()):
        raise DeclarationError(
            f"spikes={declaration.spikes} of {name} names an output with numbers other than 0 and 1, which cannot be packed: leave "
            "spikes out"
        )


def _close(theirs: list[Tensor], ours: list[Tensor]) -> bool:
    if len(theirs) != len(ours):
        return False
    scale = max((float(tensor.abs().max()) for tensor in theirs if tensor.numel()), default=0.0)
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6 * scale, equal_nan=True) for a, b in zip(theirs, ours)
    )
