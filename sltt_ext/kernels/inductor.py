"""Compiling element-wise functions with `torch.compile`: the only file that calls it.

A function is traced once for each of its settings, which become constants of a graph of its own. Tensors of the fused
neurons are ``[..., elements]`` with any number of elements, so that nothing is compiled again for a layer of another shape.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from sltt_ext.errors import BackendError

__all__ = ["inductor_problem", "run_compiled", "run_graph", "traced"]

_COMPILED: dict[Any, Callable[..., Any]] = {}
_LOCK = threading.RLock()
_TRACED_WITH = 16
"""Elements; neither 0 nor 1, which are special to tracing."""


def run_compiled(function: Callable[..., Any], settings: tuple[Any, ...], *tensors: Tensor | None) -> Any:
    """``function(settings, *tensors)``, element-wise along a last dimension of at least two, compiled.

    Raises:
        BackendError: If there is no working compiler.
    """
    given = [tensor.detach() for tensor in tensors if tensor is not None]
    kinds = tuple(
        None if tensor is None else (tensor.dtype, tensor.device, tensor.shape[:-1]) for tensor in tensors
    )

    def positional(*given: Tensor) -> Any:
        remaining = iter(given)
        return function(settings, *(None if tensor is None else next(remaining) for tensor in tensors))

    def graph() -> GraphModule:
        examples = [
            tensor.new_zeros((*tensor.shape[:-1], _TRACED_WITH) if tensor.dim() else ()) for tensor in given
        ]
        return traced(torch.func.functionalize(positional, remove="mutations"), examples)

    return run_graph((function, settings, kinds), graph, given)


def run_graph(key: tuple[Any, ...], graph: Callable[[], GraphModule], given: Sequence[Tensor]) -> Any:
    """What the graph for ``key`` returns for ``given``; it is made and compiled the first time.

    Raises:
        BackendError: If there is no working compiler.
    """
    key = (*key, torch.is_autocast_enabled(given[0].device.type))
    with torch.no_grad():
        try:
            run = _COMPILED.get(key)
            if run is not None:
                return run(*given)
            with _LOCK:
                if key not in _COMPILED:
                    _COMPILED[key] = torch.compile(graph().forward, dynamic=True, fullgraph=True)
                return _COMPILED[key](*given)
        except Exception as error:
            if not _is_of_the_compiler(error):
                raise
            raise BackendError(f"backend='inductor' cannot be used: {_advice(error)}") from error


def traced(
    function: Callable[..., Any], examples: Sequence[Tensor], tracing_mode: Literal["real", "fake"] = "real"
) -> GraphModule:
    """The graph of ``function``: no dispatch mode, autocast or gradient of this thread is in it."""
    from torch.fx.experimental.proxy_tensor import make_fx  # a second's import

    trace = make_fx(function, tracing_mode=tracing_mode)
    with ThreadPoolExecutor(1) as clean:
        graph: GraphModule = clean.submit(trace, *examples).result()
    return graph


@functools.cache
def inductor_problem() -> str | None:
    """Why nothing can be compiled for the CPU on this machine, and what to do; None if it can."""
    try:
        torch.compile(torch.neg, fullgraph=True)(torch.zeros(8))
    except Exception as error:
        if not _is_of_the_compiler(error):
            raise
        return _advice(error)
    return None


def _is_of_the_compiler(error: Exception) -> bool:
    return any(cls.__module__.startswith(("torch._dynamo", "torch._inductor")) for cls in type(error).__mro__)


def _advice(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        f"torch.compile fails ({' '.join(lines[:2])}): install a C++ compiler, e.g. g++ (for CUDA tensors Triton), or "
        "use backend='torch'"
    )
