"""What torch.compile runs: modules of a network, or the calls of a network that runs over time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakSet

from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._compile import _disable_dynamo

__all__ = ["compiling_calls", "eager_modules", "is_compiled", "part_runs_compiled", "runs_compiled"]

Forward = Callable[..., Any]

_CALLS_COMPILED: WeakSet[nn.Module] = WeakSet()
_PARTS: WeakSet[nn.Module] = WeakSet()


@_disable_dynamo(recursive=False)
def compiling_calls(
    net: nn.Module,
    run: Callable[..., Any],
    forward_of: Callable[[nn.Module], Forward],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """``run(net, forward_of, args, kwargs)`` where torch.compile is at work: the calls of ``net`` are compiled, and not ``run``.

    Calls in a backward pass, which may be in another thread, are compiled by the same compiler.
    """
    compiler = set_eval_frame(None)

    def compiled_of(module: nn.Module) -> Forward:
        forward = forward_of(module)
        return partial(_compiled, compiler, forward) if module is net else forward

    _CALLS_COMPILED.add(net)
    try:
        return run(net, compiled_of, args, kwargs)
    finally:
        set_eval_frame(compiler)


def _compiled(compiler: Any, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    before = set_eval_frame(compiler)
    try:
        return _call(forward, args, kwargs)
    finally:
        set_eval_frame(before)


def _call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The frame that is compiled: those of torch's own modules would not be."""
    return forward(*args, **kwargs)


def part_runs_compiled(module: nn.Module) -> Callable[[], None]:
    """Take ``module`` for one that torch.compile runs, until what is returned is called."""
    _PARTS.add(module)
    return partial(_PARTS.discard, module)


def is_compiled(net: nn.Module) -> bool:
    """Whether torch.compile runs ``net`` or a part of it."""
    return any(map(runs_compiled, net.modules()))


def eager_modules(net: nn.Module) -> Iterator[nn.Module]:
    """The modules of ``net``, each once, without those inside of what torch.compile runs."""
    waiting, seen = [net], set()
    while waiting:
        module = waiting.pop()
        if module not in seen and not runs_compiled(module):
            seen.add(module)
            yield module
            waiting += module.children()


def runs_compiled(module: nn.Module) -> bool:
    """Whether torch.compile runs ``module``."""
    wrapper = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    return (
        isinstance(module, wrapper)
        or module._compiled_call_impl is not None
        or module in _CALLS_COMPILED
        or module in _PARTS
    )
