"""Tensors that do not depend on time: evaluated once, read by every step, and back-propagated at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from sltt_ext.errors import LossError
from sltt_ext.neuron import state_dtype
from sltt_ext.online.gradient_hooks import gradient_hooks, own
from sltt_ext.online.storages import storage_of
from sltt_ext.time_invariant import Time

__all__ = [
    "BatchStatistics",
    "HandedOut",
    "InvariantTensor",
    "Reads",
    "StaticInput",
    "spread",
]


class InvariantTensor:
    """A tensor that is the same at every step.

    Args:
        evaluate: Computes it, with its graph down to the leaves of the tensors it follows from.
        keeps_graph: Whether the graph of its first evaluation is kept for the backward pass.
        reads: What else it follows from.
        time: How the steps of a call share it.
        counted: The running statistics that every step counts in, of a batch norm in training.
        guard: Called with each gradient that comes to the leaf.
    """

    def __init__(
        self,
        evaluate: Callable[[], Tensor],
        keeps_graph: bool = False,
        reads: Reads | None = None,
        time: Time = Time.NONE,
        counted: BatchStatistics | None = None,
        guard: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.reads = reads
        self.time = time
        self.counted = counted
        self._evaluate = evaluate
        self._keeps_graph = keeps_graph
        self._guard = guard
        self._graph: Tensor | None = None
        self._gated: Tensor | None = None
        self._leaf: Tensor | None = None
        self._version = 0
        self._gradient: Tensor | None = None
        self._hook: RemovableHandle | None = None

    def leaf(self) -> Tensor:
        """The tensor, cut from its graph if need be."""
        if self._leaf is None:
            tensor = self._evaluate()
            self._graph = tensor if self._keeps_graph else None
            self._cut(tensor)
        assert self._leaf is not None
        if self._leaf._version != self._version:
            raise LossError(
                "a network changes the output of a module in place, and the input of that module does not change over time: use "
                "cache_invariant=False"
            )
        return self._leaf

    def gated(self) -> Tensor:
        """The tensor, evaluated anew, with a graph that ends in a gate."""
        if self._gated is None:
            self._gather()
            self._leaf = None  # the same numbers come with the graph
            tensor = self._evaluate()
            self._gated = _Gate.apply(tensor, self) if tensor.requires_grad else tensor
            self._cut(tensor)
        return self._gated

    def _cut(self, tensor: Tensor) -> None:
        self._leaf = tensor.detach().requires_grad_(tensor.requires_grad)
        if self._guard is not None and tensor.requires_grad:
            self._leaf.register_hook(own(self._guard))
        self._version = self._leaf._version

    def back_propagate_early(self) -> None:
        """Back-propagate as soon as the backward pass that follows has reached the leaf."""
        if self._hook is None and self._graph is not None and self._graph.requires_grad:
            leaf = self.leaf()
            self._hook = leaf.register_post_accumulate_grad_hook(lambda _: self.back_propagate())

    def back_propagate(self, retains: bool = False) -> None:
        """Back-propagate what the leaf has gathered, and ``retains`` the graph or frees it."""
        graph = self._evaluate() if self._graph is None else self._graph
        self._graph = graph if retains else None
        gradient = self.gathered()
        assert gradient is not None
        torch.autograd.backward(graph, gradient.to(graph.dtype), retain_graph=retains)

    def _gather(self) -> None:
        """Take the gradients from the leaf, where autograd has added them up; sums of half precision in float32."""
        if self._leaf is None or self._leaf.grad is None:
            return
        if self._gradient is None:
            self._gradient = self._leaf.grad.to(state_dtype(self._leaf.dtype))
        else:
            self._gradient += self._leaf.grad
        self._leaf.grad = None

    def gathered(self) -> Tensor | None:
        """The steps' gradients, which are the caller's from then on."""
        self._gather()
        gradient, self._gradient = self._gradient, None
        return gradient

    def is_waiting(self) -> bool:
        """Whether there are gradients that have not been back-propagated."""
        return self._gradient is not None or (self._leaf is not None and self._leaf.grad is not None)

    def end_of_call(self, last: bool) -> None:
        """Keep no more than later steps need; in half precision, no more than one call's gradients add up in the leaf."""
        if self._leaf is not None and self._leaf.dtype != state_dtype(self._leaf.dtype):
            self._gather()
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._gated = None  # which hold the tensor
        if last:
            self._graph = None


class StaticInput(InvariantTensor):
    """The network's input, itself."""

    def __init__(self, x: Tensor, multi_step: bool) -> None:
        super().__init__(lambda: x, time=Time.AXIS if multi_step else Time.NONE)
        self._x = x.unsqueeze(0) if multi_step else x
        self._first_version = x._version

    def is_unchanged(self) -> bool:
        """Whether it still is what it was."""
        return self._x._version == self._first_version

    def leaf(self) -> Tensor:
        """The input, in every step."""
        return self._x

    def gated(self) -> Tensor:
        """The input, in the last step as well."""
        return self._x


