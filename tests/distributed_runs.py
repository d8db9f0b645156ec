"""What the processes of the distributed tests run: an iteration, and how often they talked to each other."""

import itertools
import random
from functools import partial
from unittest import mock

import networks
import torch
from spikingjelly.activation_based import layer
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import sltt_ext
from sltt_ext.online import stopwatch
from sltt_ext.online.distributed import _groups, largest_of_all

T, BATCH = 4, 8


def trainer(net, **options):
    plan = {
        "chunk": 1,
        "pack_spikes": False,
        "cache_invariant": True,
    }  # which needs no exchange of measurements
    return sltt_ext.OnlineTrainer(net, F.cross_entropy, T, **{**plan, **options})


def batch(rank, world_size, seed=1):
    """This process's part of the joined batch."""
    x, target = networks.images(BATCH, seed)
    part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    return x[part], target[part]


def gradients(net):
    return [parameter.grad for parameter in net.parameters()]


def network(step_mode="s"):
    return sltt_ext.convert(networks.conv_net(step_mode=step_mode))


def network_with_buffers():
    net = networks.conv_net()
    return sltt_ext.convert(net.insert(1, layer.BatchNorm2d(6)))


def network_through_time():
    """With batch norm, whose statistics are of one step, and none of the process's own."""
    return sltt_ext.convert(networks.freeze_batch_norm(network_with_buffers()), temporal="call")


class Counted:
    """A DistributedDataParallel network, and how often it averaged a bucket or broadcast its buffers."""

    def __init__(self, net, **options):
        self.net = DistributedDataParallel(net, **options)
        self.reduced = self.broadcast = 0
        self.net.register_comm_hook(None, self._reduce)
        sync_buffers = self.net._sync_buffers

        def counted():
            self.broadcast += 1
            sync_buffers()

        self.net._sync_buffers = counted

    def _reduce(self, state, bucket):
        self.reduced += 1
        return allreduce_hook(None, bucket)


def ddp(rank, world_size, options, step_mode="s", compiled=False):
    counted = Counted(network(step_mode))
    net = torch.compile(counted.net, backend="eager") if compiled else counted.net
    online = trainer(net, generator=torch.Generator().manual_seed(5 + rank), **options)
    steps = []
    for _ in range(3):
        counted.net.zero_grad()
        before = counted.reduced
        steps.append(online.forward_backward(*batch(rank, world_size)).time_steps)
    return {"gradients": gradients(counted.net), "steps": steps, "reduced": counted.reduced - before}


def windows(rank, world_size, wrap, options):
    """Two steps in one graph of a network that takes one at a time."""
    net = WRAPPERS[wrap](network_through_time())
    online = trainer(net, chunk=2, generator=torch.Generator().manual_seed(5 + rank), **options)
    for _ in range(2):
        net.zero_grad()
        steps = online.forward_backward(*batch(rank, world_size)).time_steps
    return {"gradients": full(gradients(net)), "steps": steps}


def plans(rank, world_size, step_mode, options):
    """The plan after each iteration, where clocks differ and one process alone has a larger batch later on."""
    ticks = itertools.accumulate(iter(random.Random(rank).random, None))
    with mock.patch.object(stopwatch, "now", partial(next, ticks)):
        net = DistributedDataParallel(network(step_mode))
        online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, **options)
        found = []
        for iteration in range(30):
            online.net.zero_grad()
            x, target = batch(rank, world_size)
            if iteration == 28 and rank == 1:
                x, target = x.repeat(2, 1, 1, 1), target.repeat(2)
            online.forward_backward(x, target, sync=iteration not in (2, 6))
            found.append(str(online.plan))
            if iteration == 27:
                of_plan = [gradient.clone() for gradient in gradients(online.net)]
        largest = largest_of_all(net, [float(rank), -float(rank)])
    return {"plans": found, "gradients": of_plan, "largest": largest}


