"""Whether one call of a network with several steps gives the same as the steps one by one.

It does not if a norm runs more than once in a step (or a neuron, see `counting`), or if the network draws random numbers,
keeps its own numbers from call to call, reads the running statistics of a norm, or waits for gradients. The network is
watched for this in the iterations that are measured, in which each call is one of the user's own. What it does is a fact of
every call, not a guess from its layers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from sltt_ext.forwards import Layer, Looking, LookingAtOperators
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.compiled import eager_modules
from sltt_ext.online.gradient_hooks import is_own
from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.online.snapshot import without_modes
from sltt_ext.time_invariant import is_batch_norm

__all__ = ["Watch", "layers_tell_calls_apart"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, tuple)


def layers_tell_calls_apart(net: nn.Module) -> str | None:
    """The layers of ``net`` for which one call of C steps is not C calls: dropout, and norms of an unknown kind."""
    for path, module in net.named_modules():
        if not module.training:
            continue
        if isinstance(module, (_DropoutNd, nn.RReLU)) and getattr(module, "p", 1) > 0:
            return f"{path!r} draws random numbers"
        if isinstance(module, _NormBase) and not is_batch_norm(module):
            return f"{path!r}, a {type(module).__name__}, reads a batch in a way of its own"
    return None


class Watch(SpeedUp):
    """Watches the calls of one pass.

    Args:
        tell: Called with the reason, where one call of several steps is not those steps one by one.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._net, self._multi_step = nn.Module(), False
        self._running = 0  # norms
        self._norms: list[nn.Module] = []  # that have run in this call
        self._rows: tuple[int, int] | None = None  # steps and samples of this call

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Stand around the norms, to see who else reads their statistics."""
        self._net, self._multi_step = one.net, one.multi_step
        for norm in eager_modules(one.net):
            if isinstance(norm, _NormBase):
                one.replaced.forward(norm, Layer.STEPS, self._norm)
                if norm.training:
                    seen = _Seen(norm._buffers, self._read)
                    one.replaced.attribute(norm, "_buffers", seen)
                    one.replaced.at_end(seen.give_back)
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Compare what the network keeps, and the random numbers, before and after."""
        kept, drawn, self._norms, frame = _kept(self._net), _random_states(self._net), [], _mark(call.frame)
        leaf = next(
            (leaf for leaf in tree_leaves(call.frame) if isinstance(leaf, Tensor) and leaf.dim() > 1), None
        )
        self._rows = (call.steps, leaf.shape[1]) if leaf is not None and self._multi_step else None
        with _BatchNormCalls(lambda: self._running) as operators, _GradientHooks() as gradients:
            yield
        if gradients.registered and call.selected:
            self._tell("a hook on a gradient would run once for all of them")
        if len(self._norms) > call.steps * len(set(self._norms)):
            self._tell("it calls a batch norm more than once")
        if frame != _mark(call.frame):
            self._tell("it changes its input in place")
        if operators.outside_of_norms:
            self._tell("it normalises a batch by an operator of its own")
        if not _equal(drawn, _random_states(self._net)):
            self._tell("it draws random numbers")
        if kept != _kept(self._net):
            self._tell("it keeps numbers of its own from call to call")

    def _norm(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._running += 1
        self._norms += [module] * module.training
        if (
            module.training
            and self._rows is not None
            and args
            and not _has_time_in_front(module, args[0], *self._rows)
        ):
            self._tell(f"a {type(module).__name__} reads something that does not have time in front")
        try:
            return forward(*args, **kwargs)
        finally:
            self._running -= 1

    def _read(self, name: str) -> None:
        if not self._running and name != "num_batches_tracked":
            self._tell("it reads the running statistics of a batch norm")


def _has_time_in_front(norm: nn.Module, x: Any, steps: int, samples: int) -> bool:
    """Whether a norm may read ``[C, ...]``, if it takes sequences, or else as many rows of one sample as of another."""
    if not isinstance(x, Tensor) or not x.dim():
        return False
    if getattr(norm, "step_mode", None) == "m" and len(x) in (1, steps):  # 1 in a loop of the network's own
        return True
    return len(x) % samples == 0


class _Seen(dict[str, Any]):
    """The buffers of a norm; tells who reads one."""

    def __init__(self, buffers: dict[str, Any], read: Callable[[str], None]) -> None:
        super().__init__(buffers)
        self._own = buffers
        self._read = read

    def __getitem__(self, name: str) -> Any:
        self._read(name)
        return super().__getitem__(name)

    def give_back(self) -> None:
        """Put what was set meanwhile into the norm's own buffers."""
        self._own.update(self.items())
        for name in self._own.keys() - self.keys():
            del self._own[name]


class _BatchNormCalls(LookingAtOperators):
    """Sees batch norms that are computed outside of a norm's forward."""

    def __init__(self, running: Callable[[], int]) -> None:
        super().__init__()
        self._running = running
        self.outside_of_norms = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in str(func) and "backward" not in str(func) and not self._running():
            self.outside_of_norms = True
        return func(*args, **(kwargs or {}))


class _GradientHooks(Looking):
    """Sees hooks that are registered on tensors, but for this package's own."""

    def __init__(self) -> None:
        super().__init__()
        self.registered = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.register_hook, Tensor.retain_grad) and not (len(args) > 1 and is_own(args[1])):
            self.registered = True
        return func(*args, **(kwargs or {}))


def _kept(net: nn.Module) -> list[Any]:
    """What tells whether a module has changed what it keeps: buffers and attributes, but for states and norms.

    Attributes of torch's own modules (wrappers, too) are no numbers that a network computes with.
    """
    kept: list[Any] = []
    for module in net.modules():
        if isinstance(module, StatefulModule):
            continue
        own = vars(module)
        values: list[Any] = []
        if not type(module).__module__.startswith("torch."):
            values += [own[name] for name in own if name not in _OF_EVERY_MODULE and name != "forward"]
        if not is_batch_norm(module):
            values += own["_buffers"].values()
        kept += [_mark(value) for value in values]
    return kept


def _mark(value: Any) -> Any:
    """What differs once a value is another, or another number of them."""
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if isinstance(value, _CONTAINERS):
        return len(value), [
            _mark(leaf) for leaf in tree_leaves(value) if isinstance(leaf, (Tensor, int, float))
        ]
    return value if isinstance(value, (int, float, str, bool)) else id(value)


def _random_states(net: nn.Module) -> list[Any]:
    devices = {parameter.device for parameter in net.parameters() if parameter.device.type == "cuda"}
    with without_modes():
        cuda = [torch.cuda.get_rng_state(device) for device in sorted(devices, key=str)]
        return [torch.get_rng_state(), *cuda, random.getstate()]


def _equal(before: list[Any], after: list[Any]) -> bool:
    with without_modes():
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after))
