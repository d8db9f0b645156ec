"""Declared steps compiled: one loop over the elements for all T steps of a call, and one for its gradient.

The states that enter a step are constants in it, so the gradient of step t follows from its input and the states it starts
from. Backward has the inputs and the first states, and runs the steps again on the way, where they are numbers in registers:
nothing is kept for it but what the call was given.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten, tree_unflatten

from sltt_ext.declared.elementwise import CURE, check_elementwise, check_shapes, divide_by_tensors
from sltt_ext.declared.reads import constants_of, tensors_of
from sltt_ext.declared.record import Declaration
from sltt_ext.errors import BackendError, SLTTError, one_line
from sltt_ext.functional.once import differentiable_once
from sltt_ext.kernels.inductor import run_graph, traced
from sltt_ext.kernels.layout import is_dense
from sltt_ext.twin import twin_of

__all__ = ["run_compiled_steps"]


def run_compiled_steps(
    declaration: Declaration, module: Any, x: Tensor, state: tuple[Any, ...], time_dim: int | None
) -> tuple[Any, tuple[Any, ...]]:
    """Output and states after all steps of ``x``, whose time is on axis ``time_dim`` (None: one step).

    Raises:
        BackendError: If the step is not element-wise, or cannot be traced.
    """
    x = x if is_dense(x.shape, x.stride()) else x.contiguous()
    read = tensors_of(module, declaration.state)
    entering = [value for value in state if isinstance(value, Tensor)]
    numbers = tuple(None if isinstance(value, Tensor) else (value,) for value in state)
    constants = constants_of(declaration.step, module, declaration.state)  # type: ignore[arg-type]
    steps = 1 if time_dim is None else x.shape[time_dim]
    tensors = (*entering, *read.values())
    key = (
        declaration.step, type(module), time_dim, steps, numbers, constants,
        *((path, tensor.shape) for path, tensor in read.items()), *map(_kind, (x, *tensors)),
    )  # fmt: skip
    program = _PROGRAMS.get(key)
    if program is None:
        program = _PROGRAMS[key] = _Program(declaration, module, time_dim, numbers, list(read), x, tensors)
    values = _Steps.apply(program, x, *tensors)
    return program.rebuilt(values)


_PROGRAMS: dict[Hashable, _Program] = {}


def _kind(tensor: Tensor) -> Hashable:
    """What a graph depends on; sizes are open but for 0 and 1, which broadcast."""
    sizes = tuple(size if size < 2 else None for size in tensor.shape)
    order = sorted(range(tensor.dim()), key=lambda axis: (-tensor.stride()[axis], axis))
    return tensor.dtype, tensor.device, sizes, tuple(order)


class _Program:
    """The steps of one declaration, of so many steps and with given constants, as functions of tensors alone."""

    def __init__(
        self,
        declaration: Declaration,
        module: Any,
        time_dim: int | None,
        numbers: tuple[Any, ...],
        paths: list[tuple[str, str, str]],
        x: Tensor,
        tensors: Sequence[Tensor],
    ) -> None:
        self._declaration, self._time_dim, self._numbers, self._paths = declaration, time_dim, numbers, paths
        self.name = module.original.__name__
        self._twin: nn.Module = twin_of(module, module.original)
        self._entering = numbers.count(None)
        one = x if time_dim is None else x.select(time_dim, 0)
        check_elementwise(self.name, self.traced(self._two_steps, [one, *tensors]), 1 + self._entering)

    def traced(self, function: Callable[..., Any], examples: Sequence[Tensor]) -> GraphModule:
        """The graph of ``function``, with no numbers in sight.

        Raises:
            BackendError: If it cannot be traced.
        """
        before = _attributes(self._twin)
        try:
            graph = traced(function, [tensor.detach() for tensor in examples], tracing_mode="fake")
        except SLTTError:
            raise
        except Exception as error:
            raise BackendError(
                f"backend='inductor' cannot trace the step of {self.name} ({one_line(error)}): write it with torch's operators on "
                f"its input, its states and the tensors of the module, and no others; {CURE}"
            ) from error
        given = {".".join(filter(None, (path, name))) for path, store, name in self._paths if not store}
        after = _attributes(self._twin)
        changed = [
            name for name, value in after.items() if before.get(name) is not value and name not in given
        ]
        if changed:
            raise BackendError(
                f"backend='inductor' cannot run the step of {self.name}: it writes to {changed[0]} of the module, which a compiled "
                f"step does not; {CURE}"
            )
        graph.graph.eliminate_dead_code()
        check_shapes(self.name, graph)
        if examples[0].is_cpu:
            divide_by_tensors(graph)
        graph.recompile()
        return graph

    def run(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What `_all_steps` returns, by its graph."""
        key = (self, "forward")
        values: tuple[Tensor, ...] = run_graph(
            key, lambda: self.traced(self._all_steps, [x, *tensors]), [x, *tensors]
        )
        return values

    def run_backward(
        self, needs: tuple[bool, ...], given: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of ``given``, the input and the tensors, where they are needed."""
        present = tuple(grad is not None for grad in grads)
        arriving = [grad for grad in grads if grad is not None]

        def gradients(*tensors: Tensor) -> Any:
            remaining = iter(tensors[len(given) :])
            all_grads = [next(remaining) if there else None for there in present]
            return self._gradients(needs, tensors[: len(given)], all_grads)

        key = (self, needs, present, *map(_kind, arriving))
        found: tuple[Tensor | None, ...] = run_graph(
            key, lambda: self.traced(gradients, [*given, *arriving]), [*given, *arriving]
        )
        return found

    def rebuilt(self, values: Sequence[Tensor]) -> tuple[Any, tuple[Any, ...]]:
        """Output and states, as the step returns them."""
        output = tree_unflatten([values[place] for place in self._places[0]], self._structure)
        states = tuple(values[place] if isinstance(place, int) else place[0] for place in self._places[1])
        return output, states

    def _state(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        entering = iter(tensors[: self._entering])
        return tuple(next(entering) if number is None else number[0] for number in self._numbers)

    def _reading(self, tensors: Sequence[Tensor]) -> nn.Module:
        """The twin, with these as its tensors."""
        for (path, store, name), tensor in zip(self._paths, tensors[self._entering :], strict=True):
            own = vars(self._twin.get_submodule(path))
            (own[store] if store else own)[name] = tensor
        return self._twin

    def _step(self, x: Tensor, state: tuple[Any, ...], tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        output, state = self._declaration.run(self._reading(tensors), x, state)
        leaves, self._structure = tree_flatten(output)
        odd = [value for value in leaves if not isinstance(value, Tensor)]
        odd += [value for value in state if not isinstance(value, (Tensor, int, float, type(None)))]
        if odd:
            raise BackendError(
                f"backend='inductor' cannot run the step of {self.name}: it returns a {type(odd[0]).__name__}, where a compiled "
                f"step has tensors; {CURE}"
            )
        return leaves, state

    def _two_steps(self, x: Tensor, *tensors: Tensor) -> list[Tensor]:
        """The first step and one like all others: at first a state may be None."""
        first, state = self._step(x, self._state(tensors), tensors)
        second, state = self._step(x, state, tensors)
        return [*first, *second, *(value for value in state if isinstance(value, Tensor))]

    def _each(self, x: Tensor) -> Sequence[Tensor]:
        return [x] if self._time_dim is None else x.unbind(self._time_dim)

    def _all_steps(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Outputs of all steps, and the states that the last one leaves: each tensor once, and none that came in."""
        state, outputs = self._state(tensors), []
        for one in self._each(x):
            leaves, state = self._step(one, state, tensors)
            outputs.append(leaves)
        if self._time_dim is None:
            values = list(outputs[0])
        else:
            values = [torch.stack(each, dim=self._time_dim) for each in zip(*outputs)]
        returned: list[Tensor] = []
        self._places = (
            [_place(value, returned) for value in values],
            [_place(value, returned) if isinstance(value, Tensor) else (value,) for value in state],
        )
        came_in = {id(tensor) for tensor in (x, *tensors)}
        return tuple(
            value.clone() if id(value) in came_in or value._is_view() else value for value in returned
        )

    def _gradients(
        self, needs: tuple[bool, ...], given: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        x, *tensors = given
        leaves = [_leaf(tensor, need) for tensor, need in zip(tensors, needs[1:])]
        of_x: list[Tensor] = []
        of_tensors: list[Tensor | None] = [None] * len(leaves)
        state = self._state(leaves)
        outputs, states = self._places
        every = self._each(x)
        for t, given_one in enumerate(every):
            one = _leaf(given_one, needs[0])
            values, state = self._step(one, state, leaves)
            arriving: list[Tensor | None] = [
                grad if grad is None or self._time_dim is None else grad.select(self._time_dim, t)
                for grad in (grads[place] for place in outputs)
            ]
            if t == len(every) - 1:
                values += [value for value in state if isinstance(value, Tensor)]
                arriving += [grads[place] for place in states if isinstance(place, int)]
            of_one, *of_read = _gradient(values, arriving, [one, *leaves])
            of_x.append(torch.zeros_like(one) if of_one is None else of_one)
            of_tensors = [_sum(a, b) for a, b in zip(of_tensors, of_read)]
            state = tuple(value.detach() if isinstance(value, Tensor) else value for value in state)
        stacked = of_x[0] if self._time_dim is None else torch.stack(of_x, dim=self._time_dim)
        return [stacked if needs[0] else None, *of_tensors]


def _place(value: Tensor, returned: list[Tensor]) -> int:
    """Where ``value`` is in ``returned``, in which no tensor is twice."""
    for place, other in enumerate(returned):
        if other is value:
            return place
    returned.append(value)
    return len(returned) - 1


def _leaf(tensor: Tensor, need: bool) -> Tensor:
    return tensor.detach().requires_grad_() if need else tensor


def _gradient(
    values: Sequence[Tensor], grads: Sequence[Tensor | None], leaves: Sequence[Tensor]
) -> Iterator[Tensor | None]:
    """The gradient in each of the ``leaves``; None where there is none."""
    pairs = {
        (id(value), id(grad)): (value, grad)  # a state that is the output as well has its gradient
        for value, grad in zip(values, grads)
        if grad is not None and value.requires_grad
    }
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found: Iterator[Tensor | None] = iter(())
    if pairs and wanted:
        outputs, arriving = zip(*pairs.values())
        found = iter(torch.autograd.grad(outputs, wanted, arriving, allow_unused=True))
    for leaf in leaves:
        yield next(found, None) if leaf.requires_grad else None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: _Program, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.program = program
        ctx.save_for_backward(x, *tensors)
        ctx.set_materialize_grads(False)
        values = program.run(x, *tensors)
        ctx.mark_non_differentiable(*(value for value in values if not value.is_floating_point()))
        return values

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(needs))
        return None, *ctx.program.run_backward(needs, ctx.saved_tensors, grads)


def _attributes(twin: nn.Module) -> dict[str, Any]:
    """Plain attributes of a module and of what is in it, tensors apart."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in twin.named_modules()
        for name, value in vars(module).items()
    }
