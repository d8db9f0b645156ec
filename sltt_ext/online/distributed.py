"""Gradients synchronised once an iteration, although PyTorch's own wrappers synchronise at every backward.

An iteration runs T backward passes. In each of them, DistributedDataParallel would average gradients over the processes, and
``fully_shard`` would gather the parameters. Here both accumulate without synchronising, and the last of the passes
synchronises the same sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sltt_ext.forwards import Layer, Replacements
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.passes import Call, Pass, SpeedUp

__all__ = [
    "Sharded",
    "Step",
    "by_autograd",
    "common_generator",
    "has_static_graph",
    "is_distributed",
    "is_sharded",
    "is_synchronised",
    "keep_states_apart",
    "largest_of_all",
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


def keep_states_apart(ddp: DistributedDataParallel) -> None:
    """Leave states out of the buffers that the first process gives to the others: snnTorch's neurons keep theirs in buffers.

    A state is that of a process's own batch, and in no checkpoint.
    """
    modules: Iterator[tuple[str, nn.Module]] = ddp.module.named_modules()
    for path, module in modules:
        if isinstance(module, StatefulModule):
            names: set[str] = vars(module)["_non_persistent_buffers_set"]
            ddp.parameters_to_ignore |= {f"{path}.{name}".lstrip(".") for name in names}


def by_autograd(net: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those ``tensors`` of ``net`` to which autograd takes a gradient: what ``fully_shard`` shards gets it from the wrapper.

    In the place of the others there is one tensor that wants a gradient, so that there is a backward pass.
    """
    sharded = {id(parameter) for module in _sharded(net) for parameter in module.parameters()}
    found = [tensor for tensor in tensors if id(tensor) not in sharded]
    return found if len(found) == len(tensors) else [*found, torch.zeros((), requires_grad=True)]


class Sharded(SpeedUp):
    """What ``fully_shard`` shards is gathered once a pass, and its gradients are reduced with the last call, as they would be once.

    For a pass inside of the forward or the backward of a network that may be sharded itself, or be in one that is: the
    hooks of that one do the rest. The user's settings hold for the pass as a whole.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        self._all = _sharded(net)
        self._inner = [module for module in self._all if module is not net]
        self._groups = [group for module in self._inner for group in _groups(module)]
        self._reduces = [group.reduce_grads for group in self._groups]
        self._again = False

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Keep parameters gathered, and shard them again at the end."""
        self._again = one.again
        settings = [(group.post_forward_mesh_info, group.reshard_after_backward) for group in self._groups]
        for group in self._groups:
            group.post_forward_mesh_info, group.reshard_after_backward = None, False
        try:
            yield
        except BaseException:
            _forget_iteration(self._all)
            raise
        finally:
            for group, (mesh_info, reshards), reduces in zip(self._groups, settings, self._reduces):
                group.post_forward_mesh_info, group.reshard_after_backward = mesh_info, reshards
                group.reduce_grads = reduces
                if reshards if one.again else mesh_info is not None:
                    group.reshard()

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Reduce gradients in the last one; in each, the hooks are those of a first one."""
        for group, reduces in zip(self._groups, self._reduces):
            group.reduce_grads = reduces and call.last
        yield
        if self._again:
            for module in self._inner:
                state = module._get_fsdp_state()
                state._training_state = type(state._training_state).IDLE


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


def is_synchronised(net: nn.Module, sync: bool) -> bool:
    """Whether all processes meet in an iteration that ends with synchronised gradients, if it does.

    Where processes may have fewer batches than others (``join()``), they may not.
    """
    replicated = _replicated(net)
    return sync and all(ddp.require_backward_grad_sync and not ddp._join_config.enable for ddp in replicated)


def largest_of_all(net: nn.Module, numbers: Sequence[float]) -> list[float]:
    """The largest of each number in all processes that train ``net``."""
    ddp = next(iter(_replicated(net)), None)
    device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    given = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(
        given,
        op=distributed.ReduceOp.MAX,
        group=distributed.group.WORLD if ddp is None else ddp.process_group,
    )
    largest: list[float] = given.tolist()
    return largest


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
        _forget_iteration(sharded)
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


def _forget_iteration(sharded: list[Any]) -> None:
    """Gradients of an iteration that failed are dropped; those from before it are put back by the caller."""
    for module in sharded:
        for parameter in module.parameters():
            parameter.grad = None
    for root in _outermost(sharded):
        # torch 2.6 does not have it; a root around the network is the user's to reset
        if hasattr(root, "reset_iter_state") and root._get_fsdp_state()._is_root:
            root.reset_iter_state()


def _outermost(modules: list[Any]) -> list[Any]:
    inner = {child for module in modules for child in module.modules() if child is not module}
    return [module for module in modules if module not in inner]


def _groups(module: Any) -> list[Any]:
    """The parameter groups of a sharded module: PyTorch has setters for their settings, and no getters."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]
