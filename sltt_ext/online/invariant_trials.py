"""Watching a module that may be time-invariant, for one pass in which every step still evaluates it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from sltt_ext.online.gradient_hooks import gradient_hooks, own
from sltt_ext.online.invariant_tensors import Reads, spread
from sltt_ext.time_invariant import Time

__all__ = ["InvariantModules", "Trial"]


class InvariantModules:
    """What has been found out about a network's modules, from one iteration to the next.

    Attributes:
        refused: Those that may not be evaluated once, whatever they seem.
        off: Whether none may, since not every leaf gets its gradient.
    """

    def __init__(self) -> None:
        self.refused: WeakSet[nn.Module] = WeakSet()
        self.off = False
        self._proven: WeakSet[nn.Module] = WeakSet()
        self._proven_without_gradient: WeakSet[nn.Module] = WeakSet()

    def prove(self, module: nn.Module, differentiable: bool) -> None:
        """Evaluate ``module`` once from now on; in a pass that is back-propagated only if it was watched in one."""
        (self._proven if differentiable else self._proven_without_gradient).add(module)

    def are_proven(self, module: nn.Module, differentiable: bool) -> bool:
        """Whether ``module`` may be evaluated once in a pass."""
        if module in self.refused:
            return False
        return module in self._proven or (not differentiable and module in self._proven_without_gradient)

    def number(self, net: nn.Module) -> int:
        """How many modules of ``net`` are evaluated once in a pass that is back-propagated."""
        return 0 if self.off else sum(self.are_proven(module, True) for module in net.modules())

    def refuse(self, module: nn.Module) -> None:
        """Evaluate ``module`` at every step from now on."""
        self.refused.add(module)

    def state_dict(self, net: nn.Module) -> dict[str, Any]:
        """What was found out: a run that is resumed has to evaluate the same modules once."""
        named = list(net.named_modules())
        return {
            "off": self.off,
            **{name: [path for path, module in named if module in found] for name, found in self._found()},
        }

    def load_state_dict(self, net: nn.Module, state: dict[str, Any]) -> None:
        """Go on with what was found out."""
        self.off = state["off"]
        modules = dict(net.named_modules())
        for name, found in self._found():
            found.clear()
            found.update(modules[path] for path in state[name] if path in modules)

    def __getstate__(self) -> dict[str, Any]:
        """With the modules in lists: what is weak cannot be pickled."""
        return {
            name: list(value) if isinstance(value, WeakSet) else value for name, value in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        for name, value in state.items():
            setattr(self, name, WeakSet(value) if isinstance(value, list) else value)

    def _found(self) -> list[tuple[str, WeakSet[nn.Module]]]:
        return [
            ("refused", self.refused),
            ("proven", self._proven),
            ("proven without gradient", self._proven_without_gradient),
        ]


class Trial:
    """What a module returns at the steps of one pass, and what becomes of it.

    Args:
        module: The module.
        modules: Where it is refused as soon as it fails.
        reads: What it reads in its first call.
        time: Where its output has its time.
        evaluate: Evaluates it for one step, without a graph.
    """

    def __init__(
        self,
        module: nn.Module,
        modules: InvariantModules,
        reads: Reads,
        time: Time,
        evaluate: Callable[[], Tensor],
    ) -> None:
        self.module = module
        self.time = time
        self._modules = modules
        self._reads = reads
        self._evaluate = evaluate
        self._single: Tensor | None = None
        self._returned: dict[int, Tensor] = {}
        self._compared = False
        self._in_call: list[_Output] = []

    def leaf(self) -> Tensor:
        """What the module returns for a single step."""
        assert self._single is not None
        return self._single

    gated = leaf

    def watch(self, output: Any, reads: Reads, steps: int) -> bool:
        """Take in what a call of so many steps returned; whether it still seems to be time-invariant."""
        if self.module in self._modules.refused:
            return False
        if not (
            isinstance(output, Tensor)
            and not output.is_inference()
            and reads.are_as_they_were(self._reads)
            and self._is_as_before(output.detach(), steps)
        ):
            self._modules.refuse(self.module)
            return False
        self._in_call.append(_Output(output, self._returned[steps]))
        return True

    def _is_as_before(self, output: Tensor, steps: int) -> bool:
        """Whether the output is what it has to be: equal to an earlier one, or every step's the one for a single step."""
        if steps in self._returned:
            self._compared = True
            return _equal(output, self._returned[steps])
        if self._single is None:
            if steps == 1:
                self._single = output.clone()
            else:
                try:
                    self._single = self._evaluate()
                except Exception:  # whatever it is, one step of it cannot be had
                    return False
        if steps > 1:
            self._compared = True
            self._returned[steps] = output.clone()
            return _close(output, spread(self._single, self.time, steps))
        self._returned[1] = self._single
        return len(self._returned) == 1 or _close(output, self._single)

    def end_of_call(self) -> None:
        """Refuse the module if a call has changed its output, or its gradient has come more than once."""
        if any(output.is_spoilt() for output in self._in_call):
            self._modules.refuse(self.module)
        self._in_call = []

    def has_passed(self, compared: bool) -> bool:
        """Whether the module may be evaluated once from now on; it may have been ``compared`` in another pass."""
        return (self._compared or compared) and self.module not in self._modules.refused


class _Output:
    """One output of a module, as the call that asked for it treats it."""

    def __init__(self, output: Tensor, before: Tensor) -> None:
        self._output = output
        self._before = before
        self._version = output._version
        self._gradients = gradients = [0]
        count = own(lambda _: _count(gradients))
        self._hook = output.register_hook(count) if output.requires_grad else None

    def is_spoilt(self) -> bool:
        hooked = gradient_hooks(self._output) > 0
        if self._hook is not None:
            self._hook.remove()
        changed = self._output._version != self._version or not _equal(self._output.detach(), self._before)
        return changed or hooked or self._gradients[0] > 1


def _count(number: list[int]) -> None:
    number[0] += 1


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return isinstance(a, FakeTensor) or torch.equal(a, b)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for the rounding of layers that take more samples at a time."""
    if a.shape != b.shape or a.dtype != b.dtype or isinstance(a, FakeTensor):
        return a.shape == b.shape and a.dtype == b.dtype
    tolerance = torch.finfo(a.dtype).eps ** 0.5 if a.is_floating_point() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()) if b.numel() else 0.0)
