"""Gradients synchronised once an iteration, where PyTorch's own wrappers synchronise at every backward.

An iteration runs T backward passes. DistributedDataParallel would average gradients over the processes in
each, and ``fully_shard`` gather the parameters in each as well. What both accumulate without synchronising
is synchronised by the last of these passes, with the same sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sltt_ext.forwards import Layer, Replacements

__all__ = [
    "Step",
    "common_generator",
    "has_static_graph",
    "is_distributed",
    "is_sharded",
    "no_synchronisation",
    "replica",
    "synchronised_once",
    "unwrapped",
]

Step = Callable[[bool], AbstractContextManager[Any]]
"""``step(last)`` surrounds forward and backward of one step; ``last`` is whether its backward synchronises."""


def no_synchronisation(last: bool) -> AbstractContextManager[Any]:
    """The `Step` of a single process."""
    return nullcontext()


def is_distributed(net: nn.Module) -> bool:
    """Whether gradients of ``net`` are synchronised between processes."""
    return bool(_replicated(net) or _sharded(net))


def is_sharded(net: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to ``net``, or to a part of it."""
    return bool(_sharded(net))


def has_static_graph(net: nn.Module) -> bool:
    """Whether DistributedDataParallel was told that every iteration has the same graph, back-propagated once."""
    return any(ddp.static_graph for ddp in _replicated(net))


@contextmanager
def synchronised_once(net: nn.Module, sync: bool, every_step: bool = False) -> Iterator[Step]:
    """Surround an iteration of several backward passes of which only the last synchronises gradients.

    Args:
        net: The network, with its wrappers.
        sync: Whether the last one does; False accumulates gradients in each process.
        every_step: Synchronise in every back-propagated step, as an update at every step needs it.
    """
    replicated, sharded = _replicated(net), _sharded(net)
    if every_step or not (replicated or sharded):
        yield no_synchronisation
        return
    with ExitStack() as stack:
        for ddp in replicated:
            stack.enter_context(_replicated_once(ddp, sync and ddp.require_backward_grad_sync))
        if sharded:
            stack.enter_context(_gathered_once(sharded, sync))

        @contextmanager
        def step(last: bool) -> Iterator[None]:
            with ExitStack() as quiet:
                for ddp in replicated:
                    if not (last and sync):
                        quiet.enter_context(ddp.no_sync())
                for module in sharded:
                    module.set_requires_gradient_sync(last and sync, recurse=False)
                yield
            for ddp in replicated:
                ddp.require_forward_param_sync = False

        yield step


def unwrapped(net: nn.Module) -> tuple[nn.Module, Callable[..., Any]]:
    """The network inside of DistributedDataParallel, and how to run it over time through the wrapper.

    Returns:
        The network, and a function ``(outputs, x) -> outputs(forward, x)``, where ``forward`` is that of one call.
    """
    if not isinstance(net, DistributedDataParallel):
        return net, lambda outputs, x: outputs(net, x)
    inner: nn.Module = net.module

    def call(outputs: Callable[..., Any], x: Any) -> Any:
        """The wrapper is called once, and gets its gradients once."""
        with Replacements() as replaced:
            replaced.forward(inner, Layer.TIME, lambda module, forward, x: outputs(forward, x))
            return net(x)

    return inner, call


def replica(net: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around ``net``, or around a network that it is in, whose forward runs right now."""
    ddp = DistributedDataParallel._get_active_ddp_module()
    return ddp if ddp is not None and any(module is net for module in ddp.modules()) else None


def common_generator(net: nn.Module, generator: torch.Generator | None) -> torch.Generator:
    """A generator that draws the same numbers in all processes: those the first process's would have drawn.

    One broadcast when it is made; none when it draws.
    """
    ddp = replica(net) or next(iter(_replicated(net)), None)
    group: Any = distributed.group.WORLD if ddp is None else ddp.process_group
    common = torch.Generator("cpu" if generator is None else generator.device)
    if generator is None:
        common.manual_seed(int(torch.randint(2**62, ()).item()))
    state = [(generator or common).get_state()]
    device = next((parameter.device for parameter in net.parameters()), None)
    distributed.broadcast_object_list(
        state, src=distributed.get_global_rank(group, 0), group=group, device=device
    )
    common.set_state(state[0])
    return common


def _replicated(net: nn.Module) -> list[DistributedDataParallel]:
    return [module for module in net.modules() if isinstance(module, DistributedDataParallel)]


def _sharded(net: nn.Module) -> list[Any]:
    """Modules that ``fully_shard`` was applied to, outermost first."""
    if not distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in net.modules() if isinstance(module, FSDPModule)]


@contextmanager
def _replicated_once(ddp: DistributedDataParallel, synced: bool) -> Iterator[None]:
    """DDP broadcasts buffers in a forward that follows a synchronised one: the first one of each iteration.

    A pass that failed between forward and backward leaves it waiting for gradients: it is told that there are none.
    """
    try:
        yield
    except BaseException:
        ddp.reducer._reset_state()
        raise
    finally:
        ddp.require_forward_param_sync = synced


@contextmanager
def _gathered_once(sharded: list[Any], sync: bool) -> Iterator[None]:
    """Parameters are gathered by the first step, stay for the others, and are sharded again at the end.

    Where ``sync`` is False they stay, with the gradients that are on them, for the next call.
    """
    groups = [group for module in sharded for group in _groups(module)]
    before = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    for module in sharded:
        module.set_reshard_after_backward(False, recurse=False)
    for group in groups:
        group.post_forward_mesh_info = None  # set_reshard_after_forward(False), which torch 2.6 does not have
    try:
        yield
    except BaseException:
        for module in sharded:
            for parameter in module.parameters():
                parameter.grad = None  # of this call; those from before it are put back by the caller
        for root in _outermost(sharded):
            if hasattr(root, "reset_iter_state"):  # torch 2.6 does not have it
                root.reset_iter_state()
        sync = True
        raise
    finally:
        for group, mesh_info, reshard_after_backward in before:
            group.post_forward_mesh_info = mesh_info
            group.reshard_after_backward = reshard_after_backward
        for module in sharded:
            module.set_requires_gradient_sync(True, recurse=False)
            if sync:
                module.reshard()


def _outermost(modules: list[Any]) -> list[Any]:
    inner = {child for module in modules for child in module.modules() if child is not module}
    return [module for module in modules if module not in inner]


def _groups(module: Any) -> list[Any]:
    """The parameter groups of a sharded module: PyTorch has setters for their settings, and no getters."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]