class HandedOut:
    """A tensor that the network was given, as modules are seen to be called with it.

    Attributes:
        value: What it is, of all steps.
        passed_on: Whether a module that is evaluated once has been called with it: its gradient goes past this tensor.
    """

    def __init__(self, tensor: Tensor, value: Any) -> None:
        self.value = value
        self.passed_on = False
        self._tensor = tensor
        self._version, self._grad_fn = tensor._version, tensor.grad_fn
        self._hooks = gradient_hooks(tensor)

    def is_unchanged(self) -> bool:
        """Whether it still is what was handed out: the same numbers, and no other graph behind them."""
        tensor = self._tensor
        return tensor._version == self._version and tensor.grad_fn is self._grad_fn and not self.is_hooked()

    def is_hooked(self) -> bool:
        """Whether someone waits for the gradient of this very tensor."""
        return gradient_hooks(self._tensor) != self._hooks


class Reads:
    """What a module reads besides its arguments: parameters, buffers and tensors that are plain attributes."""

    def __init__(self, module: nn.Module, counts: bool = False) -> None:
        self._tensors = _tensors_of(module, counts)
        self._seen = [(storage_of(tensor), _version(tensor)) for tensor in self._tensors]

    @property
    def usable(self) -> bool:
        """Whether one evaluation can stand for several: no tensor has a graph of one step, or a hook on its gradient."""
        return not any(
            tensor.grad_fn is not None
            or tensor.is_inference()  # which does not count its changes
            or gradient_hooks(tensor)
            for tensor in self._tensors
        )

    @property
    def ids(self) -> list[int]:
        """The ids of all of them."""
        return [id(tensor) for tensor in self._tensors]

    def are_the_same_tensors(self, other: Reads) -> bool:
        """Whether no tensor was exchanged for another."""
        ours, theirs = self._tensors, other._tensors
        return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs))

    def are_as_they_were(self, earlier: Reads) -> bool:
        """Whether these are the same tensors, in the same memory, and unchanged."""
        return self.are_the_same_tensors(earlier) and self._seen == earlier._seen


def _tensors_of(module: nn.Module, counts: bool) -> list[Tensor]:
    """All tensors that a module, or a module in it, holds; without its own buffers where it ``counts`` in them."""
    tensors: list[Tensor] = []
    for part in module.modules():
        own = vars(part)
        tensors += [tensor for tensor in own["_parameters"].values() if tensor is not None]
        if not counts:
            tensors += [tensor for tensor in own["_buffers"].values() if tensor is not None]
        tensors += [value for value in own.values() if isinstance(value, Tensor)]
    return tensors


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class BatchStatistics:
    """A batch norm in training, evaluated once: each step counts in its running statistics, as if it had been computed."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._numbers = 0
        self._unbiased: dict[int, Tensor] = {}  # variances, of calls of so many steps

    def normalise(self, x: Tensor, time: Time) -> Tensor:
        """The normalised ``x``, which is ``[1, N, ...]`` where it has an axis of time."""
        module, x = self._module, x[0] if time is Time.AXIS else x
        self._numbers = x.numel() // x.shape[1]
        like = state_dtype(x.dtype) if module.running_mean is None else module.running_mean.dtype
        self._unbiased = {}
        self._mean, self._variance = torch.zeros(2, x.shape[1], dtype=like, device=x.device)
        output = F.batch_norm(
            x, self._mean, self._variance, module.weight, module.bias, True, 1.0, module.eps
        )
        return output.unsqueeze(0) if time is Time.AXIS else output

    @torch.no_grad()
    def count(self, parts: Sequence[int]) -> None:
        """Update the running statistics as one call for each part does, over so many equal steps."""
        module = self._module
        if module.running_mean is None:
            return
        biased = (self._numbers - 1) / self._numbers
        mean, variance = module.running_mean.data, module.running_var.data  # unseen by autograd, as in torch
        for steps in parts:
            numbers = steps * self._numbers
            if steps not in self._unbiased:
                self._unbiased[steps] = self._variance * (biased * numbers / (numbers - 1))
            torch._foreach_mul_([mean, variance], 1 - module.momentum)
            torch._foreach_add_([mean, variance], [self._mean, self._unbiased[steps]], alpha=module.momentum)
        module.num_batches_tracked.add_(len(parts))


def spread(tensor: Tensor, time: Time, steps: int) -> Tensor:
    """What a call of so many steps reads of a tensor that all of them share; never the tensor itself."""
    if steps > 1 and time is Time.AXIS:
        return tensor.expand(steps, *tensor.shape[1:])
    if steps > 1 and time is Time.BATCH:
        return torch.cat([tensor] * steps)  # which keeps the layout
    return tensor.expand_as(
        tensor
    )  # whose gradient is handed on as it is, unlike a view's, which shares its memory


class _Gate(torch.autograd.Function):
    """Identity; backward adds what the leaf has gathered."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: InvariantTensor) -> Tensor:
        ctx.value = value
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gathered = ctx.value.gathered()
        return gradient if gathered is None else gathered.add_(gradient).to(gradient.dtype), None