def default_generator(rank, world_size):
    torch.manual_seed(rank)
    online = trainer(DistributedDataParallel(network()), k=2)
    return [online.forward_backward(*batch(rank, world_size)).time_steps for _ in range(5)]


def accumulation(rank, world_size, outer):
    """Three batches, synchronised with the third."""
    counted = Counted(network())
    online = trainer(counted.net)
    for i in range(3):
        x, target = batch(rank, world_size, seed=i)
        if outer and i < 2:
            with counted.net.no_sync():
                online.forward_backward(x, target)
        else:
            online.forward_backward(x, target, sync=i == 2)
    return {"gradients": gradients(counted.net), "rounds": counted.reduced}


def buffers(rank, world_size, options):
    counted = Counted(network_with_buffers())
    online = trainer(counted.net, **options)
    counts = []
    for _ in range(3):
        before = counted.broadcast
        online.forward_backward(*batch(rank, world_size))
        counts.append(counted.broadcast - before)
    return counts


def updates(rank, world_size):
    """An update at every step."""
    counted = Counted(network())
    optimizer = torch.optim.SGD(counted.net.parameters(), 0.1)
    online = trainer(counted.net, on_step=lambda t: (optimizer.step(), optimizer.zero_grad()))
    online.forward_backward(*batch(rank, world_size))
    return {"weights": [p.detach() for p in counted.net.parameters()], "reduced": counted.reduced}


def crash(rank, world_size, wrap):
    """The gradient of an iteration after one in which the last step failed, in all processes."""
    net = WRAPPERS[wrap](network())
    failing = [True]

    def loss_fn(output, target):
        if failing and loss_fn.calls == T - 1:
            failing.clear()
            raise KeyboardInterrupt
        loss_fn.calls += 1
        return F.cross_entropy(output, target)

    loss_fn.calls = 0
    online = sltt_ext.OnlineTrainer(net, loss_fn, T)
    try:
        online.forward_backward(*batch(rank, world_size))
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError
    assert all(parameter.grad is None for parameter in net.parameters())
    online.forward_backward(*batch(rank, world_size))
    return full(gradients(net))


def shard(net, **options):
    """fully_shard, each weighted layer and then the whole, on the CPU."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for module in net:
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def full(tensors):
    return [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors]


WRAPPERS = {"ddp": DistributedDataParallel, "fully_shard": shard}


GROUPS = 3  # each of the network's weighted layers is gathered and reduced by itself


def fsdp(rank, world_size, options, fsdp_options, step_mode="s"):
    net = shard(network(step_mode), **fsdp_options)
    online = trainer(net, generator=torch.Generator().manual_seed(5 + rank), **options)
    before = settings(net)
    steps = []
    for _ in range(3):
        net.zero_grad()
        with CommDebugMode() as communication:
            steps.append(online.forward_backward(*batch(rank, world_size)).time_steps)
    return {
        "gradients": full(gradients(net)),
        "steps": steps,
        "counts": counts(communication),
        "sharded": all(isinstance(parameter, DTensor) for parameter in net.parameters()),
        "settings": (before, settings(net)),
    }


def fsdp_accumulation(rank, world_size):
    """Three batches, synchronised with the third."""
    net = shard(network())
    online = trainer(net)
    with CommDebugMode() as communication:
        for i in range(3):
            online.forward_backward(*batch(rank, world_size, seed=i), sync=i == 2)
    rounds = {n / GROUPS for n in counts(communication).values()}
    return {"gradients": full(gradients(net)), "rounds": max(rounds)}


def counts(communication):
    return {str(op).rpartition(".")[2]: n for op, n in communication.get_comm_counts().items() if n}


def settings(net):
    """What fully_shard was told, as it is kept in each module."""
    return [
        (group.post_forward_mesh_info is not None, group.reshard_after_backward, group.reduce_grads)
        for module in net.modules()
        if isinstance(module, FSDPModule)
        for group in _groups(module)
    ]


def second_step(time_steps, generator):
    return [1]
